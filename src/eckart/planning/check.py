"""Whether a plan can be carried out on a model's sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eckart.compression import METHODS, get_method, options_for
from eckart.errors import InputError, problems, unknown
from eckart.layers import PACKED_BITS, supported_forms
from eckart.modules import MODULES
from eckart.planning.curve import FORMS
from eckart.planning.plan import Plan, Step
from eckart.records import Site, Unit


def check(plan: Plan, sites: Sequence[Site], units: Sequence[Unit] = ()) -> None:
    """Raise InputError with everything that is wrong with a plan, before any work.

    Checked are sites that do not exist or come twice, forms that are unknown or do not fit the kind of site,
    ranks below 1 or above the full rank, methods that are unknown or do not take the site, options, bits, and
    maps that have a step of their own and one of a unit.
    Sites without a step are no problem: they stay dense.
    """
    by_name = {site.name: site for site in sites}
    by_unit = {unit.name: unit for unit in units}
    found: list[str] = []
    seen: set[str] = set()
    changed = {step.site for step in plan.steps if step.form != "dense" or step.bits}
    for step in plan.steps:
        found += [f"{step.site}: {why}" for why in _storage(step)]
        if step.site in seen:
            found.append(f"site {step.site!r} has more than one step")
        seen.add(step.site)
        if step.form == "narrow":
            found += _narrow(step, by_unit, changed)
            continue
        if step.site not in by_name:
            found.append(unknown("site", step.site, by_name))
        elif step.form != "dense":
            found += [f"{step.site}: {why}" for why in _misfits(step, by_name[step.site])]
    found += _mixed([step for step in plan.steps if step.site in by_unit], by_unit)
    if found:
        raise InputError(problems("the plan does not fit the model", found))


def _mixed(steps: Sequence[Step], units: Mapping[str, Unit]) -> list[str]:
    """Maps whose rows two units hold, which would store them in different ways."""
    stored: dict[str, dict[str, tuple[int, int]]] = {}
    for step in steps:
        for name in units[step.site].sites:
            stored.setdefault(name, {})[step.site] = (step.bits, step.group)
    return [
        f"{name}: its rows belong to {' and '.join(of)}, which need equal bits and group"
        for name, of in stored.items()
        if len(set(of.values())) > 1
    ]


def _misfits(step: Step, site: Site) -> list[str]:
    found = []
    if step.form not in FORMS:
        found.append(unknown("form", step.form, FORMS))
    elif step.form == "sparse":
        found += _sparse(step, site)
    elif step.form not in supported_forms(site):
        slices = f" of {site.slices} slices" if site.slices > 1 else ""
        fitting = ", ".join(supported_forms(site))
        found.append(f"the form {step.form} does not fit a {site.kind} site{slices}; take one of {fitting}")
    if step.form != "sparse" and not 1 <= step.rank <= site.full_rank:
        found.append(f"rank {step.rank} is not from 1 to the full rank {site.full_rank}")
    if step.method not in METHODS:
        return [*found, unknown("method", step.method, METHODS)]
    method = get_method(step.method)
    reason = method.fits(site)
    if reason is not None:
        found.append(f"method {step.method} does not fit: {reason}")
    try:
        options_for(method, step.options)
    except InputError as error:
        found.append(str(error))
    return found


def _sparse(step: Step, site: Site) -> list[str]:
    """What is wrong with a step of zeros."""
    n = site.in_features
    found = []
    if site.kind not in ("linear", "conv1d") or site.slices > 1 or site.tied:
        found.append(f"the form sparse is for linear maps of their own weight; this is a {site.kind} site")
    if not 1 <= step.rank <= n:
        found.append(f"rank {step.rank} is not from 1 to {n}, the weights of a row")
    elif step.of and (step.of < 2 or n % step.of or step.rank * step.of % n):
        found.append(f"rank {step.rank} and of {step.of}: {n} inputs are no such groups with whole counts")
    return found


def _storage(step: Step) -> list[str]:
    """What is wrong with how the numbers of a step are stored."""
    found = ["of is for the form sparse"] if step.of and step.form != "sparse" else []
    if not step.bits:
        return found + (["group and repair need bits"] if step.group or step.repair else [])
    if step.bits not in PACKED_BITS:
        found.append(f"bits is one of {', '.join(map(str, PACKED_BITS))}, or 0 for as stored; got {step.bits}")
    if step.group < 1:
        found.append(f"with bits, group counts the columns that share a scale, at least 1; got {step.group}")
    if step.repair < 0 or (step.repair and step.form != "dense"):
        found.append(f"repair is the rank of a correction beside a dense weight; got {step.repair} with {step.form}")
    return found


def _narrow(step: Step, units: Mapping[str, Unit], changed: set[str]) -> list[str]:
    """What is wrong with a step that makes a unit narrower."""
    if step.site not in units:
        return [unknown("unit", step.site, units) if units else f"{step.site}: this model has no units of maps"]
    unit = units[step.site]
    found = []
    if not 1 <= step.rank <= unit.full_rank or step.rank % unit.step:
        multiple = f" and a multiple of {unit.step}" if unit.step > 1 else ""
        found.append(f"{step.site}: width {step.rank} is not from 1 to {unit.full_rank}{multiple}")
    whole = [step.site.rpartition("#")[0] + kind for kind in ("#values", "#queries")] if unit.kind == "heads" else []
    if clash := [name for name in whole if name in changed]:
        found.append(f"{step.site}: heads leave whole, so {', '.join(clash)} cannot become narrower too")
    twice = [name for name in unit.sites if name in changed]
    if twice:
        found.append(f"{step.site}: {', '.join(twice)} would change twice; keep the step of the unit or of the maps")
    if step.method not in MODULES:
        found.append(f"{step.site}: " + unknown("method", step.method, MODULES))
    else:
        try:
            options_for(MODULES[step.method], step.options)
        except InputError as error:
            found.append(f"{step.site}: {error}")
    return found
