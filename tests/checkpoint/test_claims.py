"""One run per output, one worker per claim, and nothing held by the dead."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from eckart.checkpoint import claim_output, written
from eckart.checkpoint.claims import Claims, create
from eckart.errors import FileError, MismatchError

HOLD = """
import sys, time
from eckart.checkpoint import claim_output
with claim_output(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
KEEP = """
import sys, time
from pathlib import Path
from eckart.checkpoint.claims import Claims
claims = Claims(Path(sys.argv[1]), ttl=float(sys.argv[2]))
with claims.hold(claims.folder / "a.claim") as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def other(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that has said its first line."""
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def killed(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def aged(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_second_run_on_one_output_is_refused_until_the_first_ends(tmp_path):
    output = tmp_path / "small"
    process = other(HOLD, output)
    try:
        with (
            pytest.raises(FileError, match=rf"another run \(process {process.pid} on .*another output"),
            claim_output(output),
        ):
            pytest.fail("claimed twice")
        with claim_output(tmp_path / "another"):
            pass
    finally:
        killed(process)
    with claim_output(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_claim_on_an_output_ends_with_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), claim_output(tmp_path / "small"):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_one_of_many_gets_a_claim(tmp_path):
    claims = [Claims(tmp_path / "queue", ttl=60) for _ in range(8)]
    start, got = threading.Barrier(8), []

    def run(mine: Claims) -> None:
        start.wait()
        with mine.hold(mine.folder / "a.claim") as held:
            got.append(held)
            start.wait()

    threads = [threading.Thread(target=run, args=(mine,)) for mine in claims]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(got) == [False] * 7 + [True]
    assert not (tmp_path / "queue" / "a.claim").exists()


def test_a_living_owner_keeps_its_claim_and_a_dead_one_loses_it(tmp_path):
    process, claims = other(KEEP, tmp_path, 1.0), Claims(tmp_path, ttl=1.0)
    claim = tmp_path / "a.claim"
    try:
        for _ in range(5):  # longer than ttl: only the signs of life keep it
            time.sleep(0.5)
            assert claims.take_away(claim) == ""
        assert f"process {process.pid} " in claims.owner(claim)
    finally:
        killed(process)
    assert claims.take_away(claim) == ""
    aged(claim, 2.0)
    assert f"process {process.pid} " in claims.take_away(claim)
    assert not claim.exists()
    with claims.hold(claim) as mine:
        assert mine


def test_who_was_replaced_does_not_remove_the_claim_of_the_next(tmp_path):
    first, second = Claims(tmp_path, ttl=60), Claims(tmp_path, ttl=60)
    claim = tmp_path / "a.claim"
    with first.hold(claim):
        aged(claim, 100)
        assert second.take_away(claim) == first.me
        assert create(claim, second.me)
    assert second.owner(claim) == second.me


def test_clocks_do_not_matter(tmp_path, monkeypatch):
    claims = Claims(tmp_path, ttl=60)
    create(tmp_path / "a.claim", "someone")
    monkeypatch.setattr(time, "time", lambda: 9e9)
    assert claims.take_away(tmp_path / "a.claim") == ""


def test_all_agree_with_the_first(tmp_path):
    claims = Claims(tmp_path, ttl=60)
    claims.agree("job.json", {"model": "a", "sites": ("x", "y")})
    Claims(tmp_path, ttl=60).agree("job.json", {"sites": ["x", "y"], "model": "a"})
    with pytest.raises(MismatchError, match='its model is "a", here it is "b"'):
        claims.agree("job.json", {"model": "b", "sites": ["x", "y"]})
    (tmp_path / "job.json").write_text("[1]")
    with pytest.raises(FileError, match="not written by Eckart"):
        claims.agree("job.json", {"model": "a"})


def test_nothing_is_written_at_first(tmp_path):
    assert written(tmp_path / "nowhere") is None
    assert written(tmp_path) is None
