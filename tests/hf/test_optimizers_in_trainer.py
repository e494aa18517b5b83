"""Eckart's optimizers in the Trainer: routed, scheduled, saved and resumed bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from factored_tiny_models import llama
from torch import nn
from transformers import Trainer, TrainingArguments

from eckart.optim import for_trainer, param_groups

DATA = [
    {"input_ids": row, "labels": row.clone()}
    for row in torch.randint(0, 61, (40, 8), generator=torch.Generator().manual_seed(0))
]
OPTIONS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 4},
    "dct-adamw": {"rank": 4},
    "muon": {},
}


def trainer_of(folder: Path, name: str, *, routed: bool, **extra: Any) -> Trainer:
    torch.manual_seed(0)
    model = llama()
    chosen = for_trainer(name, model=model if routed else None, lr=0.01, weight_decay=0.1, **OPTIONS[name])
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        learning_rate=7.0,  # not read
        weight_decay=0.3,
        lr_scheduler_type="linear",
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **extra,
    )
    return Trainer(model, arguments, train_dataset=DATA, optimizer_cls_and_kwargs=chosen)


@pytest.mark.parametrize(("name", "routed"), [("galore", False), ("dct-adamw", True), ("muon", True)])
def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path, name: str, routed: bool) -> None:
    whole = trainer_of(tmp_path, name, routed=routed)
    whole.train()
    again = trainer_of(tmp_path, name, routed=routed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (key, mine), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(mine, other), key
    assert whole.state.global_step == 4


def test_the_trainer_trains_what_a_plain_loop_trains(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "muon", routed=True, max_grad_norm=0.0, save_strategy="no")
    loop: nn.Module = copy.deepcopy(trainer.model).train()
    batches = list(trainer.get_train_dataloader())[:4]
    trainer.train()
    cls, options = for_trainer("muon", lr=0.01, weight_decay=0.1)
    optimizer = cls(param_groups(loop, weight_decay=0.1), **options)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - step / 4)
        optimizer.zero_grad()
        loop(**batch).loss.backward()
        optimizer.step()
    for p, q in zip(trainer.model.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_learning_rate_is_that_of_the_options(tmp_path: Path) -> None:
    """And without a model the Trainer's two groups come with its own weight decay."""
    for routed, decays in ((True, {0.1, 0.0}), (False, {0.3, 0.0})):
        optimizer = trainer_of(tmp_path, "muon", routed=routed).create_optimizer()
        assert {group["lr"] for group in optimizer.param_groups} == {0.01}
        assert {group["weight_decay"] for group in optimizer.param_groups} == decays
