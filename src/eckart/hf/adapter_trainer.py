"""Adapters in the Trainer of transformers: rows of tokens, training with checkpoints, and the loss on held-out rows."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eckart.data.examples import Examples
from eckart.errors import InputError, NotFiniteError
from eckart.hf.adapter_files import WEIGHTS
from eckart.hf.adapters.tuner import after_step, penalty
from eckart.hf.models import LoadedModel, first_parameter
from eckart.records import Progress

Row = Mapping[str, Any]
"""``input_ids`` and ``labels``: ids of equal length, or one class."""

IGNORED = -100
STATE = "trainer_state.json"
"""The last file that the Trainer writes into a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Examples as tokens."""

    rows: tuple[Row, ...]
    cut: int = 0
    """Examples that were cut to the length."""
    dropped: int = 0
    """Examples with nothing left to learn, such as a prompt that fills the whole length."""


def tokenise(loaded: LoadedModel, examples: Examples, length: int) -> Rows:
    """Rows of at most ``length`` tokens. A running text becomes windows of exactly that; its last, shorter one is kept
    where there is no other.

    Raises InputError for a model without tokenizer, and where no row is left.
    """
    tokenizer: Any = loaded.tokenizer
    if tokenizer is None:
        raise InputError(f"{loaded.name} has no tokenizer, so it cannot read texts.")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows: list[Row] = []
    cut = dropped = 0
    if examples.kind == "running":
        ids = tokenizer(examples.rows[0][0], verbose=False)["input_ids"]
        whole = max(len(ids) // length * length, 1)
        rows = [{"input_ids": ids[i : i + length], "labels": ids[i : i + length]} for i in range(0, whole, length)]
    labels = {label: i for i, label in enumerate(examples.labels)}
    for first, second in examples.rows if examples.kind != "running" else ():
        ids = tokenizer(first, verbose=False)["input_ids"]
        if examples.kind == "label":
            if len(ids) > length:
                ids = tokenizer(first, truncation=True, max_length=length)["input_ids"]
                cut += 1
            rows.append({"input_ids": ids, "labels": labels[second]})
            continue
        known = 0
        if examples.kind == "completion":
            ids = ids[:-1] if ids and end and ids[-1] == end[0] else ids
            known = len(ids)
            ids = ids + tokenizer(second, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids if ids and end and ids[-1] == end[0] else ids + end
        cut += len(ids) > length
        ids = ids[:length]
        if len(ids) <= max(known, 1):
            dropped += 1
            continue
        rows.append({"input_ids": ids, "labels": [IGNORED] * known + ids[known:]})
    if not rows or (examples.kind == "running" and len(rows[0]["input_ids"]) < 2):
        raise InputError(f"{examples.name}: no example has anything to learn within {length} tokens. Raise the length.")
    return Rows(rows=tuple(rows), cut=cut, dropped=dropped)


def collate(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """One batch (rows, tokens), padded on the right; classes (rows,)."""
    width = max(len(row["input_ids"]) for row in rows)
    short = [width - len(row["input_ids"]) for row in rows]
    classes = not isinstance(rows[0]["labels"], list)
    labels = [row["labels"] if classes else row["labels"] + [IGNORED] * n for row, n in zip(rows, short, strict=True)]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [pad] * n for row, n in zip(rows, short, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in short]),
        "labels": torch.tensor(labels),
    }


def pad_token(loaded: LoadedModel) -> int:
    """The id that fills up rows; which one does not matter, the mask hides it."""
    found = getattr(loaded.tokenizer, "pad_token_id", None)
    return 0 if found is None else int(found)


@torch.inference_mode()
def row_losses(model: nn.Module, rows: Sequence[Row], pad: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each row (n,), float64: the summed loss in nats, of how many targets, and how many of them were right."""
    training = model.training
    model.eval()
    device = first_parameter(model).device
    sums, counts, right = [], [], []
    for start in range(0, len(rows), batch_size):
        batch = {k: v.to(device) for k, v in collate(rows[start : start + batch_size], pad).items()}
        target = batch.pop("labels")
        logits = model(**batch).logits.float()
        if target.ndim == 2:
            logits, target = logits[:, :-1], target[:, 1:]
        else:
            logits, target = logits[:, None], target[:, None]
        loss = cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=IGNORED)
        counted = target != IGNORED
        sums.append(loss.double().sum(1))
        counts.append(counted.double().sum(1))
        right.append(((logits.argmax(-1) == target) & counted).double().sum(1))
    model.train(training)
    return torch.cat(sums).cpu(), torch.cat(counts).cpu(), torch.cat(right).cpu()


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Adds what the methods of the active adapters add to the loss."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        if model.training:
            loss = loss + penalty(model).to(loss.device)
        return (loss, *found[1:]) if isinstance(found, tuple) else loss


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Tells methods and the user of every step; stops with a checkpoint where Ctrl-C was pressed."""

    def __init__(self, model: nn.Module, progress: Progress) -> None:
        self.model, self.progress = model, progress
        self.interrupted = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if after_step(self.model, state.global_step) and kwargs.get("optimizer") is not None:
            kwargs["optimizer"].state.clear()
        self.progress("train", state.global_step, state.max_steps)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not torch.isfinite(torch.tensor(float(loss))):
            raise NotFiniteError(
                f"the training loss is {loss} at step {state.global_step}; take a lower learning rate."
            )


@contextmanager
def _noting_interrupts(steps: _Steps) -> Iterator[None]:
    """Ctrl-C ends the training after the step, with a checkpoint; the second one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        if steps.interrupted:
            raise KeyboardInterrupt
        steps.interrupted = True

    usual = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def train(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    pad: int,
    steps: int,
    rate: float,
    batch_size: int,
    seed: int,
    work: Path,
    save_every: int,
    on_cpu: bool,
    progress: Progress,
) -> list[dict[str, float]]:
    """Train what ``model`` leaves trainable, from the last whole checkpoint in ``work`` where there is one.

    AdamW without weight decay, gradients clipped to norm 1, the rate rising over a tenth of the steps and falling
    linearly to zero. Returns the losses that were logged, with their steps. Raises KeyboardInterrupt after Ctrl-C, with
    a checkpoint written, and NotFiniteError where the loss is not finite.
    """
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=steps // 10,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        label_names=["labels"],
        use_cpu=on_cpu,
    )
    steps_done = _Steps(model, progress)
    trainer = AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=lambda found: collate(found, pad),
        callbacks=[steps_done],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is the command's own
    last = last_checkpoint(work)
    with _noting_interrupts(steps_done):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if steps_done.interrupted:
        raise KeyboardInterrupt
    history: list[dict[str, float]] = [
        {"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry
    ]
    return history


def last_checkpoint(work: Path) -> Path | None:
    """The checkpoint of the most steps that was written to its end."""
    found = []
    for folder in work.glob("checkpoint-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdigit() and (folder / WEIGHTS).is_file() and (folder / STATE).is_file():
            try:
                json.loads((folder / STATE).read_text(encoding="utf-8"))
            except (ValueError, OSError):
                continue
            found.append((int(number), folder))
    return max(found)[1] if found else None
