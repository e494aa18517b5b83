"""Narrower models through ``eckart.compress``, ``eckart.save`` and plain from_pretrained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from factored_tiny_models import build, inputs, output
from safetensors.torch import load_file
from torch import Tensor, nn

import eckart
from eckart.arch import find_sites, find_units, model_size
from eckart.errors import BudgetError, InputError
from eckart.layers import is_factored, is_narrowed
from eckart.records import Budget
from fresh_python import TRANSFORMERS, run

FAMILIES = ("llama", "gpt2", "bert", "t5", "vit")
WAYS: dict[str, dict[str, Any]] = {
    "modules": {"method": "modules", "keep": 0.6},
    "mixed": {"keep": 0.6},
    "bits": {"keep": 0.9, "bits": (8, 4)},
}


def data(model: nn.Module) -> list[dict[str, Tensor]]:
    return [inputs(model)]


def compressed(name: str, **options: Any) -> eckart.Compressed:
    model = build(name)
    return eckart.compress(model, data=data(model), **{"probe_rounds": 0, "certify": False, **options})


def load(model: nn.Module, path: Path) -> nn.Module:
    loaded, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return loaded.eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_compress_save_load(name: str, way: str, tmp_path: Path) -> None:
    made = compressed(name, **WAYS[way])
    totals = made.plan.totals
    assert totals is not None
    assert made.outcome.sites_after == totals.sites_after  # bytes too, scales, zeros and indices included
    assert made.outcome.model_after.bytes <= totals.model_after.bytes  # less, where biases go with their rows
    if way != "bits":
        assert made.outcome.sites_after.parameters <= round(0.6 * made.outcome.sites_before.parameters)
    if way == "modules":
        assert any(step.form == "narrow" for step in made.plan.steps)
    assert model_size(made.model) == made.outcome.model_after
    expected = output(made.model)
    eckart.save(made, tmp_path / "small")
    loaded = load(made.model, tmp_path / "small")
    assert torch.equal(output(loaded), expected)
    assert model_size(loaded) == model_size(made.model)
    if any(is_factored(m) or is_narrowed(m) for m in loaded.modules()):
        loaded.dequantize()
        assert not any(is_factored(m) or is_narrowed(m) for m in loaded.modules())
        shapes = [tuple(p.shape) for n, p in build(name).named_parameters() if n.endswith("weight")]
        assert [tuple(p.shape) for n, p in loaded.named_parameters() if n.endswith("weight")] == shapes
        torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.15, 0.2, 0.3])
def test_the_bytes_of_a_plan_are_those_of_the_file(share: float, tmp_path: Path) -> None:
    model = build("llama")
    whole, maps = model_size(model).bytes, 4 * sum(site.weight_parameters for site in find_sites(model))
    budget = Budget(bytes=whole - maps + int(share * maps))
    made = compressed("llama", method="modules", budget=budget, bits=(8, 4))
    assert made.plan.totals is not None
    assert any(step.bits and step.form == "narrow" for step in made.plan.steps)
    assert made.plan.totals.model_after.bytes == made.outcome.model_after.bytes <= whole - maps + int(share * maps)
    eckart.save(made, tmp_path / "small")
    files = [load_file(path) for path in (tmp_path / "small").glob("*.safetensors")]
    assert sum(tensor.nbytes for file in files for tensor in file.values()) == made.outcome.model_after.bytes


def test_without_eckart_a_narrow_folder_fails_loudly(tmp_path: Path) -> None:
    eckart.save(compressed("bert", **WAYS["modules"]), tmp_path / "small")
    script = f"import transformers; transformers.AutoModelForMaskedLM.from_pretrained({str(tmp_path / 'small')!r})"
    ran = run(script, loaded=TRANSFORMERS)
    assert ran.returncode != 0
    assert "eckart" in ran.stderr


def test_equal_shares_give_all_mlps_one_width() -> None:
    made = compressed("llama", method="modules", keep=0.7, allocation="uniform")
    assert {step.form for step in made.plan.steps if "#" in step.site} == {"narrow"}
    widths = {mlp.width for mlp in find_units(made.model).mlps}
    assert len(widths) == 1
    assert widths.pop() < 24
    assert made.outcome.sites_after.parameters <= round(0.7 * made.outcome.sites_before.parameters)


def test_an_edited_plan_is_carried_out() -> None:
    made = compressed("llama", **WAYS["modules"])
    steps = [dataclasses.replace(step, rank=7) if step.site.endswith("#neurons") else step for step in made.plan.steps]
    plan = dataclasses.replace(made.plan, steps=tuple(steps))
    model = build("llama")
    again = eckart.compress(model, data=data(model), plan=plan, certify=False)
    named = {step.site.removesuffix("#neurons") for step in steps if step.site.endswith("#neurons")}
    assert named
    assert {m.name: m.width for m in find_units(again.model).mlps if m.name in named} == dict.fromkeys(named, 7)
    with pytest.raises(InputError, match="needs moments"):
        eckart.compress(build("llama"), plan=plan)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_what_cannot_be_is_refused_before_the_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr("eckart.verbs.compress.calibrate_sites", never)
    with pytest.raises(InputError, match="method 'modules' makes MLPs and attentions narrower"):
        eckart.compress(Plain(), data=[torch.ones(4, 6)], method="modules", keep=0.6)
    for way in WAYS.values():
        with pytest.raises(BudgetError, match="cannot be met"):
            compressed("llama", **{**way, "keep": 0.001})
    with pytest.raises(InputError, match="bits are chosen under one global budget"):
        compressed("llama", method="whitened", keep=0.6, bits=(8,))
    with pytest.raises(InputError, match="bits lists some of"):
        compressed("llama", keep=0.6, bits=(3,))
    with pytest.raises(InputError, match="probes measure on the calibration data"):
        eckart.compress(build("llama"), keep=0.6, probe_rounds=1)
    with pytest.raises(InputError, match="units of the loss"):
        compressed("llama", method="modegpt", keep=0.6, allocation="global")


def test_a_budget_in_bytes_chooses_bits() -> None:
    model = build("llama")
    budget = Budget(bytes=model_size(model).bytes // 2)
    made = eckart.compress(model, data=data(model), budget=budget, probe_rounds=0, certify=False)
    assert any(step.bits for step in made.plan.steps)
    assert made.outcome.model_after.bytes <= budget.bytes


def test_probes_are_part_of_a_plain_call() -> None:
    model = build("bert")
    made = eckart.compress(model, data=data(model), keep=0.6, certify=False)
    assert isinstance(model, tf.BertForMaskedLM)
    assert made.outcome.predicted_loss is not None
    assert made.outcome.predicted_loss >= 0
