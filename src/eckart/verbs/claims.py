"""``eckart.claims``: each method's claim in miniature."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from eckart.compression import METHODS, CompressMethod, get_method
from eckart.records import Verdict


def claims(names: Sequence[str] = ()) -> Iterator[tuple[CompressMethod, Verdict, float]]:
    """Run the claims of the named methods (all by default), yielding method, verdict and seconds one by one.

    Raises InputError for unknown names before anything runs.
    """
    chosen = [get_method(name) for name in names] if names else list(METHODS.values())
    return _run(chosen)


def _run(chosen: Sequence[CompressMethod]) -> Iterator[tuple[CompressMethod, Verdict, float]]:
    for method in chosen:
        start = time.perf_counter()
        verdict = method.claim.run()
        yield method, verdict, time.perf_counter() - start
