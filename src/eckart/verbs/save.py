"""``eckart.save``: the folder of a compressed model."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
from pathlib import Path

from eckart.checkpoint import Manifest, atomic_folder
from eckart.evaluation import certify
from eckart.hf.registry import prepare_for_saving
from eckart.hf.sentence import copy_sentence_files
from eckart.records import Evaluation
from eckart.report import (
    evaluation_to_json,
    model_card,
    outcome_to_json,
    render_report,
    sample_curve,
)
from eckart.verbs.compress import Compressed

CURVE_POINTS = 48
"""Points of an error curve in the report."""


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
    ``import eckart`` and plain ``AutoModel.from_pretrained``. Raises FileError where the folder exists (without
    ``overwrite``), cannot be written, or the disk fills up.
    """
    path = Path(directory)
    entries = prepare_for_saving(compressed.model)
    base = compressed.loaded.name
    title = title or Path(base).name
    command = command or "eckart.compress(…) in Python"
    outcome, plan = compressed.outcome, compressed.plan
    manifest = Manifest(
        version=importlib.metadata.version("eckart"),
        base=base,
        fingerprint=compressed.base_fingerprint,
        command=command,
        modules=entries,
        plan=plan.to_json(),
        outcome=outcome_to_json(outcome),
        evaluation=None if evaluation is None else evaluation_to_json(evaluation),
        calibration=dict(compressed.calibration),
    )
    certificate = None if evaluation is None else certify(outcome, evaluation)
    page = render_report(
        outcome,
        plan_json=plan.dumps(),
        evaluation=evaluation,
        certificate=certificate,
        curves={name: sample_curve(curve, CURVE_POINTS) for name, curve in compressed.curves.items()},
        title=title,
        command=command,
        meta={
            "original": Path(base).name,
            "fingerprint": compressed.base_fingerprint[:16],
            "calibrated on": str(compressed.calibration.get("data", "nothing")),
            "Eckart": importlib.metadata.version("eckart"),
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
    )
    card = model_card(outcome, evaluation, base_name=base, title=title, command=command)
    needed = outcome.model_after.bytes
    with atomic_folder(path, overwrite=overwrite, needed=needed) as folder:
        compressed.model.save_pretrained(folder, max_shard_size=max_shard_size)
        if compressed.tokenizer is not None:
            compressed.tokenizer.save_pretrained(folder)
        copy_sentence_files(base, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "report.html").write_text(page, encoding="utf-8")
        manifest.write(folder)
    return path
