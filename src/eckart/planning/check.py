"""Whether a plan can be carried out on a model's sites."""

from __future__ import annotations

from collections.abc import Sequence

from eckart.compression import METHODS, get_method, options_for
from eckart.errors import InputError, problems, unknown
from eckart.layers import supported_forms
from eckart.planning.curve import FORMS
from eckart.planning.plan import Plan, Step
from eckart.records import Site


def check(plan: Plan, sites: Sequence[Site]) -> None:
    """Raise InputError with everything that is wrong with a plan, before any work.

    Checked are sites that do not exist or come twice, forms that are unknown or do not fit the kind of site,
    ranks below 1 or above the full rank, methods that are unknown or do not take the site, and options.
    Sites without a step are no problem: they stay dense.
    """
    by_name = {site.name: site for site in sites}
    found: list[str] = []
    seen: set[str] = set()
    for step in plan.steps:
        if step.site in seen:
            found.append(f"site {step.site!r} has more than one step")
        seen.add(step.site)
        if step.site not in by_name:
            found.append(unknown("site", step.site, by_name))
        elif step.form != "dense":
            found += [f"{step.site}: {why}" for why in _misfits(step, by_name[step.site])]
    if found:
        raise InputError(problems("the plan does not fit the model", found))


def _misfits(step: Step, site: Site) -> list[str]:
    found = []
    if step.form not in FORMS:
        found.append(unknown("form", step.form, FORMS))
    elif step.form not in supported_forms(site):
        slices = f" of {site.slices} slices" if site.slices > 1 else ""
        fitting = ", ".join(supported_forms(site))
        found.append(f"the form {step.form} does not fit a {site.kind} site{slices}; take one of {fitting}")
    if not 1 <= step.rank <= site.full_rank:
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
