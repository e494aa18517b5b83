"""Findings in a training loop: at the right steps, in the right form, without a trace in the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import FileError, InputError
from eckart.inspection import FindingLogger
from eckart.records import Finding
from eckart.spectra import farms, spectrum


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 10))


class Scalars:
    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.seen.append((tag, scalar_value, global_step))


def test_lines_are_those_of_the_weights_at_their_steps(tmp_path: Path) -> None:
    model = net()
    logger = FindingLogger(model, every=3, file=tmp_path / "f.jsonl")
    assert "1-D" in logger.skipped["0.bias"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for step in range(7):
        if step % 3 == 0:
            for name in ("0.weight", "3.weight"):
                W = model.get_parameter(name)
                expected.append((step, name, "stable_rank", spectrum(W)["stable_rank"].value))
                expected.append((step, name, "distance_from_noise", farms(W)["distance_from_noise"].value))
        assert logger.step() is (step % 3 == 0)
        optimizer.zero_grad()
        torch.autograd.backward(model(torch.randn(8, 12)).square().mean())
        optimizer.step()
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [(x["step"], x["weight"], x["name"], x["value"]) for x in lines] == expected
    assert all("uncertainty" in x and "details" not in x for x in lines)
    FindingLogger(model, every=1, file=tmp_path / "f.jsonl").step(7)
    assert len((tmp_path / "f.jsonl").read_text().splitlines()) == len(lines) + 4


def test_writers_get_scalars_and_functions_are_called() -> None:
    writer = Scalars()

    def largest(W: Tensor) -> Finding:
        return Finding(name="largest", value=float(W.abs().max()))

    model = net()
    FindingLogger(model, ("alpha_ks", "dead_rows", largest), every=5, file=writer, exclude=["3"]).step(10)
    # A weight of 12 singular values has no tail to fit, so that it gives no scalar.
    assert [(tag, step) for tag, _, step in writer.seen] == [("dead_rows/0.weight", 10), ("largest/0.weight", 10)]
    assert writer.seen[1][1] == float(model[0].weight.detach().abs().max())


def test_training_is_not_disturbed(tmp_path: Path) -> None:
    results = []
    for logged in (False, True):
        model = net()
        logger = FindingLogger(model, ("spikes", "alpha_farms", "duplicate_rows"), every=1, file=tmp_path / "x.jsonl")
        torch.manual_seed(1)
        for _ in range(3):
            loss = model(torch.randn(8, 12)).square().mean()
            torch.autograd.backward(loss)
            if logged:
                logger.step()
        results.append((loss.item(), model[0].weight.grad.clone()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 problems") as error:
        FindingLogger(nn.LayerNorm(4), ("stable_rnk",), every=0, file=tmp_path / "x.jsonl")
    assert "stable_rank" in str(error.value)
    assert not (tmp_path / "x.jsonl").exists()
    with pytest.raises(FileError, match="cannot be written"):
        FindingLogger(net(), file=tmp_path)
