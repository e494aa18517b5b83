"""`eckart compress` by several processes: the folder of one process, or none at all and an error that says why."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file
from test_cli_end_to_end import COMMAND, ENVIRONMENT, eckart, llama, texts  # noqa: F401

from fresh_python import Fresh

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SHORT = ("--samples", "30", "--length", "32", "--batch-size", "5")
KEEP = ("--keep", "0.6")
LAST_WORDS = """
import os
from eckart.{module} import {name}
def die(*_, **__):
    os._exit(9)
{name}.{function} = die
from eckart.cli import main
main()
"""


def assert_same_result(one: Path, two: Path) -> None:
    """Equal plans, and weights that differ by rounding."""
    a, b = (json.loads((folder / "eckart.json").read_text()) for folder in (one, two))
    assert a["plan"]["steps"] == b["plan"]["steps"]
    for mine, theirs in zip(a["outcome"]["layers"], b["outcome"]["layers"], strict=True):
        assert (mine["held_out"] is None) == (theirs["held_out"] is None)
        assert mine["held_out"] is None or mine["held_out"] == pytest.approx(theirs["held_out"], rel=1e-6)
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert first.keys() == second.keys()
    for name, weight in first.items():
        if weight.numel():
            assert float((weight.double() - second[name].double()).norm()) <= 1e-5 * float(weight.double().norm())


def test_torchrun_gives_the_result_of_one_process(run, llama, texts, tmp_path):  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    ran = run("compress", llama, "--data", texts, *SHORT, *KEEP, "-o", one)
    assert ran.code == 0, ran.err
    ran = eckart("compress", llama, "--data", texts, *SHORT, *KEEP, "-o", two, "--json", launcher=TORCHRUN)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["folder"] == str(two)
    assert_same_result(one, two)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def started(rank: int, port: int, code: str, *arguments: object) -> Fresh:
    group = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ECKART_TIMEOUT": 30}
    return Fresh(code, *arguments, env={**ENVIRONMENT, **{name: str(value) for name, value in group.items()}})


@pytest.mark.parametrize(
    ("victim", "where", "awaited"),
    [
        (1, {"module": "apply", "name": "prepare", "function": "prepare_site"}, "decompose"),
        (0, {"module": "verbs", "name": "save", "function": "_write"}, "write"),
    ],
    ids=["a worker", "the one that writes"],
)
def test_a_process_that_dies_is_named_and_nothing_is_written(llama, texts, tmp_path, victim, where, awaited):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ("compress", llama, "--data", texts, *SHORT, *KEEP, "-o", tmp_path / "small")
    dying = started(victim, port, LAST_WORDS.format(**where), *command)
    living = started(1 - victim, port, COMMAND, *command)
    try:
        _, err = living.communicate(timeout=60)
        _, last = dying.communicate(timeout=60)
    finally:
        living.kill()
        dying.kill()
    assert dying.returncode == 9, last[-3000:]
    assert living.returncode == 1, err[-3000:]
    assert f"error: process {1 - victim} waited for the others to {awaited}" in err
    assert "one of them ended" in err
    assert "Traceback" not in err
    assert not (tmp_path / "small").exists()


def test_workers_of_a_queue_share_the_work_and_one_writes(run, llama, texts, tmp_path):  # noqa: F811
    moments, queue, small, plain = (tmp_path / name for name in ("m.safetensors", "queue", "small", "plain"))
    ran = run("calibrate", llama, "--data", texts, *SHORT, "-o", moments)
    assert ran.code == 0, ran.err
    command = ("compress", llama, "--moments", moments, *KEEP)
    workers = [Fresh(COMMAND, *command, "--queue", queue, "-o", small, env=ENVIRONMENT) for _ in range(2)]
    assert run(*command, "-o", plain).code == 0
    said = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert_same_result(plain, small)
    assert sum(f"{small} was written by process" in err for err in said) == 1
    before = small.stat().st_mtime_ns
    late = run(*command, "--queue", queue, "-o", small)
    assert late.code == 0, late.err
    assert "was written by process" in late.err
    assert small.stat().st_mtime_ns == before
    other = run(*command, "--keep", "0.5", "--queue", queue, "-o", tmp_path / "other")
    assert other.code == 2
    assert "holds another job: its budget" in other.err
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_runs_on_one_output(run, verbs, tmp_path):
    hold = f"from eckart.checkpoint import claim_output as c; e = c({str(tmp_path / 'small')!r}); e.__enter__(); "
    process = subprocess.Popen(
        [sys.executable, "-c", hold + "print(1, flush=True); import time; time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()
        ran = run("compress", "m", "-o", tmp_path / "small", "--method", "svd", "--keep", "0.6")
    finally:
        process.kill()
        process.communicate()
    assert ran.code == 1
    assert "is being written by another run" in ran.err
    assert verbs.calls == []


def test_what_a_queue_does_not_go_with(run, verbs, tmp_path):
    (tmp_path / "file").write_text("")
    command = ("compress", "m", "-o", tmp_path / "small", "--keep", "0.6")
    ran = run(*command, "--data", "stdlib:source", "--queue", tmp_path / "file")
    assert ran.code == 2
    assert "calibrate first" in ran.err
    assert "is a file, a folder is expected" in ran.err
    assert verbs.calls == []
