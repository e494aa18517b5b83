"""Findings in the Trainer of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from eckart.hf.finding_callback import FindingCallback
from eckart.inspection import FindingLogger


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.map(x) - labels).square().mean()}


def test_measures_at_the_start_and_every_so_many_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Regression()
    data = [{"x": torch.randn(8), "labels": torch.randn(8)} for _ in range(24)]
    logger = FindingLogger(model, ("stable_rank",), every=2, file=tmp_path / "f.jsonl")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[FindingCallback(logger)]).train()
    lines = [json.loads(line) for line in (tmp_path / "f.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert len({line["value"] for line in lines}) == 4
