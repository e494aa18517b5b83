"""A schedule in the Trainer: exact zeros at the end, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factored_tiny_models import llama
from transformers import Trainer, TrainingArguments

from eckart.hf.prune_callback import PruneCallback
from eckart.prune import Regrow, Schedule

DATA = [
    {"input_ids": row, "labels": row.clone()}
    for row in torch.randint(0, 61, (40, 8), generator=torch.Generator().manual_seed(0))
]
OPTIONS = {
    "zero": {"selector": "magnitude", "interval": 1},
    "regrow": {"selector": "magnitude", "action": Regrow(0.5), "interval": 1},
}


def trained(folder: Path, name: str, resume: Path | None = None) -> tuple[Trainer, Schedule]:
    torch.manual_seed(0)
    model = llama()
    engine = Schedule(model, keep=0.25, steps=6, end=5, **OPTIONS[name])
    callback = PruneCallback(engine)
    if resume is not None:
        callback.resume(resume)
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=3,
        learning_rate=0.01,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=DATA, callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, engine


@pytest.mark.parametrize("name", OPTIONS)
def test_prunes_saves_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    trainer, engine = trained(tmp_path / "one", name)
    assert (engine.steps, engine.done) == (6, True)
    assert engine.report().density <= 0.25
    assert engine.masks.leaks(trainer.model) == {}
    again, resumed = trained(tmp_path / "two", name, tmp_path / "one" / "checkpoint-3")
    assert resumed.masks.same(engine.masks)
    for (key, one), other in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), key
    trainer.save_model(str(tmp_path / "saved"))
    loaded = type(trainer.model).from_pretrained(tmp_path / "saved")
    assert engine.masks.leaks(loaded) == {}
