"""``eckart.adapt`` and ``eckart.convert`` on models of a few thousand numbers."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eckart
from eckart.adaptation import ADAPTATIONS
from eckart.data.examples import Fields, read_examples
from eckart.errors import EckartError, EckartWarning, FileError, InputError, MismatchError
from eckart.hf.adapter_trainer import collate, row_losses, tokenise
from eckart.hf.models import load_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::eckart.errors.EckartWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A causal and a BERT model with a byte tokenizer, and files of examples."""
    root = tmp_path_factory.mktemp("adapt")
    torch.manual_seed(0)
    letters = {chr(i): i for i in range(32, 127)} | {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(vocab_size=127, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    bert = transformers.BertConfig(vocab_size=127, max_position_embeddings=64, **sizes)
    for name, model in (
        ("llama", transformers.LlamaForCausalLM(llama)),
        ("bert", transformers.BertModel(bert, add_pooling_layer=False)),
    ):
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
    _lines(
        root / "pairs.jsonl", [{"prompt": f"{i} is ", "completion": "even" if i % 2 == 0 else "odd"} for i in range(60)]
    )
    _lines(
        root / "classes.jsonl",
        [{"text": "ab" * (i % 3 + 1) if i % 2 else "xyz" + str(i), "label": i % 2} for i in range(60)],
    )
    (root / "running.txt").write_text("the same words again and again, " * 60)
    return root


def _lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 72).reshape(2, 16)).logits


def test_a_completion_is_learned_and_everything_is_written(place, tmp_path):
    found = eckart.adapt(
        place / "llama", place / "pairs.jsonl", method="pissa", rank=4, steps=60, rate=2e-2, batch_size=8, length=32
    )
    outcome = found.outcome
    assert outcome.change.high < 0
    assert outcome.after.mean - outcome.before.mean == pytest.approx(outcome.change.mean)
    assert outcome.plan.held_out == "6 of 60 rows of pairs.jsonl, drawn with seed 0"
    assert outcome.plan.parameters == sum(layer.parameters for layer in outcome.plan.layers)
    folder = found.save(tmp_path / "adapter", command="eckart adapt …")
    for base in (load_model(place / "llama").model,):
        again = peft.PeftModel.from_pretrained(base, folder)
        assert torch.equal(_logits(again), _logits(found.model))
    plain = peft.PeftModel.from_pretrained(load_model(place / "llama").model, folder / "lora")
    assert torch.allclose(_logits(plain), _logits(found.model), atol=1e-6)
    card = (folder / "README.md").read_text()
    assert "method `pissa`" in card
    assert outcome.plan.held_out in card
    manifest = json.loads((folder / "eckart.json").read_text())
    assert manifest["command"] == "eckart adapt …"
    assert manifest["outcome"]["adaptation"]["plan"]["steps"] == 60
    with pytest.raises(FileError, match="exists"):
        found.save(folder)


def test_eva_needs_no_second_pass_and_meets_its_budget(place):
    budget = eckart.Budget(parameters=900)
    settings = {"method": "eva", "budget": budget, "steps": 2, "length": 32}
    plan = eckart.adapt_plan(place / "llama", place / "running.txt", **settings)
    assert 0 < plan.parameters <= 900
    assert "windows of running.txt" in plan.held_out
    found = eckart.adapt(place / "llama", place / "running.txt", **settings)
    assert found.outcome.plan == plan


def test_classes_get_a_head_that_is_saved(place, tmp_path):
    found = eckart.adapt(
        place / "bert", place / "classes.jsonl", method="lora", rank=2, steps=60, rate=2e-2, batch_size=8, length=16
    )
    assert found.outcome.accuracy_after.mean > 0.8 > found.outcome.accuracy_before.mean
    assert found.labels == ("0", "1")
    assert "classifier" in found.outcome.plan.whole
    assert not any("classifier" in layer.name or "pooler" in layer.name for layer in found.outcome.plan.layers)
    found.save(tmp_path / "classes")
    done = eckart.convert(tmp_path / "classes", "lora", tmp_path / "lora")
    assert done.exact
    assert done.error < 1e-4
    model = transformers.AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=2)
    plain = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    assert torch.allclose(_logits(plain), _logits(found.model), atol=1e-5)


@pytest.mark.parametrize("how", ["Ctrl-C", "killed"])
def test_an_interrupted_run_goes_on_and_ends_where_it_would_have(place, tmp_path, how):
    settings = {"method": "sorsa", "rank": 2, "steps": 12, "length": 32, "rate": 1e-2, "save_every": 4}
    whole = eckart.adapt(place / "llama", place / "pairs.jsonl", **settings)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 6:
            if how == "killed":
                raise SystemExit(9)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else SystemExit):
        eckart.adapt(place / "llama", place / "pairs.jsonl", work=tmp_path / "work", progress=stop, **settings)
    with pytest.raises(MismatchError, match="plan"):
        eckart.adapt(place / "llama", place / "pairs.jsonl", work=tmp_path / "work", **{**settings, "rate": 1e-3})
    # A checkpoint that was cut off while it was written does not count.
    (tmp_path / "work" / "checkpoint-9").mkdir()
    found = eckart.adapt(place / "llama", place / "pairs.jsonl", work=tmp_path / "work", **settings)
    assert found.outcome.resumed_from == (6 if how == "Ctrl-C" else 4)
    assert torch.equal(_logits(found.model), _logits(whole.model))
    assert found.outcome.before == whole.outcome.before
    assert found.outcome.after == whole.outcome.after
    found.save(tmp_path / "out")
    assert not (tmp_path / "work").exists()


def test_every_bad_line_is_named_before_a_model_is_loaded(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"text": "a", "label": 1}\n\n{"text": "b"}\n{"text": " ", "label": 2}\nnope\n[1]\n{"text": 3, "label": [1]}\n'
    )
    with pytest.raises(InputError) as error:
        eckart.adapt("no-such-model", bad, rate=-1, rank=0)
    text = str(error.value)
    for words in (
        *("rate is a learning rate", "rank is an int", "line 2: empty", "line 3: no field 'label'"),
        *("line 4: the field 'text' is empty", "line 5: not JSON", "line 6: expected a JSON object, got list"),
        *("line 7: expected text in 'text', got int", "line 7: expected a text or an integer in 'label', got list"),
    ):
        assert words in text, words
    assert "line 1" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n', "at least two"),
        ('{"words": "a"}\n', "fields of an example"),
        ("", "empty"),
        ("\n".join(['{"text": "a"}', *["x"] * 40]), "and 20 more"),
    ],
)
def test_files_that_hold_no_examples(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_examples(path)


def test_fields_can_have_other_names(tmp_path):
    _lines(tmp_path / "a.jsonl", [{"q": "1", "a": "2", "text": "x"}, {"q": "3", "a": "4", "text": "y"}])
    found = read_examples(tmp_path / "a.jsonl", Fields(prompt="q", completion="a"))
    assert found.kind == "completion"
    assert found.rows == (("1", "2"), ("3", "4"))


def test_the_prompt_is_not_trained_on_and_losses_are_the_models_own(place):
    loaded = load_model(place / "llama")
    rows = tokenise(loaded, read_examples(place / "pairs.jsonl"), 32).rows
    assert rows[3]["labels"] == [-100] * 5 + rows[3]["input_ids"][5:]
    assert rows[3]["input_ids"][-1] == 1
    sums, counts, right = row_losses(loaded.model, rows[:5], 0, 2)
    for i, row in enumerate(rows[:5]):
        with torch.no_grad():
            own = loaded.model(**collate([row], 0)).loss
        assert float(sums[i] / counts[i]) == pytest.approx(float(own), rel=1e-5)
        assert counts[i] == sum(label != -100 for label in row["labels"])
        assert 0 <= right[i] <= counts[i]
    short = tokenise(loaded, read_examples(place / "pairs.jsonl"), 6)
    assert short.dropped == 60 - 10
    assert short.cut == 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lroa"}, "Did you mean 'lora'"),
        ({"targets": ["no_such"]}, "no layer of LlamaForCausalLM"),
        ({"length": 4000}, "at most 64"),
        ({"rank": 2, "budget": eckart.Budget(parameters=10)}, "exclude each other"),
        ({"held_out_share": 0.999}, "too few"),
        ({"budget": eckart.Budget(parameters=3)}, "below one direction"),
        ({"method": "sara", "options": {"threshold": 1e-9}}, "nothing to train"),
    ],
)
def test_bad_options(place, options, message):
    with pytest.raises(InputError, match=message):
        eckart.adapt(place / "llama", place / "pairs.jsonl", **{"length": 32, **options})


def test_text_needs_a_model_that_continues_it(place):
    with pytest.raises(InputError, match="no causal language model"):
        eckart.adapt(place / "bert", place / "pairs.jsonl", length=32)


def test_what_is_no_lora_is_approximated_or_refused(place, tmp_path):
    found = eckart.adapt(place / "llama", place / "pairs.jsonl", method="soka", rank=3, steps=30, rate=2e-2, length=32)
    with pytest.warns(EckartWarning, match="no plain-LoRA copy"):
        found.save(tmp_path / "adapter")
    with pytest.raises(EckartError, match="Nothing was written") as error:
        eckart.convert(tmp_path / "adapter", "lora", tmp_path / "lora", rank=1, max_error=0.01)
    assert "1: " in str(error.value)
    assert not (tmp_path / "lora").exists()
    done = eckart.convert(tmp_path / "adapter", "lora", tmp_path / "lora", max_error=0.02)
    assert not done.exact
    assert done.error <= 0.02
    assert done.rank in done.tried
    assert done.error == done.tried[done.rank]
    plain = peft.PeftModel.from_pretrained(load_model(place / "llama").model, tmp_path / "lora")
    base, adapted, ours = _logits(load_model(place / "llama").model), _logits(found.model), _logits(plain)
    assert (ours - adapted).norm() <= 0.1 * (adapted - base).norm()
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == done.rank
    assert not config["rank_pattern"]
    # The error in the weights is that of the best matrices of that rank.
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, module in found.model.get_base_model().named_modules():
        if hasattr(module, "eckart_delta"):
            change = module.get_delta_weight("default").detach().double()
            stem = f"base_model.model.{name}."
            kept = tensors[f"{stem}lora_B.weight"].double() @ tensors[f"{stem}lora_A.weight"].double()
            tail = torch.linalg.svdvals(change)[done.rank :].square().sum().sqrt()
            assert float((change - kept).norm()) == pytest.approx(float(tail), rel=1e-3, abs=1e-5)


def test_merged(place, tmp_path):
    found = eckart.adapt(place / "llama", place / "pairs.jsonl", method="svfit", rank=6, steps=8, length=32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EckartWarning)
        found.save(tmp_path / "adapter")
    done = eckart.convert(tmp_path / "adapter", "merged", tmp_path / "merged")
    assert done.error < 1e-3
    assert torch.allclose(_logits(load_model(tmp_path / "merged").model), _logits(found.model), atol=1e-5)


def test_bad_conversions(place, tmp_path):
    with pytest.raises(InputError, match="3 problems"):
        eckart.convert(tmp_path, "onnx", tmp_path / "out", max_error=0, rank=0)
    with pytest.raises(FileError, match="holds no adapter"):
        eckart.convert(tmp_path, "lora", tmp_path / "out")
    other = peft.get_peft_model(load_model(place / "llama").model, peft.LoraConfig(target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="expected one of Eckart"):
        eckart.convert(tmp_path / "other", "lora", tmp_path / "out")


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_every_method_trains_and_converts_or_says_why_not(place, tmp_path, name):
    rank = 40 if name == "said" else 4
    found = eckart.adapt(
        place / "llama",
        place / "pairs.jsonl",
        method=name,
        rank=rank,
        steps=4,
        rate=1e-2,
        length=32,
        targets=["q_proj"],
    )
    model = found.model.eval()
    assert found.outcome.change.mean != 0
    with model.disable_adapter():
        assert torch.equal(_logits(model), _logits(load_model(place / "llama").model))
    found.save(tmp_path / "adapter")
    method = ADAPTATIONS[name]
    assert (tmp_path / "adapter" / "lora").is_dir() is method.exact
    if not method.delta.linear:
        with pytest.raises(EckartError, match="not linear"):
            eckart.convert(tmp_path / "adapter", "lora", tmp_path / "lora")
        return
    done = eckart.convert(tmp_path / "adapter", "lora", tmp_path / "lora")
    assert done.exact is method.exact
    assert done.error < 0.05
