"""Training-time methods in the Trainer of transformers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eckart.errors import FileError, InputError
from eckart.prune import Schedule
from eckart.training import Maestro, TrainedRankPruning

STATE_FILE = "eckart_training.safetensors"
"""What the engine needs for an exact resume, in every checkpoint folder of the Trainer."""


class RankCallback(TrainerCallback):  # type: ignore[misc]
    """Lets the Trainer train with :class:`~eckart.training.TrainedRankPruning` or :class:`~eckart.training.Maestro`.

    ::

        trp = TrainedRankPruning(model)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[RankCallback(trp)])
        trainer.train()
        outcome = trp.finish()

    With Maestro every forward pass in training mode is followed by one with a map cut, and the losses are added, so the
    Trainer logs their sum. It needs a model that computes its own loss: with label smoothing or a loss
    function of your own the Trainer takes the labels away, and the callback raises InputError.

    To resume, build the same model and engine, call :meth:`resume` with the checkpoint folder, and then
    ``trainer.train(resume_from_checkpoint=folder)``.
    """

    def __init__(self, engine: TrainedRankPruning | Maestro | Schedule) -> None:
        self.engine = engine
        self._hook: Any = None
        self._nested = False

    def resume(self, folder: str | os.PathLike[str]) -> None:
        """Takes up the engine's state from a checkpoint of the Trainer, before ``train`` is called.

        Raises FileError where there is none, MismatchError where it is of another model.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise FileError(f"there is no {STATE_FILE} in {folder}. Give a checkpoint saved with RankCallback.")
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FileError(f"{path} is damaged or cut short ({error}). Resume from another checkpoint.") from error
        whole = {key for key, value in state.items() if value.ndim == 0 and not value.is_floating_point()}
        self.engine.load_state_dict({k: int(v) if k in whole else v for k, v in state.items()})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()
        optimizer = kwargs["optimizer"]
        self.engine.attach(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
        if isinstance(self.engine, Maestro):
            self._hook = self.engine.model.register_forward_hook(self._add_cut_pass, with_kwargs=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._let_go()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        tensors = {k: torch.as_tensor(v).cpu().contiguous() for k, v in self.engine.state_dict().items()}
        beside = folder / f".{STATE_FILE}.{secrets.token_hex(4)}.tmp"
        try:
            save_file(tensors, beside)
            beside.replace(folder / STATE_FILE)
        except (OSError, SafetensorError) as error:
            raise FileError(f"{folder / STATE_FILE} could not be written: {error}.") from error
        finally:
            beside.unlink(missing_ok=True)

    def _let_go(self) -> None:
        self.engine.detach()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _add_cut_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        if self._nested or not module.training or not torch.is_grad_enabled() or not isinstance(self.engine, Maestro):
            return output
        loss = getattr(output, "loss", None)
        if loss is None:
            raise InputError(
                "Maestro in the Trainer needs a model that returns its loss; this one returned none. Switch label "
                "smoothing and compute_loss_func off, or write a compute_loss with maestro.loss(…)."
            )
        self._nested = True
        try:
            with self.engine.sampled():
                output["loss"] = loss + module(*args, **kwargs).loss
        finally:
            self._nested = False
        return output
