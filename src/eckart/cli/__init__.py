"""The command line: one file per verb, each parses, calls ``eckart.<verb>`` and renders.

Exit codes: 0 done; 1 failed (``FileError``, ``NotFiniteError`` and the other errors of Eckart, a full disk);
2 wrong use (``InputError``, ``BudgetError``, ``MismatchError``, unknown options); 130 interrupted.
Results go to stdout and nothing else does; progress, notes, warnings and errors go to stderr.
"""

from __future__ import annotations

from eckart.cli.app import main

__all__ = ["main"]
