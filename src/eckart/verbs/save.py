"""``eckart.save``: the folder of a compressed model."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from eckart.apply.crew import wait
from eckart.checkpoint import atomic_folder
from eckart.hf.native import settle_native
from eckart.hf.registry import prepare_for_saving
from eckart.hf.sentence import copy_sentence_files
from eckart.moments.distributed import join
from eckart.records import Evaluation
from eckart.verbs.compress import Compressed
from eckart.verbs.papers import write_papers


def save(
    compressed: Compressed,
    directory: str | os.PathLike[str],
    *,
    evaluation: Evaluation | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    command: str = "",
    title: str = "",
) -> Path:
    """Write weights, config, tokenizer, ``eckart.json``, a model card and ``report.html`` into a folder.

    The folder appears whole or not at all: it is written beside its place and swapped in. It loads with
    ``import eckart`` and plain ``AutoModel.from_pretrained``. Where several processes compressed together, call this
    in each: one writes, the others return when it has; ``compressed.queue.written`` says who. Raises FileError where
    the folder exists (without ``overwrite``), cannot be written, or the disk fills up.
    """
    path = Path(directory)
    if compressed.queue is not None:
        with compressed.queue.output(path) as mine:
            if mine:
                _write(compressed, path, evaluation, overwrite, max_shard_size, command, title)
    else:
        if join()[0] == 0:
            _write(compressed, path, evaluation, overwrite, max_shard_size, command, title)
        wait(f"write {path}")
    return path


def _write(
    compressed: Compressed,
    path: Path,
    evaluation: Evaluation | None,
    overwrite: bool,
    max_shard_size: str,
    command: str,
    title: str,
) -> None:
    settle_native(compressed.model)  # evenly narrower MLPs need no Eckart to load
    entries = prepare_for_saving(compressed.model)
    base = compressed.loaded.name
    with atomic_folder(path, overwrite=overwrite, needed=compressed.outcome.model_after.bytes) as folder:
        compressed.model.save_pretrained(folder, max_shard_size=max_shard_size)
        if compressed.tokenizer is not None:
            compressed.tokenizer.save_pretrained(folder)
        copy_sentence_files(base, folder)
        write_papers(
            folder,
            base=base,
            fingerprint=compressed.base_fingerprint,
            plan=compressed.plan,
            outcome=compressed.outcome,
            curves=compressed.curves,
            calibration=compressed.calibration,
            entries=entries,
            command=command or "eckart.compress(…) in Python",
            evaluation=evaluation,
            title=title,
            made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
