"""The few exceptions of Eckart. Each message says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EckartError(Exception):
    """Base of every error that Eckart raises on purpose. The command line prints it and exits with 1."""


class InputError(EckartError, ValueError):
    """What the caller gave cannot be used: wrong option, plan, pattern, data. The command line exits with 2."""


class BudgetError(InputError):
    """A budget that cannot be met. The message names the nearest one that can."""


class NotFiniteError(EckartError):
    """NaN or Inf in weights, activations or gradients. The message names the layer; nothing was written."""


class FileError(EckartError):
    """A file that is missing, cut short, of the wrong kind, or that must not be overwritten."""


class MismatchError(InputError):
    """Two things that do not belong together: moments or a plan of another model."""


class EckartWarning(UserWarning):
    """Something that the result depends on and the user should know."""


def problems(heading: str, found: Iterable[str]) -> str:
    """One message out of many problems, so that all are seen at once."""
    lines = list(found)
    if len(lines) == 1:
        return f"{heading}: {lines[0]}"
    return "\n".join([f"{heading}: {len(lines)} problems", *(f"  - {line}" for line in lines)])


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest ones that do."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    return f"unknown {kind} {name!r}.{hint} Known: {shown or 'none'}."
