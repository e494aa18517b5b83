"""PEFT on Eckart's own layers: chosen, trained, named where it cannot be merged; everything else as PEFT does it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import eckart  # noqa: F401
from eckart.errors import EckartError, InputError
from eckart.forms import LowRank
from eckart.hf.lora import attach_lora, lora_config, lora_tensors
from eckart.hf.lora_layers import LoraOnFactors, register
from eckart.layers import FactoredLinear, PivotedLinear
from eckart.layers.quantised import QuantisedLinear
from eckart.linalg import round_groups
from fresh_python import run

peft = pytest.importorskip("peft")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factored = FactoredLinear(8, 12, 3)
        self.pivoted = PivotedLinear(12, 8, 3)
        self.plain = nn.Linear(8, 8)
        self.quantised = QuantisedLinear.from_linear(nn.Linear(8, 8), round_groups(torch.randn(8, 8), bits=4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quantised(self.plain(self.pivoted(self.factored(x))))


NAMES = ("factored", "pivoted", "plain", "quantised")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def forms(rank: int = 2) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"factored": (12, 8), "pivoted": (8, 12), "plain": (8, 8), "quantised": (8, 8)}
    return {
        name: LowRank(a=torch.randn(rank, n, generator=generator), b=torch.randn(m, rank, generator=generator))
        for name, (m, n) in shapes.items()
    }


def test_the_adapter_is_added_to_every_kind_of_layer(model, recwarn):
    added = forms()
    attached = attach_lora(copy.deepcopy(model), lora_config(added, task="logits"), added)
    x = torch.randn(5, 8)
    for name in NAMES:
        old, new = model.get_submodule(name), attached.base_model.model.get_submodule(name)
        assert isinstance(new, LoraOnFactors) == (name != "plain")
        given = x if old.in_features == 8 else torch.randn(5, 12)
        with torch.no_grad():
            torch.testing.assert_close(new(given), old(given) + added[name].apply(given))
    assert not [w for w in recwarn if "Unsupported layer" in str(w.message)]


def test_a_new_adapter_is_trained_beside_the_factors(model):
    config = peft.LoraConfig(r=2, target_modules=list(NAMES))
    adapted = peft.get_peft_model(model, config)
    x = torch.randn(5, 8)
    adapted(x).square().sum().backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(grads) == 8
    assert all(grad is not None for grad in grads.values())
    assert all(float(grad.abs().sum()) > 0 for name, grad in grads.items() if "lora_B" in name)


def test_merging_into_factors_is_refused_and_unloading_is_not(model):
    before = model(torch.ones(1, 8))
    added = forms()
    attached = attach_lora(model, lora_config(added, task="logits"), added)
    with pytest.raises(EckartError, match=r"cannot be merged into a FactoredLinear.*eckart export"):
        attached.merge_and_unload()
    assert torch.equal(attached.unload()(torch.ones(1, 8)), before)


def test_smaller_ranks_are_filled_up():
    added = forms(2) | {"plain": forms(1)["plain"]}
    config = lora_config(added, task="causal-lm", base="somewhere")
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (2, 2, "somewhere")
    tensors = lora_tensors(added, config.r)
    A, B = (tensors[f"base_model.model.plain.lora_{which}.weight"] for which in "AB")
    assert A.shape == (2, 8)
    assert B.shape == (8, 2)
    assert not A[1].any()
    assert not B[:, 1].any()
    torch.testing.assert_close(B @ A, added["plain"].dense())


def test_no_repair_is_no_adapter():
    with pytest.raises(InputError, match="at least one map"):
        lora_config({}, task="logits")


def test_other_layers_are_left_to_peft_and_registering_twice_changes_nothing(model):
    register()
    first = peft.tuners.lora.model.dispatch_default
    register()
    assert peft.tuners.lora.model.dispatch_default is first
    adapted = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    assert type(adapted.base_model.model[0]) is peft.tuners.lora.Linear
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), peft.LoraConfig(target_modules=["1"]))


def test_importing_the_repair_first_is_no_circle() -> None:
    """Importing peft registers Eckart's adapters, whatever is being imported at that moment."""
    for code in ("import eckart.hf.lora", "import peft, eckart.hf.lora", "import eckart, peft, eckart.hf.lora"):
        ran = run(code)
        assert ran.returncode == 0, ran.stderr
