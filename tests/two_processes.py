"""Starts a script in two processes that talk over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import warnings
from pathlib import Path

from fresh_python import Fresh

PATIENCE = 120
"""Seconds after which a script says where each of its threads stands, and ends: all of them need less than 60."""
RUN = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def two_processes(script: str, folder: Path, *arguments: object) -> None:
    """Run the script with the arguments in both, as torchrun does; AssertionError with its errors if one fails.

    One that hangs is started once more, with a warning that shows where it hung: gloo was seen to hang, once in some
    dozens of runs on busy machines. One that hangs twice fails.
    """
    path = folder / "two_processes_script.py"
    path.write_text(f"import faulthandler\nfaulthandler.dump_traceback_later({PATIENCE}, exit=True)\n{script}")
    for attempt in (1, 2):
        codes, said = _run(path, *arguments)
        if attempt == 1 and any(codes) and "Timeout (0:" in said:
            warnings.warn(f"two processes hung:\n{said[-20_000:]}", stacklevel=2)
            continue
        assert codes == [0, 0], said[-4000:]
        return


def _run(path: Path, *arguments: object) -> tuple[list[int], str]:
    """Their exit codes and errors. Where one fails, the other is killed after the time in which it may say so too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    own |= {"PYTHONPATH": str(Path(__file__).parent), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    started = [Fresh(RUN, path, *arguments, env={**os.environ, **own, **rank}) for rank in ranks]
    end = time.monotonic() + PATIENCE + 60
    while time.monotonic() < end and any(process.returncode is None for process in started):
        for process in started:
            try:
                if process.wait(0.1):
                    end = min(end, time.monotonic() + 20)
            except subprocess.TimeoutExpired:
                continue
    for process in started:
        process.kill()
    return [process.wait() for process in started], "".join(process.communicate()[1] for process in started)
