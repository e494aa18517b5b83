"""Folders that are there whole or not at all.

A folder is written beside its place, synced to disk, and swapped in by one rename. Whatever ends the process
in between (an error, a full disk, Ctrl-C, ``kill -9``), the old folder stands or the new one is whole.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eckart.errors import FileError

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl

_WRITING = ".writing-"
_OLD = ".replaced-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def work_folder(path: str | Path) -> Path:
    """Where a run that can be taken up again keeps what it has done: beside ``path``, on the same disk."""
    target = Path(path).resolve()
    return target.with_name(f".{target.name}.stream")


def leftovers(path: str | Path) -> list[Path]:
    """Half-written folders that killed processes left beside ``path``; those being written are not listed."""
    target = Path(path).resolve()
    if not target.parent.is_dir():
        return []
    names = (f".{target.name}{_WRITING}", f".{target.name}{_OLD}")
    found = [p for p in target.parent.iterdir() if p.name.startswith(names) and p.is_dir()]
    return sorted(p for p in found if not _in_use(p))


def _in_use(folder: Path) -> bool:
    """Whether a living process holds the lock that the system drops when its owner dies."""
    if fcntl is None:
        return True
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def recover(path: str | Path) -> list[str]:
    """Clean up after killed processes; returns a sentence for each thing done.

    Where a process died between the two renames of a system without an atomic exchange, the old folder is put
    back. Half-written folders are removed.
    """
    target = Path(path).resolve()
    done = []
    for folder in leftovers(target):
        if _OLD in folder.name and not target.exists():
            folder.rename(target)
            done.append(f"put {target} back, which a killed process had moved to {folder.name}")
        else:
            shutil.rmtree(folder)
            done.append(f"removed {folder.name}, left by a killed process")
    return done


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system or its file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _swap_in(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``, which may exist; the old content is removed afterwards."""
    if not target.exists():
        new.rename(target)
        return
    if _exchange(new, target):
        shutil.rmtree(new)
        return
    old = target.with_name(f".{target.name}{_OLD}{secrets.token_hex(4)}")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def put_in_place(new: Path, target: Path) -> None:
    """Sync a finished folder and make it ``target``, on the same disk; what was there before is removed."""
    _sync_tree(new)
    _swap_in(new, target)
    _sync(target.parent)


def set_aside(folder: Path, target: Path) -> Path:
    """Rename a folder beside ``target`` in one step to what :func:`recover` removes, should this process end now."""
    aside = target.with_name(f".{target.name}{_WRITING}{secrets.token_hex(4)}")
    folder.rename(aside)
    return aside


def write_text(path: str | Path, text: str) -> None:
    """A text file, written beside its place and then put there: the old one stands until the new one is whole.

    Raises FileError where it cannot be written.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}{_WRITING}{secrets.token_hex(4)}")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        raise FileError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def disk_full(error: BaseException) -> bool:
    """Whether the disk is full. Safetensors reports it as text in an exception of its own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error)


def check_output(path: str | Path, *, overwrite: bool = False, needed: int | None = None) -> Path:
    """The absolute path, after the checks that cost nothing; call it before long work.

    ``needed`` bytes must be free. Raises FileError where a file or a non-empty folder is in the way (without
    ``overwrite``), the place is not writable, or the disk is too small.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise FileError(f"expected a place for a folder; {target} is a file.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileError(f"{target} exists and is not empty. Choose another output, or say --overwrite.")
    parent = next(p for p in (target.parent, *target.parent.parents) if p.exists())
    if not parent.is_dir():
        raise FileError(f"{target} lies below {parent}, which is a file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise FileError(f"no permission to write in {parent}.")
    free = shutil.disk_usage(parent).free
    if needed is not None and needed > free:
        raise FileError(f"{target} needs {needed / 1e6:.1f} MB beside what is there; {parent} has {free / 1e6:.1f} MB.")
    return target


def _open_up(folder: Path) -> None:
    """Give weights the mode that the umask allows, as other files have; safetensors leaves 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o666 & ~mask)


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False, needed: int | None = None) -> Iterator[Path]:
    """Write into the folder that this yields; when the block ends without an error it becomes ``path``.

    With ``overwrite`` the whole old folder is replaced, so files that only it had are gone. Raises FileError
    as :func:`check_output` does, and where the disk fills up or the place turns out not to be writable; the old
    folder then stands as it was.
    """
    target = check_output(path, overwrite=overwrite, needed=needed)
    new = target.with_name(f".{target.name}{_WRITING}{secrets.token_hex(4)}")
    lock: int | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        new.mkdir()
        if fcntl is not None:
            lock = os.open(new, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield new
        _open_up(new)
        put_in_place(new, target)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if disk_full(error):
            stands = "The old folder stands as it was." if target.exists() else "Nothing was left behind."
            raise FileError(f"the disk is full: {target} could not be written. {stands}") from error
        if isinstance(error, PermissionError):
            raise FileError(f"no permission to write {target}: {error}.") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
