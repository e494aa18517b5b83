"""Who hears what: results on stdout, all else on stderr, and only the first of many processes speaks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from eckart.errors import EckartWarning
from eckart.records import Progress, as_plain, silent

PLAIN_WIDTH = 110
"""Columns of a result that goes into a file or a pipe."""


class Interrupted(Exception):
    """Ctrl-C, with the sentence on what stands."""


@dataclass(frozen=True)
class Terminal:
    """What one call of the command says, and where."""

    json: bool = False
    quiet: bool = False

    @property
    def leading(self) -> bool:
        """Whether this process prints and writes: always, except for the others under ``torchrun``."""
        return os.environ.get("RANK", "0") == "0"

    def note(self, text: str) -> None:
        """A line on stderr, unless quiet."""
        if self.leading and not self.quiet:
            Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)

    def result(self, payload: Mapping[str, Any], draw: Callable[[Console], None]) -> None:
        """The result on stdout: ``payload`` under ``--json``, else what ``draw`` prints."""
        if not self.leading:
            return
        if self.json:
            print(json.dumps(as_plain(payload), indent=2, allow_nan=False, ensure_ascii=False))
        else:
            draw(self.console())

    def console(self) -> Console:
        """Where results are drawn: as wide as the terminal, else ``COLUMNS`` or ``PLAIN_WIDTH``."""
        fixed = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
        return Console(width=fixed, highlight=False)

    @contextlib.contextmanager
    def working(self, output: Path | None = None) -> Iterator[Progress]:
        """Long work: gives the progress to report to, keeps stdout for the result, explains Ctrl-C.

        Raises Interrupted, which says how ``output`` stands, where the work is interrupted.
        """
        before = _identity(output)
        try:
            with contextlib.redirect_stdout(sys.stderr), self._progress() as progress:
                yield progress
        except KeyboardInterrupt as error:
            raise Interrupted(_standing(output, before)) from error

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Progress]:
        console = Console(stderr=True)
        if self.quiet or not self.leading or not console.is_terminal:
            # Read when transformers is imported, which happens inside of the work: its bars follow ours.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            yield silent
            return
        bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            redirect_stdout=False,
        )
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        with bars:
            yield progress


def _identity(path: Path | None) -> tuple[int, int] | None:
    """Inode and time of change of ``path``; None where it does not exist. Outputs are swapped in whole."""
    try:
        state = path.stat() if path is not None else None
    except OSError:
        return None
    return None if state is None else (state.st_ino, state.st_mtime_ns)


def _standing(output: Path | None, before: tuple[int, int] | None) -> str:
    if output is None:
        return "Interrupted. Nothing was written."
    now = _identity(output)
    if now is None:
        return f"Interrupted. {output} was not written."
    if now == before:
        return f"Interrupted. {output} is as it was before."
    return f"Interrupted. {output} is new and whole."


_CHATTER = ("torchao", "torch.utils._pytree")
"""Loggers that warn, while transformers imports torchao, of kernels for GPUs that are not there."""


def show_warnings() -> None:
    """Print Eckart's own warnings as one plain line each on stderr; others as Python does."""
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    usual = warnings.showwarning
    leading = Terminal().leading

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, EckartWarning):
            usual(message, category, *where, **more)
        elif leading:
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
    warnings.simplefilter("always", EckartWarning)
    # PEFT asks transformers for something by its old name, which is nothing that a user can change.
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
