"""Pruning in the Trainer of transformers."""

from __future__ import annotations

from eckart.hf.trainer import RankCallback
from eckart.prune import Schedule


class PruneCallback(RankCallback):
    """Lets the Trainer train with a :class:`~eckart.prune.Schedule`, and saves its state in every checkpoint.

    ::

        engine = Schedule(model, selector="global-mp", keep=0.1, steps=2000)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[PruneCallback(engine)])
        trainer.train()
        report = engine.finish()
        engine.masks.save(folder / "masks.safetensors", model)

    ``steps`` are optimizer steps: ``max_steps`` of the arguments. To resume, build the same model and engine, call
    :meth:`resume` with the checkpoint folder, and then ``trainer.train(resume_from_checkpoint=folder)``.
    """

    def __init__(self, engine: Schedule) -> None:
        super().__init__(engine)
