"""Findings of weights in the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eckart.inspection import FindingLogger


class FindingCallback(TrainerCallback):  # type: ignore[misc]
    """Lets the Trainer log what a :class:`~eckart.inspection.FindingLogger` measures, every ``every`` steps.

    ::

        logger = FindingLogger(model, every=500, file="findings.jsonl")
        trainer = Trainer(model, args, train_dataset=data, callbacks=[FindingCallback(logger)])

    The first process measures, before the first step and then after every ``every``-th one. A resumed run goes on
    adding to the file.
    """

    def __init__(self, logger: FindingLogger) -> None:
        self.logger = logger

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and state.global_step == 0:
            self.logger.step(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.logger.step(state.global_step)
