"""``eckart prune``: what it passes on, what it refuses, and runs from folder to folder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import eckart
from eckart.arch import find_sites, fingerprint
from eckart.checkpoint import inspect_folder
from eckart.cli.recipe import PruneSection
from eckart.moments import collect, sampled_targets
from eckart.prune.masks import MaskSet
from eckart.prune.one_shot import METHODS

CONTENT = {
    "what": "zeros",
    "means": "zeros: …",
    "pattern": "keep 2 of 4",
    "method": "kfac",
    "allocation": "uniform",
    "refitted": True,
    "keep": 0.5,
    "weights": 100,
    "kept": 50,
    "loss": 0.01,
    "dense_bytes": 400,
    "loadable_bytes": 400,
    "stored_bytes": 213,
    "seconds": 1.0,
    "layers": [{"name": "layers.0.q", "keep": 0.5, "kept": 50, "rank": 0, "error": 0.1, "loss": 0.01}],
}
GOOD = ("prune", "m", "--data", "stdlib:source", "--keep", "0.5")


@pytest.fixture
def asked(monkeypatch):
    """What the verb was called with; its result writes a folder."""
    calls: list[dict] = []

    def save(folder, **how):
        calls[-1]["save"] = how
        folder.mkdir(exist_ok=True)
        (folder / "eckart.json").write_text("{}")

    def fake(model, **keywords):
        keywords.pop("progress")("stage", 1, 2)
        calls.append({"model": model, **keywords})
        return SimpleNamespace(save=save, to_json=lambda: CONTENT, narrow=None)

    monkeypatch.setitem(vars(eckart), "prune_model", fake)
    return calls


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "moments.safetensors").write_text("")
    return tmp_path


def test_what_was_typed_is_passed_on_and_nothing_else(run, asked, place):
    ran = run(*GOOD, "-o", "out")
    assert ran.code == 0, ran.err
    save = asked[0].pop("save")
    assert asked[0] == {"model": "m", "data": "stdlib:source", "keep": 0.5}
    assert save == {"command": "eckart prune m --data stdlib:source --keep 0.5 -o out", "overwrite": False}
    ran = run("prune", "m", "--moments", "moments.safetensors", "--pattern", "2:4", "--method", "wanda",
              "--no-refit", "--allocation", "uniform", "--rank", "0", "--include", "*.q", "--exclude", "*.k",
              "-o", "out", "--overwrite", "--max-shard-size", "1GB")  # fmt: skip
    assert ran.code == 0, ran.err
    assert asked[1].pop("save") | {"command": ""} == {"command": "", "overwrite": True, "max_shard_size": "1GB"}
    assert asked[1] == {
        "model": "m", "moments": "moments.safetensors", "pattern": "keep 2 of 4", "method": "wanda", "refit": False,
        "allocation": "uniform", "rank": 0, "include": ("*.q",), "exclude": ("*.k",),
    }  # fmt: skip


def test_the_result_says_what_it_is(run, asked, place):
    ran = run(*GOOD, "-o", "out")
    for words in ("zeros", "keep 2 of 4", "213\N{NO-BREAK SPACE}B", "layers.0.q"):
        assert words in ran.out
    ran = run(*GOOD, "-o", "out2", "--json", "-q")
    assert json.loads(ran.out)["pruned"]["what"] == "zeros"
    assert ran.err == ""


CASES = {
    "no model": (("prune", "--data", "stdlib:source", "--keep", ".5", "-o", "x"), "MODEL is missing"),
    "no share": (("prune", "m", "--data", "stdlib:source", "-o", "x"), "--keep is missing"),
    "all kept": (("prune", "m", "--data", "stdlib:source", "--keep", "1", "-o", "x"), "--keep: expected less than 1"),
    "none kept": (("prune", "m", "--keep", "0", "-o", "x"), "--keep: expected greater than 0"),
    "per cent": (("prune", "m", "--keep", "50", "-o", "x"), "--keep: expected less than 1"),
    "no such pattern": ((*GOOD, "-o", "x", "--pattern", "2-4"), "--pattern: expected unstructured"),
    "pattern of all": ((*GOOD, "-o", "x", "--pattern", "4:4"), "expected 1 ≤ n < m"),
    "pattern and share": (
        ("prune", "m", "--data", "stdlib:source", "--pattern", "2 of 8", "--keep", ".5", "-o", "x"),
        "keeps 0.25, but --keep says 0.5",
    ),
    "no such method": ((*GOOD, "-o", "x", "--method", "wandas"), "Did you mean 'wanda'?"),
    "no such allocation": ((*GOOD, "-o", "x", "--allocation", "owls"), "unknown value 'owls'. Did you mean 'owl'"),
    "a method for heads": ((*GOOD, "-o", "x", "--pattern", "heads", "--method", "wanda"), "--method: for zeros only"),
    "a rank for neurons": ((*GOOD, "-o", "x", "--pattern", "neurons", "--rank", "4"), "--rank: for zeros only"),
    "kfac without refit": ((*GOOD, "-o", "x", "--no-refit"), "refit as they go"),
    "rank without refit": ((*GOOD, "-o", "x", "--no-refit", "--method", "wanda", "--rank", "4"), "--rank fits"),
    "rank below zero": ((*GOOD, "-o", "x", "--rank", "-1"), "--rank: expected greater than or equal to 0"),
    "no statistics": (("prune", "m", "--keep", ".5", "-o", "x"), "--data or --moments is missing"),
    "magnitude with a refit": (
        ("prune", "m", "--keep", ".5", "--method", "magnitude", "-o", "x"),
        "only --method magnitude --no-refit goes without",
    ),
    "data and moments": ((*GOOD, "--moments", "moments.safetensors", "-o", "x"), "exclude each other"),
    "no such data": (("prune", "m", "--keep", ".5", "--data", "no.txt", "-o", "x"), "no file no.txt"),
    "no output": (GOOD, "-o is missing"),
    "output is the model": ((*GOOD, "-o", "m", "--overwrite"), "what the result is made from"),
}


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES)
def test_wrong_use_is_refused_before_any_work(run, asked, place, arguments, message):
    ran = run(*arguments)
    assert ran.code == 2
    assert message in " ".join(ran.err.split())
    assert not asked
    assert not (place / "x").exists()


def test_all_problems_at_once(run, asked, place):
    ran = run("prune", "--pattern", "heads", "--method", "kfac", "--data", "no.txt", "--moments", "no")
    for words in ("MODEL", "--keep is missing", "--method: for zeros only", "no.txt", "no does not exist", "-o is"):
        assert words in " ".join(ran.err.split())


def test_magnitude_goes_without_data(run, asked, place):
    ran = run("prune", "m", "--keep", ".5", "--method", "magnitude", "--no-refit", "-o", "x")
    assert ran.code == 0, ran.err


def test_ctrl_c_leaves_nothing(run, monkeypatch, place):
    def interrupted(model, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(eckart), "prune_model", interrupted)
    ran = run(*GOOD, "-o", "out")
    assert ran.code == 130
    assert "out was not written" in ran.err
    assert sorted(p.name for p in place.iterdir()) == ["m", "moments.safetensors"]


def test_ctrl_c_while_writing_leaves_nothing(monkeypatch, place):
    tf = pytest.importorskip("transformers")
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).eval()
    pruned = eckart.prune_model(model, keep=0.5, method="magnitude", refit=False)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MaskSet, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruned.save("out")
    assert sorted(p.name for p in place.iterdir()) == ["m", "moments.safetensors"]


# ---- from folder to folder

LLAMA = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24}
IDS = torch.arange(3, 20).unsqueeze(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model, and the file of its moments."""
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 61, (8, 12), generator=generator)} for _ in range(2)]
    moments = collect(
        model,
        batches,
        find_sites(model),
        loss=sampled_targets,
        gradients="full",
        seed=0,
        fingerprint=fingerprint(model),
    )
    moments.save(folder / "moments.safetensors")
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("arguments", "share"),
    [(("--keep", "0.5"), 0.5), (("--pattern", "2:4", "--method", "wanda"), 0.5), (("--pattern", "keep 2 of 8"), 0.25)],
    ids=str,
)
def test_zeros_load_in_plain_transformers(run, base, tmp_path, arguments, share):
    tf = pytest.importorskip("transformers")
    out = tmp_path / "out"
    ran = run("prune", base / "model", "--moments", base / "moments.safetensors", *arguments, "-o", out, "--json", "-q")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["pruned"]
    assert found["what"] == "zeros"
    assert found["keep"] == pytest.approx(share, abs=0.01)
    assert found["loadable_bytes"] == found["dense_bytes"] > found["stored_bytes"]
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    masks = MaskSet.load(out / "masks.safetensors", model)
    assert masks.density() == pytest.approx(share, abs=0.01)
    assert not masks.leaks(model)
    state = inspect_folder(out).require_whole()
    assert state.kind == "dense"
    assert state.manifest is not None
    assert state.manifest.outcome["pruning"]["what"] == "zeros"
    assert "nothing is faster" in (out / "README.md").read_text()
    assert "nothing is faster" in (out / "report.html").read_text()
    weights = sum(p.stat().st_size for p in out.glob("model*.safetensors"))
    assert weights == sum(p.stat().st_size for p in (base / "model").glob("model*.safetensors"))


def test_a_rank_is_a_lora_beside(run, base, tmp_path):
    tf = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    original = logits(tf.AutoModelForCausalLM.from_pretrained(base / "model"))
    out = tmp_path / "out"
    arguments = ("--moments", base / "moments.safetensors", "--pattern", "2:4", "--rank", "8", "--json", "-q")
    ran = run("prune", base / "model", *arguments, "-o", out)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["pruned"]["what"] == "zeros and rank"
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    assert not MaskSet.load(out / "masks.safetensors", model).leaks(model)
    zeros = logits(model)
    repaired = logits(peft.PeftModel.from_pretrained(model, out / "repair"))
    assert float((repaired - original).norm()) < float((zeros - original).norm())
    loaded = eckart.prune_model(
        str(base / "model"), moments=str(base / "moments.safetensors"), pattern="2:4", rank=8
    ).repaired()
    torch.testing.assert_close(logits(loaded.model), repaired)


@pytest.mark.parametrize("pattern", ["neurons", "heads"])
@pytest.mark.parametrize("refit", [True, False])
def test_widths_are_plain_smaller_models(run, base, tmp_path, pattern, refit):
    tf = pytest.importorskip("transformers")
    out = tmp_path / "out"
    arguments = ["--moments", base / "moments.safetensors", "--keep", "0.5", "--pattern", pattern]
    ran = run("prune", base / "model", *arguments, *([] if refit else ["--no-refit"]), "-o", out, "--json", "-q")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["pruned"]
    assert (found["what"], found["native"]) == ("width", True)
    assert found["sites_after"]["bytes"] * 2 == found["sites_before"]["bytes"]
    assert found["sites_after"]["macs"] * 2 == found["sites_before"]["macs"]
    assert inspect_folder(out).require_whole().kind == "dense"
    model = tf.AutoModelForCausalLM.from_pretrained(out)
    config = model.config
    widths = (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    assert widths == ((12, 4, 2, 4) if pattern == "neurons" else (24, 2, 1, 4))
    assert logits(model).isfinite().all()
    assert not (out / "masks.safetensors").exists()


def test_heads_without_a_place_in_the_config_say_so(run, tmp_path):
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tf.BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
                           intermediate_size=24)  # fmt: skip
    model = tf.BertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    batch = {"input_ids": torch.randint(3, 61, (16, 12), generator=torch.Generator().manual_seed(0))}
    moments = collect(
        model, [batch], find_sites(model), loss=sampled_targets, gradients="full", fingerprint=fingerprint(model)
    )
    moments.save(tmp_path / "moments.safetensors")
    out = tmp_path / "out"
    arguments = ("--moments", tmp_path / "moments.safetensors", "--keep", "0.5", "--pattern", "heads")
    ran = run("prune", tmp_path / "base", *arguments, "-o", out, "--json", "-q")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["pruned"]
    assert not found["native"]
    assert any("import eckart" in note for note in found["notes"])
    assert inspect_folder(out).require_whole().kind == "eckart"
    loaded = tf.AutoModelForMaskedLM.from_pretrained(out)
    assert tuple(loaded.bert.encoder.layer[0].attention.self.query.weight.shape) == (8, 16)
    assert logits(loaded).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--keep", "0.3", "--pattern", "heads"), "of 2 is less than one"),
        (("--keep", "0.001", "--pattern", "row"), "less than one"),
        (("--pattern", "keep 2 of 5"), "no multiple of 5"),
        (("--keep", "0.5", "--rank", "17"), "more than its full rank"),
        (("--keep", "0.5", "--include", "*.nothing"), "nothing"),
    ],
    ids=str,
)
def test_what_the_model_cannot_have_is_refused(run, base, tmp_path, arguments, words):
    out = tmp_path / "out"
    ran = run("prune", base / "model", "--moments", base / "moments.safetensors", *arguments, "-o", out, "-q")
    assert ran.code in (1, 2)
    assert words in " ".join(ran.err.split())
    assert not out.exists()


def test_moments_of_another_model(run, base, tmp_path):
    tf = pytest.importorskip("transformers")
    torch.manual_seed(1)
    tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "other")
    for pattern in ("unstructured", "heads"):
        ran = run("prune", tmp_path / "other", "--moments", base / "moments.safetensors", "--keep", "0.5",
                  "--pattern", pattern, "-o", tmp_path / "out", "-q")  # fmt: skip
        assert ran.code == 2
        assert "fingerprint" in ran.err
        assert not (tmp_path / "out").exists()


def test_a_module_in_memory_stays_as_it_is(base):
    tf = pytest.importorskip("transformers")
    model = tf.AutoModelForCausalLM.from_pretrained(base / "model")
    before = logits(model)
    for pattern in ("unstructured", "neurons", "heads"):
        made = eckart.prune_model(model, moments=str(base / "moments.safetensors"), keep=0.5, pattern=pattern)
        assert made.model is not model
        assert not torch.equal(logits(made.model), before)
    assert torch.equal(logits(model), before)
    made = eckart.prune_model(model, keep=0.5, method="magnitude", refit=False, inplace=True)
    assert made.model is model


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"keep": 1.0}, "1 would remove nothing"),
        ({"keep": 0}, "share between 0 and 1"),
        ({"keep": 0.5, "pattern": "heads", "rank": 2}, "rank are for zeros"),
        ({"pattern": "neurons"}, "keep is missing"),
        ({"keep": 0.5, "pattern": "heads"}, "needs data or moments"),
        ({"keep": 0.5, "pattern": "haeds"}, r"unknown pattern 'haeds'.*neurons, heads"),
    ],
    ids=str,
)
def test_the_verb_itself_refuses(base, wrong, words):
    with pytest.raises(eckart.InputError, match=words):
        eckart.prune_model(str(base / "model"), **wrong)


# ---- eckart compress --options

ENOUGH = ("compress", "m", "--data", "stdlib:source", "--max-bytes", "1MB", "-o", "x")


@pytest.mark.parametrize(
    ("kinds", "forms", "bits"),
    [
        ("rank,width,sparse,bits", ("dense", "lowrank", "pivoted", "narrow", "sparse"), (8, 4)),
        ("sparse", ("dense", "sparse"), ()),
        ("bits, rank", ("dense", "lowrank", "pivoted"), (8, 4)),
        ("width", ("dense", "narrow"), ()),
    ],
)
def test_kinds_are_forms_and_bits(run, verbs, place, kinds, forms, bits):
    ran = run(*ENOUGH, "--options", kinds)
    assert ran.code == 0, ran.err
    asked = next(keywords for verb, _, keywords in verbs.calls if verb == "compress")
    assert (asked["forms"], asked["bits"]) == (forms, bits)


def test_without_kinds_nothing_is_passed_on(run, verbs, place):
    ran = run(*ENOUGH)
    assert ran.code == 0, ran.err
    asked = next(keywords for verb, _, keywords in verbs.calls if verb == "compress")
    assert not {"forms", "bits"} & set(asked)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*ENOUGH, "--options", "rank,spars"), "unknown value 'spars'. Did you mean 'sparse'?"),
        ((*ENOUGH, "--options", "rank", "--bits", "8"), "--options and --bits say the same"),
        ((*ENOUGH, "--options", "rank", "--form", "dense"), "--options and --form say the same"),
        (("compress", "m", "--data", "stdlib:source", "--keep", ".5", "-o", "x", "--options", "sparse"), "--max-bytes"),
        (("compress", "m", "--data", "stdlib:source", "--keep", ".5", "-o", "x", "--form", "sparse"), "--max-bytes"),
        (
            ("plan", "m", "--moments", "moments.safetensors", "--max-macs", "1M", "-o", "x", "--options", "sparse"),
            "--max-bytes",
        ),
        ((*ENOUGH, "--plan", "moments.safetensors", "--options", "rank"), "--options would"),
    ],
    ids=str,
)
def test_kinds_that_cannot_be(run, verbs, place, arguments, words):
    ran = run(*arguments)
    assert ran.code == 2
    assert words in " ".join(ran.err.split())
    assert verbs.calls == []


def test_zeros_under_a_budget_in_bytes_from_folder_to_folder(run, base, tmp_path):
    tf = pytest.importorskip("transformers")
    out = tmp_path / "out"
    limit = int(0.7 * sum(p.stat().st_size for p in (base / "model").glob("model*.safetensors")))
    arguments = ("--moments", base / "moments.safetensors", "--max-bytes", limit, "--options", "sparse", "--no-certify")
    ran = run("compress", base / "model", *arguments, "-o", out, "--json", "-q")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["outcome"]["model_after"]["bytes"] <= limit
    assert any(step["form"] == "sparse" for step in found["plan"]["steps"])
    assert logits(tf.AutoModelForCausalLM.from_pretrained(out)).isfinite().all()


def test_every_method_can_be_asked_for():
    named = str(PruneSection.model_fields["method"].annotation)
    assert all(repr(method) in named for method in METHODS)
