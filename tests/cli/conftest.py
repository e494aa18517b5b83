"""The command run in this process, and stand-ins for the verbs that record what they were asked."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_stand_ins import EVALUATION, METHODS, OUTCOME, PREVIEW, FakeMoments, FakePlan, Ran, Verbs

import eckart
from eckart.cli import main
from eckart.records import Verdict


@pytest.fixture
def run(monkeypatch):
    """``run("compress", "m", …)`` gives exit code, stdout and stderr."""

    def command(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["eckart", *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as leave:
                code = leave.code or 0
        return Ran(code, out.getvalue(), err.getvalue())

    monkeypatch.setenv("COLUMNS", "110")
    return command


@pytest.fixture
def verbs(monkeypatch) -> Verbs:
    """Stand-ins for every verb of the package."""
    told = Verbs()

    def stand_in(verb: str, result: Any) -> None:
        def fake(*args: Any, **keywords: Any) -> Any:
            told.call(verb, args, keywords)
            return result(*args, **keywords) if callable(result) else result

        monkeypatch.setitem(vars(eckart), verb, fake)

    def written(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"12345")
        return folder

    def verdicts(names: tuple[str, ...] = ()) -> Any:
        for held, entry in zip(told.verdicts, METHODS, strict=True):
            yield entry, Verdict(held, {"gap": 0.1}, "a note"), 0.2

    stand_in("calibrate", FakeMoments("moments"))
    stand_in("plan", FakePlan("plan"))
    stand_in("compress", SimpleNamespace(outcome=OUTCOME, plan=FakePlan("plan")))
    stand_in("save", lambda compressed, folder, **_: written(folder))
    stand_in("preview", SimpleNamespace(to_json=lambda: PREVIEW))
    stand_in("evaluate", EVALUATION)
    stand_in("export", lambda directory, to, folder, **_: written(folder))
    stand_in("claims", verdicts)
    result = {"outcome": OUTCOME, "evaluation": EVALUATION, "seconds": 2.0}
    stand_in("demo", lambda folder, **_: SimpleNamespace(folder=folder, report=folder / "report.html", **result))
    monkeypatch.setitem(vars(eckart), "methods", lambda kind=None: METHODS if kind in (None, "factors") else ())
    return told
