"""The old folder stands or the new one is whole, however the writing ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from eckart.checkpoint import atomic, atomic_folder, check_output, leftovers, recover
from eckart.errors import FileError


def write(folder, text):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text(text)
    (folder / "b.txt").write_text(text)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def beside(folder):
    return [p.name for p in folder.parent.iterdir()]


def whole(text):
    return {"sub/a.txt": text, "b.txt": text}


@pytest.fixture
def old(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as folder:
        write(folder, "old")
    return tmp_path / "deep" / "out"


def test_new_folder_and_replacement(old):
    assert content(old) == whole("old")
    (old / "only-in-old.txt").write_text("x")
    with atomic_folder(old, overwrite=True) as folder:
        write(folder, "new")
        assert content(old)["b.txt"] == "old"
    assert content(old) == whole("new")
    assert beside(old) == ["out"]


def test_weights_have_the_mode_that_the_umask_allows(tmp_path):
    with atomic_folder(tmp_path / "new") as new:
        for name in ("model.safetensors", "other"):
            (new / name).touch(mode=0o600 if name.startswith("model") else 0o666)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "new").iterdir()}
    assert modes == {(tmp_path / "new" / "other").stat().st_mode & 0o777}


def test_an_empty_folder_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        write(folder, "new")
    assert content(tmp_path / "out") == whole("new")


def test_two_renames_where_there_is_no_exchange(old, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    with atomic_folder(old, overwrite=True) as folder:
        write(folder, "new")
    assert content(old) == whole("new")
    assert beside(old) == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_folder_and_nothing_else(old, error):
    def fail():
        with atomic_folder(old, overwrite=True) as folder:
            (folder / "b.txt").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert content(old) == whole("old")
    assert beside(old) == ["out"]


class SafetensorError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_changes_nothing(old, error):
    def fail():
        with atomic_folder(old, overwrite=True) as folder:
            (folder / "b.txt").write_text("half")
            raise error

    with pytest.raises(FileError, match=r"disk is full.*stands"):
        fail()
    assert content(old) == whole("old")
    assert beside(old) == ["out"]


def test_a_disk_that_fills_up_while_syncing(old, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="disk is full"), atomic_folder(old, overwrite=True) as folder:
        write(folder, "new")
    assert content(old) == whole("old")


def test_what_is_in_the_way_is_refused_before_any_work(old, tmp_path, monkeypatch):
    with pytest.raises(FileError, match="--overwrite"):
        check_output(old)
    with pytest.raises(FileError, match="is a file"):
        check_output(old / "b.txt", overwrite=True)
    with pytest.raises(FileError, match="which is a file"):
        check_output(old / "b.txt" / "x")
    with pytest.raises(FileError, match=r"needs 1000000000000\.0 MB"):
        check_output(tmp_path / "new", needed=10**18)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FileError, match="no permission"):
        check_output(tmp_path / "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="no permission"):
        check_output(tmp_path / "new")
    tmp_path.chmod(0o700)


def hears_ctrl_c() -> None:
    """A shell without job control lets its background jobs, such as a CI run, ignore SIGINT; children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


SLOW_WRITER = """
import sys, time
from eckart.checkpoint import atomic, atomic_folder
if sys.argv[2] == "between":
    atomic._exchange = lambda one, other: False
    import pathlib
    rename = pathlib.Path.rename
    def stop(self, target):
        rename(self, target)
        print("ready", flush=True)
        time.sleep(60)
    pathlib.Path.rename = stop
with atomic_folder(sys.argv[1], overwrite=True) as folder:
    (folder / "b.txt").write_text("new")
    if sys.argv[2] == "during":
        print("ready", flush=True)
        time.sleep(60)
"""


def start(out, when):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(out), when],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_kill_during_writing_leaves_the_old_folder_whole(old):
    process = start(old, "during")
    assert leftovers(old) == []  # alive, so not left over
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert content(old) == whole("old")
    assert len(leftovers(old)) == 1
    with atomic_folder(old, overwrite=True) as folder:
        write(folder, "new")
    assert content(old) == whole("new")
    assert beside(old) == ["out"]


def test_kill_between_the_two_renames_is_recovered(old):
    process = start(old, "between")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not old.exists()
    said = recover(old)
    assert any("back" in line for line in said)
    assert content(old) == whole("old")
    assert beside(old) == ["out"]


def test_ctrl_c_cleans_up(old):
    process = start(old, "during")
    process.send_signal(signal.SIGINT)
    assert process.wait() != 0
    assert content(old) == whole("old")
    assert beside(old) == ["out"]


def test_another_writer_that_is_alive_is_left_alone(old):
    process = start(old, "during")
    with atomic_folder(old, overwrite=True) as folder:
        write(folder, "mine")
    assert content(old) == whole("mine")
    assert sum(".writing-" in name for name in beside(old)) == 1
    process.kill()
    process.wait()
    time.sleep(0)
    assert len(recover(old)) == 1
