"""Runs code as ``python -c`` does, without the seconds that importing torch and its like takes every time.

A server, started at the first request and ended with the tests, imports what has nothing to do with what is tested and
answers each request with a fork. In the fork neither eckart nor transformers nor peft was ever imported, no import hook
is installed, and arguments, environment and current folder are those of the request. The code runs as ``__main__`` at
the top of the process: its errors, exit codes and what it leaves to do at exit are Python's own.

Not for tests of what a start of Python costs or loads. ``ECKART_FRESH=start`` makes every request start Python.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

NEUTRAL = (
    *("torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.utils.data", "safetensors.torch"),
    *("torchao.prototype.safetensors.safetensors_support", "scipy.optimize", "scipy.sparse.linalg", "scipy.stats"),
    *("tokenizers", "regex", "psutil", "yaml", "jinja2.sandbox", "typer", "rich.console", "pydantic", "httpx2"),
)
"""Third-party modules that know nothing of transformers and read nothing from the environment that a test sets."""

TRANSFORMERS = ("transformers.modeling_utils", "transformers.integrations.finegrained_fp8", "transformers.generation")
"""For tests in which the order of imports is no matter, since Eckart is never imported."""

NEVER = ("eckart", "peft", "fresh_python")
STARTER = "import sys; sys.path.insert(0, {folder!r}); from fresh_python import serve; exec(serve({fd}))"
RUN_MODULE = "import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
HERE = Path(__file__).parent


# ---- the side of the server


def serve(fd: int) -> CodeType:
    """Answer requests until their end; in each fork, return the code that the process is there to run."""
    sys.path.remove(str(HERE))
    if sys.path[0] == "":
        del sys.path[0]
    requests = socket.socket(fileno=fd)
    _load(NEUTRAL)
    running: dict[int, int | None] = {}
    while True:
        request = _read(requests)
        if request is None:
            for pid, code in running.items():
                if code is None:
                    _kill(pid)
            os._exit(0)
        if request["do"] == "wait":
            _answer(requests, {"code": _ended(request["pid"], request["seconds"], running, requests)})
            continue
        fds = socket.recv_fds(requests, 1, 1)[1] if request["do"] == "serve" else []
        pid = os.fork()
        if pid:
            running[pid] = None
            for other in fds:
                os.close(other)
            _answer(requests, {"pid": pid})
            continue
        requests.close()
        os.setsid()
        running = {}
        if fds:
            requests = socket.socket(fileno=fds[0])
            _load(request["modules"])
            continue
        return _become(request)


def _load(modules: Sequence[str]) -> None:
    """Import what is there, and keep it out of the way of the garbage collectors of the forks."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name is None or missing.name.partition(".")[0] != name.partition(".")[0]:
                raise
    never = [*NEVER, "transformers", "huggingface_hub", "accelerate"] if modules is NEUTRAL else NEVER[:2]
    loaded = {name.partition(".")[0] for name in sys.modules} & {*never} - {"fresh_python"}
    assert not loaded, f"{loaded} came with what should know nothing of it"
    threads = Path("/proc/self/task")
    assert not threads.is_dir() or len(list(threads.iterdir())) == 1, "forks of several threads may hang"
    gc.collect()
    gc.freeze()


def _read(requests: socket.socket) -> dict[str, Any] | None:
    data = b""
    while len(data) < 8:
        data += (more := requests.recv(8 - len(data)))
        if not more:
            return None
    size, data = int(data), b""
    while len(data) < size:
        data += (more := requests.recv(size - len(data)))
        if not more:
            return None
    return json.loads(data)


def _answer(requests: socket.socket, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode()
    requests.sendall(b"%8d" % len(data) + data)


def _ended(pid: int, seconds: float, running: dict[int, int | None], requests: socket.socket) -> int | None:
    """The exit code of a fork as soon as it has ended, None if that takes longer."""
    end = time.monotonic() + seconds
    while running[pid] is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            running[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= end or select.select([requests], [], [], 0.01)[0]:  # readable: the tests are gone
            break
    return running[pid]


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def _become(request: Mapping[str, Any]) -> CodeType:
    """Make this fork the process that was asked for."""
    for fd, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_APPEND),
        (2, request["err"], os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, fd)
        os.close(opened)
    known = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.environ.clear()
    os.environ.update(request["environment"])
    wanted = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = ["", *wanted, *(entry for entry in sys.path if entry not in known)]
    os.chdir(request["folder"])
    sys.argv = ["-c", *request["arguments"]]
    if request["threads"]:
        sys.modules["torch"].set_num_threads(request["threads"])
    for name in [name for name in vars(sys.modules["__main__"]) if not name.startswith("__")]:
        delattr(sys.modules["__main__"], name)
    sys.modules.pop("fresh_python")
    importlib.invalidate_caches()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return compile(request["code"], "<string>", "exec", dont_inherit=True)


# ---- the side of the tests


class _Server:
    """The other end of a server."""

    def __init__(self, above: _Server | None = None, modules: Sequence[str] = ()) -> None:
        self.requests, theirs = socket.socketpair()
        self.log = tempfile.TemporaryFile() if above is None else above.log  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | None = None
        if above is None:
            own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            own |= {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-c", STARTER.format(folder=str(HERE), fd=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.log,
                env={**os.environ, **own},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            atexit.register(self.close)
        else:
            _answer(above.requests, {"do": "serve", "modules": modules})
            socket.send_fds(above.requests, [b"."], [theirs.fileno()])
            assert _read(above.requests)
        theirs.close()

    def ask(self, **request: Any) -> Any:
        answer = None
        with contextlib.suppress(ConnectionError):
            _answer(self.requests, request)
            answer = _read(self.requests)
        if answer is None:
            self.log.seek(0)
            raise RuntimeError(f"no fresh Pythons any more: {self.log.read().decode()[-3000:]}")
        return next(iter(answer.values()))

    def close(self) -> None:
        self.requests.close()
        if self.process is not None:
            self.process.wait()


_servers: dict[tuple[str, ...], _Server] = {}


def _server(loaded: tuple[str, ...]) -> _Server:
    if loaded not in _servers:
        _servers[loaded] = _Server(_server(()), loaded) if loaded else _Server()
    return _servers[loaded]


class Fresh:
    """A process that was asked for, with what tests use of :class:`subprocess.Popen`."""

    def __init__(
        self,
        code: str,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        loaded: tuple[str, ...] = (),
    ) -> None:
        self.args = ["-c", code, *map(str, arguments)]
        self.returncode: int | None = None
        self.started: subprocess.Popen[bytes] | None = None
        output = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, output, ignore_errors=True)
        self.out, self.err = (Path(output, name) for name in ("out", "err"))
        self.out.touch()
        self.err.touch()
        environment = dict(os.environ if env is None else env)
        folder = str(cwd or Path.cwd())
        if os.environ.get("ECKART_FRESH") != "start":
            try:
                self._fork(code, environment, folder, loaded)
                return
            except RuntimeError as error:  # slower, but the same
                warnings.warn(f"every Python is started from now on: {error}", stacklevel=3)
                os.environ["ECKART_FRESH"] = "start"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.started = subprocess.Popen(
                [sys.executable, *self.args], stdout=out, stderr=err, env=environment, cwd=folder
            )
        self.pid = self.started.pid

    def _fork(self, code: str, environment: Mapping[str, str], folder: str, loaded: tuple[str, ...]) -> None:
        self.server = _server(loaded)
        torch = sys.modules.get("torch")  # as many threads as here, as another start on this machine would have
        self.pid = self.server.ask(
            do="run",
            code=code,
            arguments=self.args[2:],
            environment=environment,
            folder=folder,
            out=str(self.out),
            err=str(self.err),
            threads=int(environment.get("OMP_NUM_THREADS", 0)) or (torch.get_num_threads() if torch else 0),
        )

    def wait(self, timeout: float = 300) -> int:
        """The exit code; TimeoutExpired if it takes longer."""
        if self.returncode is None and self.started is not None:
            self.returncode = self.started.wait(timeout)
        elif self.returncode is None:
            self.returncode = self.server.ask(do="wait", pid=self.pid, seconds=timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def line(self, timeout: float = 300) -> str:
        """The first line that it writes; RuntimeError with its errors if it ends before."""
        end = time.monotonic() + timeout
        while "\n" not in self.out.read_text():
            ended = time.monotonic() >= end
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(0.01)
                ended = "\n" not in self.out.read_text()
            if ended:
                raise RuntimeError(f"not a line: {self.err.read_text()}")
        return self.out.read_text().splitlines()[0]

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it wrote until its end; TimeoutExpired if that takes longer."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def run(code: str, *arguments: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -c code arguments``, to its end; killed after the timeout."""
    process = Fresh(code, *arguments, **options)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)
