"""The callback trains in the Trainer what a plain loop would train, and resumes exactly."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from factored_tiny_models import gpt2, llama, mixtral
from torch import nn
from transformers import Trainer, TrainingArguments

from eckart.errors import FileError, InputError
from eckart.hf.trainer import STATE_FILE, RankCallback
from eckart.layers import FactoredLinear, is_factored
from eckart.training import Maestro, TrainedRankPruning

DATA = [
    {"input_ids": row, "labels": row.clone()}
    for row in torch.randint(0, 61, (40, 8), generator=torch.Generator().manual_seed(0))
]


def arguments(folder: Path, **extra) -> TrainingArguments:
    options = {
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(str(folder), **(options | extra))


def trp_of(model: nn.Module) -> TrainedRankPruning:
    return TrainedRankPruning(model, energy=0.5, period=2, nuclear=0.01)


def maestro_of(model: nn.Module) -> Maestro:
    return Maestro(model, penalty=0.05, threshold=0.3, period=1)


ENGINES = {"trp": trp_of, "maestro": maestro_of}


def trained(folder: Path, make, model: nn.Module | None = None, resume: Path | None = None, **extra):
    torch.manual_seed(0)
    model = llama() if model is None else model
    engine = make(model)
    callback = RankCallback(engine)
    if resume is not None:
        callback.resume(resume)
    trainer = Trainer(model, arguments(folder, **extra), train_dataset=DATA, callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, engine


@pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)
def test_trains_saves_and_resumes_exactly(make, tmp_path: Path) -> None:
    trainer, engine = trained(tmp_path / "one", make)
    assert engine.steps == 6
    ranks = engine.ranks()
    assert any(rank < 16 for rank in ranks.values())
    assert (tmp_path / "one" / "checkpoint-3" / STATE_FILE).is_file()

    again, resumed = trained(tmp_path / "two", make, resume=tmp_path / "one" / "checkpoint-3")
    assert (resumed.steps, resumed.ranks()) == (6, ranks)
    for (name, one), other in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name

    outcome = engine.finish()
    assert any(is_factored(module) for module in trainer.model.modules())
    assert outcome.model_after.parameters < outcome.model_before.parameters
    assert trainer.model(input_ids=DATA[0]["input_ids"][None]).logits.isfinite().all()


def test_trp_is_what_a_plain_loop_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = llama()
    trainer, _ = trained(tmp_path, trp_of, copy.deepcopy(start), max_grad_norm=0.0, optim="sgd")
    # the batches of the Trainer, in its order
    torch.manual_seed(0)
    batches: list[dict] = []
    spy = Trainer(copy.deepcopy(start), arguments(tmp_path, max_grad_norm=0.0, optim="sgd"), train_dataset=DATA)
    spy.compute_loss, inner = (  # type: ignore[method-assign]
        lambda model, inputs, *a, **k: batches.append(dict(inputs)) or inner(model, inputs, *a, **k),
        spy.compute_loss,
    )
    spy.train()

    engine = trp_of(start)
    optimizer = torch.optim.SGD(start.parameters(), lr=0.01)
    engine.attach(optimizer)
    for batch in batches:
        optimizer.zero_grad()
        start(**batch).loss.backward()
        optimizer.step()
    for (name, one), other in zip(trainer.model.named_parameters(), start.named_parameters(), strict=True):
        torch.testing.assert_close(one, other[1], msg=name)


def test_maestro_logs_the_sum_of_both_losses_and_evaluates_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    maestro = Maestro(model, penalty=0.0, threshold=0.0)
    args = arguments(tmp_path, max_steps=1, learning_rate=0.0, save_strategy="no")
    trainer = Trainer(model, args, train_dataset=DATA, eval_dataset=DATA, callbacks=[RankCallback(maestro)])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged > 1.7 * before  # untrained: the cut model's loss is about that of the whole one
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before)
    model.train()
    one = model(input_ids=DATA[0]["input_ids"][None], labels=DATA[0]["labels"][None]).loss
    two = model(input_ids=DATA[0]["input_ids"][None], labels=DATA[0]["labels"][None]).loss
    assert torch.equal(one, two)  # after training the hook is gone


def test_accumulated_steps_count_once(tmp_path: Path) -> None:
    _, engine = trained(tmp_path, maestro_of, gradient_accumulation_steps=2, save_strategy="no", max_steps=3)
    assert engine.steps == 3


@pytest.mark.parametrize("make", [gpt2, mixtral], ids=["gpt2", "mixtral"])
def test_conv1d_and_fused_experts(make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer, engine = trained(tmp_path, trp_of, make(), save_strategy="no")
    ids = DATA[0]["input_ids"][None]
    kinds = {site.kind for site in engine.sites}
    assert ("conv1d" if make is gpt2 else "experts") in kinds
    model = trainer.model.eval()
    expected = model(input_ids=ids).logits
    outcome = engine.finish()  # six steps, two a truncation: the weights are at low rank
    assert {layer.form for layer in outcome.layers if layer.site.kind in kinds - {"linear"}} == {"lowrank"}
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_maestro_needs_the_models_own_loss(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label"):
        trained(tmp_path, maestro_of, label_smoothing_factor=0.1, save_strategy="no")


def test_a_checkpoint_without_state_is_named(tmp_path: Path) -> None:
    callback = RankCallback(trp_of(llama()))
    with pytest.raises(FileError, match=STATE_FILE):
        callback.resume(tmp_path)
    (tmp_path / STATE_FILE).write_bytes(b"cut short")
    with pytest.raises(FileError, match="damaged"):
        callback.resume(tmp_path)


def test_maestro_puts_factors_into_the_model() -> None:
    model = llama()
    Maestro(model)
    assert isinstance(model.model.layers[0].mlp.down_proj, FactoredLinear)
