"""What cannot be streamed is refused with its reason, before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed_tiny_models import ASKED, DEEP, GROUPED, TEXT, save, tf, tiny
from torch import nn

import eckart
from eckart.checkpoint.weights import TensorWriter
from eckart.errors import BudgetError, EckartWarning, FileError, InputError, NotFiniteError
from eckart.records import Budget
from eckart.streaming import Route
from eckart.verbs import stream as verb

QUANTISED = '{"quantization_config": {"quant_method": "gptq"},'


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny("llama", tmp_path_factory.mktemp("models") / "llama", max_shard_size="30KB")


def refuse(model, tmp_path, kind, words, **asked):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind, match=words):
        eckart.compress_stream(model, tmp_path / "out", **{**ASKED, **asked})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({"data": None}, InputError, "needs calibration data"),
        ({"gradients": "none"}, InputError, "gradients='none' collects none"),
        ({"method": "whitened", "probes": 2}, InputError, "needs gradients"),
        ({"forms": ("dense", "narrow")}, InputError, "--method modules"),
        ({"method": "modules", "allocation": "global"}, InputError, "one width"),
        ({"method": "modules", "bits": (8,)}, InputError, "as they are"),
        ({"method": "modules", "keep": 0.01}, BudgetError, "cannot be met"),
        ({"method": "modules", "exclude": ["down_proj"]}, InputError, "select whole blocks"),
        ({"method": "whitened", "bits": (8,)}, InputError, "one global budget"),
        ({"bits": (5,)}, InputError, "each once"),
        ({"keep": None, "budget": Budget(bytes=60_000)}, BudgetError, "the least with these sites"),
        ({"keep": 0.001}, BudgetError, "cannot be met"),
        ({"include": ["q_prj"]}, InputError, "q_proj"),
        ({"max_shard_size": "large"}, InputError, "5GB"),
        ({"method": "kfca"}, InputError, "kfac"),
        ({"length": 500}, InputError, "64"),
        ({"method": "whitened", "allocation": "global"}, InputError, "layer by layer"),
    ],
)
def test_options(asked, kind, words, llama, tmp_path):
    refuse(llama, tmp_path, kind, words, **asked)


def test_places(llama, tmp_path, monkeypatch):
    refuse("someone/something", tmp_path, InputError, "hf download")
    refuse(tmp_path / "nothing", tmp_path, FileError, "nothing")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    refuse(llama, tmp_path, FileError, "overwrite")
    with pytest.raises(InputError, match="made from"):
        eckart.compress_stream(llama, llama, **ASKED, overwrite=True)
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(verb.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100_000))
    refuse(llama, tmp_path, FileError, "GB of disk")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse(llama, tmp_path, InputError, "torchrun")


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda m: next(m.glob("model-00002*")).unlink(), FileError, "missing"),
        (lambda m: (p := next(m.glob("model-00002*"))).write_bytes(p.read_bytes()[:-9]), FileError, "cut short"),
        (lambda m: edit(m / "model.safetensors.index.json", lambda t: t.replace("model-00001", "../model-00001")),
         FileError, "out of the folder"),
        (lambda m: edit(m / "config.json", lambda t: t.replace('"intermediate_size": 48', '"intermediate_size": 40')),
         FileError, "config.json belongs"),
        (lambda m: edit(m / "config.json", lambda t: t.replace("{", QUANTISED, 1)),
         InputError, "already"),
        (lambda m: edit(m / "config.json", lambda t: t.replace("LlamaForCausalLM", "TheirForCausalLM")),
         FileError, "never runs code"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_folders(damage, kind, words, llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    damage(model)
    refuse(model, tmp_path, kind, words)


def edit(path, change) -> None:
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def test_weights_that_are_not_finite(tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    refuse(save(model, tmp_path / "model"), tmp_path, NotFiniteError, "layers.1.mlp.up_proj")


def test_a_mixture_that_lacks_an_expert(tmp_path):
    folder = tiny("mixtral", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refuse(folder, tmp_path, FileError, "layers.1.mlp.experts.gate_up_proj")


def test_an_expert_that_is_not_finite(tmp_path):
    folder = tiny("mixtral", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.block_sparse_moe.experts.1.w2.weight"][3, 4] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refuse(folder, tmp_path, NotFiniteError, "layers.2.mlp.experts.down_proj")


def test_experts_that_no_token_reached_are_named(tmp_path):
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=1))
    with torch.no_grad():
        gate = model.model.layers[2].mlp.gate.weight
        gate[1], gate[2] = -gate[0], 0.0  # the largest of x, -x and 0 is never the last
    folder = save(model, tmp_path / "model")
    with pytest.warns(EckartWarning, match=r"no calibration token reached 2 expert .*layers.2.mlp.experts.*: 2\)"):
        made = eckart.compress_stream(folder, tmp_path / "out", **ASKED)
    assert "no calibration token reached 2 expert matrices of 2 sites" in made.outcome.notes[0]
    with pytest.warns(EckartWarning, match=r"no token reached 2 of the experts' matrices .*layers\.2.*: 2\)"):
        eckart.compress(folder, **ASKED, probe_rounds=0)
    assert made.outcome.notes[0] in (tmp_path / "out" / "eckart.json").read_text()


def test_two_dtypes(tmp_path):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).bfloat16()
    model.model.norm.float()
    refuse(save(model, tmp_path / "model"), tmp_path, InputError, "one dtype")


ARCHITECTURES = {
    "encoder and decoder": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=257, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
        InputError,
        "2: decoder, encoder",
    ),
    "shared blocks": (
        lambda: tf.AlbertModel(tf.AlbertConfig(**DEEP, embedding_size=16)),
        InputError,
        "cannot be compressed block by block",
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_that_cannot_be_walked(name, tmp_path):
    build, kind, words = ARCHITECTURES[name]
    torch.manual_seed(0)
    refuse(save(build(), tmp_path / "model"), tmp_path, kind, words)


class Chain(nn.Module):
    """Blocks in a list, and a forward that may do more than one after the other."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(4, 5)
        self.how = how

    def forward(self, x):
        kept = []
        for index, block in enumerate(self.blocks):
            if self.how == "skips" and index == 1:
                continue
            if self.how == "between" and index == 2:
                x = x + 1
            x = block(x)
            if self.how == "twice" and index == 1:
                x = block(x)
            kept.append(x)
        return self.head(sum(kept) if self.how == "links" else x)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("between", "computed before blocks.2"),
        ("twice", "not called once"),
        ("skips", "blocks.2 is not called once|only 2 of its 3"),
        ("links", "head reads more"),
    ],
)
def test_links_between_blocks_are_found(how, words):
    with pytest.raises(InputError, match=words):
        Route(Chain(how)).check(torch.randn(2, 3, 4))


def test_the_route_of_a_chain_is_its_forward():
    torch.manual_seed(0)
    model, batch = Chain("plain"), torch.randn(2, 3, 4)
    route = Route(model)
    route.check(batch)
    state = route.start(batch)
    for index in range(len(route)):
        state = route.call(index, batch)(state)
    torch.testing.assert_close(route.finish(batch, state), model(batch), rtol=0, atol=0)
    assert all("forward" not in vars(block) for block in model.blocks)


def test_few_tokens_are_warned_of(llama, tmp_path):
    with pytest.warns(EckartWarning, match="16 of 48"):
        eckart.compress_stream(llama, tmp_path / "out", **{**ASKED, "samples": 1, "length": 16})


def test_the_writer(tmp_path):
    layout = {"a": (torch.float64, (2,)), "b": (torch.bfloat16, (3, 1)), "empty": (torch.float32, (0,))}
    path = tmp_path / "x.safetensors"
    values = {"a": torch.tensor([1.0, 2.0]).double(), "b": torch.ones(3, 1).bfloat16(), "empty": torch.empty(0)}
    with pytest.raises(FileError, match="odd address"), TensorWriter(path, dict(reversed(layout.items()))) as writer:
        pass
    layout = TensorWriter.ordered(layout)
    with pytest.raises(ValueError, match="expected a"), TensorWriter(path, layout) as writer:
        writer.write("b", values["b"])
    with pytest.raises(ValueError, match="never written"), TensorWriter(path, layout) as writer:
        writer.write("a", values["a"])
    assert list(tmp_path.iterdir()) == []
    with TensorWriter(path, layout) as writer:
        for name in layout:
            writer.write(name, values[name])
    assert writer.mark.fits(path, content=True)
    found = load_file(path)
    assert set(found) == set(values)
    assert all(torch.equal(found[name], values[name]) for name in values)
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert writer.mark.fits(path, content=False)
    assert not writer.mark.fits(path, content=True)


def test_json_of_the_manifest_has_no_time(llama, tmp_path):
    eckart.compress_stream(llama, tmp_path / "out", **ASKED)
    manifest = json.loads((tmp_path / "out" / "eckart.json").read_text())
    assert manifest["outcome"]["seconds"] == 0.0
    assert manifest["calibration"]["units"] == 16 * 32
    assert TEXT["vocab_size"] == 257
