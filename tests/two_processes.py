"""Starts a script in two processes that talk over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

PATIENCE = 120
"""Seconds after which a script says where each of its threads stands, and ends: all of them need less than 60."""


def two_processes(script: str, folder: Path, *arguments: object) -> None:
    """Run the script with the arguments, each process under torchrun; AssertionError with its errors if it fails.

    One that hangs is started once more, with a warning that shows where it hung: gloo was seen to hang, once in some
    dozens of runs on busy machines. One that hangs twice fails.
    """
    path = folder / "two_processes_script.py"
    path.write_text(f"import faulthandler\nfaulthandler.dump_traceback_later({PATIENCE}, exit=True)\n{script}")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path))
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    own["PYTHONPATH"] = str(Path(__file__).parent)
    for attempt in (1, 2):
        ran = subprocess.run(
            [*launch, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=PATIENCE + 60,
            env={**os.environ, **own},
            check=False,
        )
        if attempt == 1 and ran.returncode != 0 and "Timeout (0:" in ran.stderr:
            warnings.warn(f"two processes hung:\n{ran.stderr[-20_000:]}", stacklevel=2)
            continue
        assert ran.returncode == 0, ran.stderr[-4000:]
        return
