"""The Pythons that tests get are as new ones: nothing of Eckart's is in them, and they end as Python does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fresh_python import RUN_MODULE, TRANSFORMERS, Fresh, run

STATE = """
import json, os, sys, threading
loaded = {name.partition(".")[0] for name in sys.modules}
hooks = [type(hook).__module__ for hook in sys.meta_path]
print(json.dumps({
    "names": sorted(name for name in globals() if not name.startswith("__")),
    "loaded": sorted(loaded & {"eckart", "transformers", "peft", "accelerate", "huggingface_hub", "fresh_python"}),
    "hooked": any(hook.startswith("eckart") for hook in hooks),
    "threads": threading.active_count(),
    "argv": sys.argv,
    "path": sys.path[:2],
    "folder": os.getcwd(),
    "word": os.environ.get("WORD"),
    "own": __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals(),
}))
"""


def test_nothing_was_imported_that_is_tested(tmp_path: Path) -> None:
    assert run("import eckart, eckart.hf.registry, peft").returncode == 0  # nothing of it stays for the next
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "WORD": "a"}
    state = json.loads(run(STATE, "a b", 3, env=env, cwd=tmp_path).stdout)
    assert state == {
        "names": ["hooks", "json", "loaded", "os", "sys", "threading"],
        "loaded": [],
        "hooked": False,
        "threads": 1,
        "argv": ["-c", "a b", "3"],
        "path": ["", str(tmp_path)],
        "folder": str(tmp_path),
        "word": "a",
        "own": True,
    }
    state = json.loads(run(STATE, loaded=TRANSFORMERS).stdout)
    assert not {"eckart", "peft", "fresh_python"} & {*state["loaded"]}
    assert (state["hooked"], state["word"], state["folder"]) == (False, None, str(Path.cwd()))


@pytest.mark.parametrize(
    ("code", "returned", "out", "err"),
    [
        ("print(1)", 0, "1\n", ""),
        ("import atexit; atexit.register(print, 2); print(1)", 0, "1\n2\n", ""),
        ("print(1); raise SystemExit(7)", 7, "1\n", ""),
        ("import sys; sys.exit('no')", 1, "", "no\n"),
        ("print(1)\nprint(nothing)", 1, "1\n", "NameError: name 'nothing' is not defined\n"),
        ("print(1", 1, "", "SyntaxError: '(' was never closed\n"),
        ("import os; os.write(1, b'1'); os._exit(9)", 9, "1", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, "", ""),
        (RUN_MODULE.format(name="eckart") + "  # without a command", 2, "", ""),
    ],
)
def test_it_ends_as_python_does(code: str, returned: int, out: str, err: str) -> None:
    for ran in (run(code), run(code, loaded=TRANSFORMERS)):
        assert ran.returncode == returned, ran.stderr
        assert ran.stdout == out or "eckart" in code
        assert ran.stderr.endswith(err)


def test_what_takes_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run("import time; time.sleep(60)", timeout=0.1)
    sleeper = Fresh("import time; print('asleep', flush=True); time.sleep(60)")
    assert sleeper.line() == "asleep"
    start = time.monotonic()
    assert run("pass").returncode == 0  # beside it
    sleeper.kill()
    assert time.monotonic() - start < 30
    assert sleeper.communicate() == ("asleep\n", "")
    assert sleeper.returncode == -signal.SIGKILL
