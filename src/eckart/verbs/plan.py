"""``eckart.plan``: which site gets which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eckart.apply.bits import BITS
from eckart.apply.decide import decide, default_allocation
from eckart.apply.probe import ROUNDS
from eckart.arch import check_finite, find_sites, fingerprint
from eckart.compression import METHODS, CompressMethod, options_for
from eckart.errors import InputError, unknown
from eckart.layers import PACKED_BITS
from eckart.modules import MODULES, ModuleMethod
from eckart.moments import Moments
from eckart.planning import Allocation, Plan
from eckart.records import Budget, FormKind, Progress, silent
from eckart.verbs.models import ModelLike, as_loaded

DEFAULT_METHOD = "kfac"
FORMS: tuple[FormKind, ...] = ("dense", "lowrank", "pivoted", "narrow")


def budget_from(keep: float | None, budget: Budget | None) -> Budget:
    """One budget out of the two ways to give it."""
    if (keep is None) == (budget is None):
        raise InputError(
            "give exactly one of keep=0.6 (share of the sites' parameters) and budget=Budget(…); "
            f"got {'both' if keep is not None else 'neither'}."
        )
    return budget if budget is not None else Budget(keep=keep)


def any_method(name: str) -> CompressMethod | ModuleMethod:
    """The method of either table; InputError with the nearest names where there is none."""
    if name in MODULES:
        return MODULES[name]
    if name not in METHODS:
        raise InputError(unknown("method", name, [*METHODS, *MODULES]))
    return METHODS[name]


def _global(method: CompressMethod | ModuleMethod, allocation: Allocation | None) -> bool:
    return method.loss_units and (allocation or default_allocation(method)) == "global"


def bits_from(
    bits: Sequence[int] | None,
    budget: Budget | None,
    method: CompressMethod | ModuleMethod,
    allocation: Allocation | None,
) -> tuple[int, ...]:
    """The bits to choose from: what was asked, else those of a budget in bytes."""
    if bits is None:
        return BITS if budget is not None and budget.unit == "bytes" and _global(method, allocation) else ()
    wrong = [width for width in bits if width not in PACKED_BITS]
    if wrong or len(set(bits)) != len(bits):
        raise InputError(f"bits lists some of {', '.join(map(str, PACKED_BITS))}, each once; got {list(bits)}.")
    if budget is None and bits:
        raise InputError("a plan says how each map is stored; leave out bits.")
    return tuple(bits)


def rounds_from(
    rounds: int | None,
    data: bool,
    budget: Budget | None,
    method: CompressMethod | ModuleMethod,
    allocation: Allocation | None,
) -> int:
    """How often predictions are held against measurements."""
    possible = data and budget is not None and _global(method, allocation)
    if rounds is None:
        return ROUNDS if possible else 0
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise InputError(f"probe_rounds counts from 0; got {rounds!r}.")
    if rounds and not possible:
        raise InputError(
            "probes measure on the calibration data what one global budget predicted: give data (not a moments file "
            "or a plan) and allocation 'global', or leave out probe_rounds."
        )
    return rounds


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
    bits: Sequence[int] | None = None,
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
        forms: what a site may become. ``rank_multiple`` and ``min_rank`` constrain ranks and widths.
        bits: that numbers may be stored in, as in :func:`eckart.compress`.

    Raises InputError, MismatchError for moments of another model, BudgetError for a budget that cannot be met.
    """
    loaded = as_loaded(model, tokenizer, dtype=dtype, device=device)
    sites = find_sites(loaded.model, include=include, exclude=exclude, embeddings=embeddings, head=head)
    check_finite(loaded.model, sites)
    chosen = any_method(method)
    wanted = budget_from(keep, budget)
    print_ = fingerprint(loaded.model)
    known = as_moments(moments)
    if known is not None:
        known.check(print_)
    made = decide(
        loaded.model,
        sites,
        known,
        method=chosen,
        options=options_for(chosen, options or {}),
        budget=wanted,
        allocation=allocation,
        forms=forms,
        bits=bits_from(bits, wanted, chosen, allocation),
        rank_multiple=rank_multiple,
        min_rank=min_rank,
        fingerprint=print_,
        base=loaded.name,
        progress=progress,
    )
    return made.plan


def as_moments(moments: Moments | str | None) -> Moments | None:
    """Moments in memory, or read from their file."""
    return moments if moments is None or isinstance(moments, Moments) else Moments.load(moments)
