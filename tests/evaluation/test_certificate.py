"""Prediction beside measurement, the whole record, and the clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError
from eckart.evaluation import (
    certify,
    evaluate_embeddings,
    finish,
    layer_warnings,
    measure_latency,
)
from eckart.records import Evaluation, Interval, LayerOutcome, Outcome, Site, Size

NOTHING = Size(parameters=0, bytes=0, macs=0)


def layer(name: str, predicted: float, held_out: float | None) -> LayerOutcome:
    return LayerOutcome(
        site=Site(name=name, kind="linear", out_features=4, in_features=4),
        form="lowrank",
        rank=2,
        before=NOTHING,
        after=NOTHING,
        predicted=predicted,
        held_out=held_out,
    )


def outcome(predicted: float | None, *layers: LayerOutcome) -> Outcome:
    return Outcome(
        layers=layers,
        sites_before=NOTHING,
        sites_after=NOTHING,
        model_before=NOTHING,
        model_after=NOTHING,
        predicted_loss=predicted,
        method="kfac",
        budget="keep 0.6",
        seconds=1.0,
    )


def evaluation(task: Any, **figures: float) -> Evaluation:
    return Evaluation(
        task=task,
        metrics={name: Interval(mean=v, low=v - 0.01, high=v + 0.01, n=60) for name, v in figures.items()},
        protocol={},
        model_size=NOTHING,
        base_size=NOTHING,
    )


def test_embeddings_compare_one_minus_cosine() -> None:
    found = certify(outcome(0.05), evaluation("embedding", cosine=0.94))
    assert found is not None
    assert found.measured.mean == pytest.approx(0.06)
    assert found.measured.low < found.measured.mean < found.measured.high
    assert found.ratio == pytest.approx(1.2)
    assert found.warning is None


@pytest.mark.parametrize(("measured", "part"), [(0.21, "2.1 times"), (0.049, "only 0.49 times")])
def test_a_factor_of_more_than_two_is_warned_of(measured: float, part: str) -> None:
    found = certify(outcome(0.1), evaluation("causal-lm", kl=measured, loss_rise=9.0))
    assert found is not None
    assert found.warning is not None
    assert part in found.warning


@pytest.mark.parametrize("measured", [0.051, 0.1, 0.199])
def test_less_is_not(measured: float) -> None:
    found = certify(outcome(0.1), evaluation("causal-lm", kl=measured))
    assert found is not None
    assert found.warning is None


def test_nothing_predicted_and_nothing_measured_agree() -> None:
    found = certify(outcome(0.0), evaluation("masked-lm", kl=0.0))
    assert found is not None
    assert (found.ratio, found.warning) == (1.0, None)


def test_a_change_that_nobody_predicted() -> None:
    found = certify(outcome(0.0), evaluation("logits", kl=0.2))
    assert found is not None
    assert found.ratio == float("inf")
    assert "infinitely" in str(found.warning)


def test_methods_without_loss_units_have_no_certificate() -> None:
    assert certify(outcome(None), evaluation("embedding", cosine=0.9)) is None


def test_a_missing_figure_is_named() -> None:
    with pytest.raises(InputError, match="needs the figure 'kl'"):
        certify(outcome(0.1), evaluation("causal-lm", loss=1.0))


def test_layers_that_do_not_hold_out_are_listed_worst_first() -> None:
    found = layer_warnings(
        outcome(
            0.1,
            layer("fine", 0.1, 0.19),
            layer("bad", 0.1, 0.3),
            layer("worse", 0.01, 0.2),
            layer("?", 1, None),
        )
    )
    assert [one.site for one in found] == ["worse", "bad"]
    assert "0.3 on held-out" in found[1].text


def test_prediction_of_the_squared_distance_is_one_minus_cosine() -> None:
    """½‖Δe‖² of unit vectors, which the Gauss-Newton loss predicts, is what the certificate compares."""
    A = nn.functional.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).double())
    B = nn.functional.normalize(A + 0.1 * torch.randn(60, 8, generator=torch.Generator().manual_seed(1)))
    predicted = 0.5 * float((A - B).square().sum(1).mean())
    measured = evaluate_embeddings(B, A)
    found = certify(outcome(predicted), replace(evaluation("embedding"), metrics=measured.metrics))
    assert found is not None
    assert found.ratio == pytest.approx(1, abs=1e-9)


def forward(model: nn.Module) -> Any:
    return lambda batch: model(batch)


def full_evaluation(folder: Path) -> Evaluation:
    (folder / "a.safetensors").write_bytes(b"12345")
    (folder / "config.json").write_text("{}")
    base, model = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 2, bias=False), nn.Linear(2, 16))
    E = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    return finish(
        "embedding",
        evaluate_embeddings(E, E),
        model,
        base,
        latency=measure_latency(forward(model), forward(base), lambda rows, _: torch.zeros(rows, 16), rounds=3),
        base_folder=folder,
        protocol={"data": "x.txt", "seed": 7},
    )


def test_the_whole_record(tmp_path: Path) -> None:
    found = full_evaluation(tmp_path)
    assert found.model_size.parameters == 16 * 2 + 2 * 16 + 16
    assert found.base_size.macs == 256
    assert found.disk_bytes == {"base": 5}
    assert found.protocol["data"] == "x.txt"
    assert [one.batch for one in found.latency] == [1, 32]
    assert found.latency[0].speedup == found.latency[0].base / found.latency[0].model


def test_latency_takes_turns_and_leaves_the_threads() -> None:
    calls: list[str] = []

    def one(name: str) -> Any:
        def run(batch: Tensor) -> Tensor:
            calls.append(f"{name}{len(batch)}")
            return batch

        return run

    threads = torch.get_num_threads()
    found = measure_latency(one("m"), one("b"), lambda rows, n: torch.zeros(rows, n), rounds=4, warm_up=1)
    assert calls[:10] == ["m1", "b1", "m1", "b1", "b1", "m1", "m1", "b1", "b1", "m1"]
    assert [(x.batch, x.length) for x in found] == [(1, 64), (32, 64)]
    assert torch.get_num_threads() == threads


def test_too_few_rounds_for_a_median() -> None:
    with pytest.raises(InputError, match="at least 3"):
        measure_latency(forward(nn.Identity()), forward(nn.Identity()), lambda r, n: torch.zeros(r), rounds=2)
