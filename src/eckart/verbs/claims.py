"""``eckart.claims``: each method's claim in miniature."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from eckart.errors import InputError, problems, unknown
from eckart.records import Verdict
from eckart.verbs.methods import Method, methods


def claims(names: Sequence[str] = ()) -> Iterator[tuple[Method, Verdict, float]]:
    """Run the claims of the named methods (all by default), yielding method, verdict and seconds one by one.

    A name that several tables share stands for all of its methods. Raises InputError for unknown names before
    anything runs.
    """
    every = methods()
    known = list(dict.fromkeys(method.name for method in every))
    wrong = [unknown("method", name, known) for name in names if name not in known]
    if wrong:
        raise InputError(wrong[0] if len(wrong) == 1 else problems("these methods are unknown", wrong))
    return _run([method for method in every if not names or method.name in names])


def _run(chosen: Sequence[Method]) -> Iterator[tuple[Method, Verdict, float]]:
    for method in chosen:
        start = time.perf_counter()
        verdict = method.claim.run()
        yield method, verdict, time.perf_counter() - start
