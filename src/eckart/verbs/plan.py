"""``eckart.plan``: which site gets which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eckart.apply.decide import decide
from eckart.arch import check_finite, find_sites, fingerprint
from eckart.compression import get_method, options_for
from eckart.errors import InputError
from eckart.moments import Moments
from eckart.planning import Allocation, Plan
from eckart.records import Budget, FormKind, Progress, silent
from eckart.verbs.models import ModelLike, as_loaded

DEFAULT_METHOD = "kfac"
FORMS: tuple[FormKind, ...] = ("dense", "lowrank", "pivoted")


def budget_from(keep: float | None, budget: Budget | None) -> Budget:
    """One budget out of the two ways to give it."""
    if (keep is None) == (budget is None):
        raise InputError(
            "give exactly one of keep=0.6 (share of the sites' parameters) and budget=Budget(…); "
            f"got {'both' if keep is not None else 'neither'}."
        )
    return budget if budget is not None else Budget(keep=keep)


def plan(
    model: ModelLike,
    moments: Moments | str | None = None,
    *,
    tokenizer: Any = None,
    method: str = DEFAULT_METHOD,
    options: Mapping[str, Any] | None = None,
    keep: float | None = None,
    budget: Budget | None = None,
    allocation: Allocation | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    head: bool = False,
    forms: Sequence[FormKind] = FORMS,
    rank_multiple: int = 1,
    min_rank: int = 1,
    dtype: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> Plan:
    """Spend a budget on the ranks of a model's sites.

    Args:
        model: folder, hub name or module.
        moments: what :func:`eckart.calibrate` gave, or its file; None for methods that need none.
        method: a name of ``eckart.methods()``.
        options: of the method, by name.
        keep: share of the parameters of the sites; or ``budget`` in another unit.
        allocation: ``global`` (one budget in units of the loss), ``uniform`` or ``typewise``; by default
            global where the method's errors are in units of the loss, else uniform.
        forms: what a site may become. ``rank_multiple`` and ``min_rank`` constrain the ranks.

    Raises InputError, MismatchError for moments of another model, BudgetError for a budget that cannot be met.
    """
    loaded = as_loaded(model, tokenizer, dtype=dtype, device=device)
    sites = find_sites(loaded.model, include=include, exclude=exclude, embeddings=embeddings, head=head)
    check_finite(loaded.model, sites)
    chosen = get_method(method)
    print_ = fingerprint(loaded.model)
    known = as_moments(moments)
    if known is not None:
        known.check(print_)
    made, _ = decide(
        loaded.model,
        sites,
        known,
        method=chosen,
        options=options_for(chosen, options or {}),
        budget=budget_from(keep, budget),
        allocation=allocation,
        forms=forms,
        rank_multiple=rank_multiple,
        min_rank=min_rank,
        fingerprint=print_,
        base=loaded.name,
        progress=progress,
    )
    return made


def as_moments(moments: Moments | str | None) -> Moments | None:
    """Moments in memory, or read from their file."""
    return moments if moments is None or isinstance(moments, Moments) else Moments.load(moments)
