"""The command ``eckart`` and its exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import eckart
from eckart.cli.adapt import adapt
from eckart.cli.calibrate import calibrate
from eckart.cli.claims import claims
from eckart.cli.compensate import compensate
from eckart.cli.compress import compress
from eckart.cli.convert import convert
from eckart.cli.demo import demo
from eckart.cli.dimension import dimension
from eckart.cli.doctor import doctor
from eckart.cli.evaluate import evaluate
from eckart.cli.export import export
from eckart.cli.inspect import inspect
from eckart.cli.methods import methods
from eckart.cli.plan import plan
from eckart.cli.prune import prune
from eckart.cli.schema import schema
from eckart.cli.terminal import Interrupted, Terminal, show_warnings
from eckart.errors import EckartError, InputError

app = typer.Typer(
    name="eckart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS = (
    *(inspect, calibrate, plan, compress, prune, compensate, evaluate, export, adapt, convert, dimension),
    *(methods, claims, doctor, demo, schema),
)
for verb in VERBS:
    app.command(verb.__name__)(verb)


def _version(asked: bool) -> None:
    if asked:
        print(f"eckart {eckart.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make pretrained models smaller by finding their low-dimensional structure.

    Start with `eckart demo`.
    """


def main() -> None:
    """Run the command line; leaves by SystemExit with 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    show_warnings()
    try:
        app(prog_name="eckart")
    except InputError as error:
        _leave(str(error), 2)
    except EckartError as error:
        _leave(str(error), 1)
    except (Interrupted, KeyboardInterrupt) as error:
        _leave(str(error) or "Interrupted.", 130)
    except (OSError, MemoryError) as error:
        _leave(f"{type(error).__name__}: {error}", 1)


def _leave(message: str, code: int) -> None:
    if Terminal().leading or code == 1:
        print(f"{'' if code == 130 else 'error: '}{message}", file=sys.stderr)
    sys.exit(code)
