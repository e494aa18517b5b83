"""Who may do what, told by files: one run per output on a machine, one worker per job in a shared folder.

A claim is a file that only one process can create. Its owner touches it while it lives, so that another may
take over what a dead process held. All that is asked of the file system is that exclusive creation and renaming are
atomic; times are compared as the file system itself gives them, so clocks of machines may differ.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eckart.errors import FileError, MismatchError

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

WRITTEN = "written.json"
"""File of a shared folder that says who has written the result, and where."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


def worker_name() -> str:
    """This process, for people who read it in a message."""
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def claim_output(path: str | Path) -> Iterator[None]:
    """For a whole run: nobody else writes ``path`` meanwhile. Raises FileError where another run does.

    A lock beside ``path``, which the system drops when its owner dies, however it dies. Windows and file systems
    without locks have none; there the last one to finish wins, as without this.
    """
    target = Path(path).resolve()
    if fcntl is None:
        yield
        return
    lock = target.with_name(f".{target.name}.lock")
    handle = _locked(lock, target)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _locked(lock: Path, target: Path) -> int:
    """The open, locked file ``lock``: the one that has this name now, not one that its last owner removed."""
    assert fcntl is not None
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise FileError(f"no permission to write beside {target}: {error}.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise FileError(
                f"{target} is being written by another run ({owner}). Wait until it is done, or name another output."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
            os.truncate(handle, 0)
            os.write(handle, worker_name().encode())
            return handle
        os.close(handle)


class Claims:
    """Claims in a folder that several processes, on any machines, see.

    ``ttl``: seconds without a sign of life after which a claim may be taken over. Work is done twice at worst, by an
    owner that was silent for longer and came back, so results must not depend on who computes them.
    """

    def __init__(self, folder: Path, *, ttl: float) -> None:
        self.folder = folder
        self.ttl = ttl
        self.me = f"{worker_name()} ({secrets.token_hex(4)})"
        folder.mkdir(parents=True, exist_ok=True)

    def agree(self, name: str, value: Mapping[str, Any]) -> None:
        """The first to come writes ``value`` as JSON to ``name``; all others must have the same.

        Raises MismatchError with the first key that differs.
        """
        path = self.folder / name
        text = json.dumps(value, sort_keys=True, indent=2, default=str)
        if create(path, text):
            return
        found, mine = read_json(path), json.loads(text)
        if found != mine:
            odd = next((key for key in {**found, **mine} if found.get(key) != mine.get(key)), "something")
            raise MismatchError(
                f"{self.folder} holds another job: its {odd} is {_short(found.get(odd))}, here it is "
                f"{_short(mine.get(odd))}. Name another queue folder, or remove that one."
            )

    @contextmanager
    def hold(self, path: Path) -> Iterator[bool]:
        """Yields whether ``path`` is this process's now. Its time is kept fresh until the block ends."""
        if not create(path, self.me):
            yield False
            return
        stop = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(path, stop), daemon=True)
        keeper.start()
        try:
            yield True
        finally:
            stop.set()
            keeper.join()
            if self.owner(path) == self.me:
                path.unlink(missing_ok=True)

    def _keep(self, path: Path, stop: threading.Event) -> None:
        while not stop.wait(self.ttl / 4):
            if self.owner(path) != self.me:
                return
            os.utime(path)

    def owner(self, path: Path) -> str:
        """Who holds ``path``; empty where nobody does."""
        try:
            return path.read_text("utf-8")
        except FileNotFoundError:
            return ""

    def take_away(self, path: Path) -> str:
        """Remove the claim ``path`` if its owner gave no sign of life for ``ttl`` seconds; returns who that was."""
        if not self._stale(path):
            return ""
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            path.rename(aside)  # of several that see a stale claim, one succeeds
        except FileNotFoundError:
            return ""
        owner = aside.read_text("utf-8") or "a process that left no name"
        fresh = not self._stale(aside)
        if fresh:  # another was faster and holds a new claim, which this was: give it back
            aside.rename(path)
            return ""
        aside.unlink()
        return owner

    def _stale(self, path: Path) -> bool:
        probe = self.folder / f".now-{secrets.token_hex(4)}"
        try:
            then = path.stat().st_mtime
            probe.touch()
            return probe.stat().st_mtime - then > self.ttl
        except FileNotFoundError:
            return False
        finally:
            probe.unlink(missing_ok=True)


def create(path: Path, text: str) -> bool:
    """Write a new file; False where it exists."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A file of a shared folder. One that was just created may still be empty: that is waited for."""
    for _ in range(50):
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError:
            time.sleep(0.1)
            continue
        if isinstance(found, dict):
            return found
        break
    raise FileError(f"{path} is cut short or was not written by Eckart. Remove the folder and start again.")


def written(queue: str | Path) -> dict[str, Any] | None:
    """Who has written the result of the shared folder ``queue``, and where; None as long as nobody has."""
    path = Path(queue) / WRITTEN
    return read_json(path) if path.is_file() else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
