"""Two processes that share out a factored model compute what one does: outputs, gradients and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from factored_tiny_models import build, factor, factor_embedding, inputs, llama, output  # noqa: E402
from torch import nn  # noqa: E402

from eckart.errors import InputError  # noqa: E402
from eckart.hf.registry import prepare_for_saving  # noqa: E402
from eckart.hf.tensor_parallel import adapt_plan  # noqa: E402
from eckart.layers import PivotedLinear, quantise_layer  # noqa: E402
from two_processes import two_processes  # noqa: E402

pytest.importorskip("transformers.distributed.tensor_parallel")

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist, transformers
from factored_tiny_models import inputs, output
from transformers.distributed import DistributedConfig

def gradients(model):
    model.train()(**inputs(model)).logits.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}

dist.init_process_group("gloo")
results = {}
for folder in sorted(Path(sys.argv[2]).iterdir()):
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    one = cls.from_pretrained(folder)
    two = cls.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))
    mine, shared = gradients(one), gradients(two)
    largest = max(float(g.norm()) for g in mine.values())
    two.save_pretrained(folder / "again")
    dist.barrier()
    results[folder.name] = {
        "output": float((output(two) - output(one)).abs().max()),
        "scale": float(output(one).abs().max()),
        "gradient": max(float((shared[n] - g).norm() / max(g.norm(), 1e-2 * largest)) for n, g in mine.items()),
        "gradients": set(mine) == set(shared),
        "again": float((output(cls.from_pretrained(folder / "again")) - output(one)).abs().max()),
        "shares": {n: [list(p.shape), list(p.to_local().shape)] for n, p in two.named_parameters()
                   if hasattr(p, "to_local")},
        "styles": sorted(set(two.tp_plan.values())),
    }
Path(sys.argv[3], f"{dist.get_rank()}.json").write_text(json.dumps(results))
dist.destroy_process_group()
"""


def quantised() -> nn.Module:
    """Factored layers of which one factor has integer weights, and a whole layer with integer weights, both ways."""
    model = llama()
    factor(model)
    for name in ("layers.0.self_attn.q_proj.b", "layers.0.self_attn.o_proj.a", "layers.1.mlp.down_proj"):
        layer = model.model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            name += ".a"
        quantise_layer(model, f"model.{name}", bits=8)
    quantise_layer(model, "model.layers.0.mlp.gate_proj", bits=8)  # dense: `factor` leaves every fifth
    return model


def models() -> dict[str, nn.Module]:
    made = {name: build(name) for name in ("llama", "qwen3", "mixtral", "llama-tied")}
    torch.manual_seed(1)
    made["biases"] = llama(attention_bias=True, mlp_bias=True)
    for parameter in made["biases"].parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    for model in made.values():
        factor(model)
    factor_embedding(made["llama-tied"], "model.embed_tokens", 6, "lowrank", tied=("lm_head",))
    return {**made, "quantised": quantised()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> list[dict]:
    """What each of two processes found, for every model."""
    folder, results = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("results")
    for name, model in models().items():
        prepare_for_saving(model)
        model.eval().save_pretrained(folder / name)
    two_processes(SCRIPT, results, Path(__file__).parent, folder, results)
    return [json.loads((results / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "llama-tied", "biases", "quantised"])
def test_two_processes_compute_what_one_does(ran, name):
    for found in (rank[name] for rank in ran):
        assert found["scale"] > 0.01
        assert found["output"] < 1e-5 * found["scale"]
        assert found["gradients"]
        assert found["gradient"] < 1e-4
        assert found["again"] < 1e-5 * found["scale"]
        assert not any(style.startswith("eckart") for style in found["styles"])


def test_factors_are_shared_out_where_it_saves(ran):
    shares = ran[0]["llama"]["shares"]
    whole, mine = shares["model.layers.0.self_attn.q_proj.b.weight"]
    assert mine == [whole[0] // 2, whole[1]]
    whole, mine = shares["model.layers.0.self_attn.o_proj.a.weight"]
    assert mine == [whole[0], whole[1] // 2]
    assert "model.layers.0.mlp.gate_proj.weight" in shares  # a dense layer, as ever
    assert "model.layers.0.self_attn.q_proj.a.weight" not in shares
    assert not any("experts" in name for name in ran[0]["mixtral"]["shares"])
    assert not any(name.startswith("model.embed_tokens") for name in ran[0]["llama-tied"]["shares"])


def test_some_layers_were_pivoted():
    model = build("llama")
    factor(model)
    kinds = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, PivotedLinear)}
    assert kinds & {"q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"}
    assert kinds & {"o_proj", "down_proj"}


def test_a_model_alone_keeps_its_plan(tmp_path):
    model = build("llama")
    plan = dict(model.tp_plan)
    factor(model)
    prepare_for_saving(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.tp_plan == plan
    assert output(loaded.eval()).shape == (*inputs(model)["input_ids"].shape, 61)


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [
        ("llama", {"tp_plan": {"model.layers.*.self_attn.q_proj": "colwise"}}, "eckart_colwise instead of colwise"),
        ("mixtral", {"ep_size": 2}, "factored experts"),
        ("llama", {"inner": "a torchao config"}, "torchao"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(name, asked, says):
    model = build(name)
    factor(model)
    model.config.quantization_config = SimpleNamespace(inner=asked.pop("inner", None))
    model.config.distributed_config = SimpleNamespace(**{"tp_size": 2, "ep_size": 1, "tp_plan": "auto", **asked})
    with pytest.raises(InputError, match=says):
        adapt_plan(model, dict(model.tp_plan))
