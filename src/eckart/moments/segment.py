"""Moments of a part of a model that runs alone, its inputs and output gradients being known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import InputError, NotFiniteError
from eckart.moments.collect import evaluating, watched
from eckart.moments.experts import watch_experts
from eckart.moments.losses import Batch
from eckart.moments.observe import Gradients, Observer
from eckart.moments.store import Moments
from eckart.moments.tokens import BatchTokens
from eckart.records import Site


@dataclass(frozen=True)
class Passage:
    """One batch on its way through the part."""

    batch: Batch
    """What the whole model got; says which rows are padding."""
    entering: Tensor
    """What the part gets."""
    call: Callable[[Tensor], Tensor]
    """The part itself."""
    gradients: Sequence[Tensor] = ()
    """∂loss/∂output, one per probe; none where no backward pass is wanted."""


def collect_segment(
    model: nn.Module,
    sites: Sequence[Site],
    passages: Iterable[Passage],
    *,
    gradients: Gradients,
    fisher: bool,
    fingerprint: str,
    units: float,
    meta: Mapping[str, Any] | None = None,
    arrived: Callable[[int, int, Tensor], None] | None = None,
    experts: Mapping[str, Sequence[int]] | None = None,
) -> Moments:
    """What :func:`eckart.moments.collect` finds at ``sites``, from the part of ``model`` that holds them.

    A loss enters as its gradients at the output of the part, so a model can be walked through from its last part to
    its first with one part in memory: ``arrived(batch, probe, gradient)`` is told the gradients at the input,
    which are those at the output of the part before. ``units`` as the loss counted them. Without sites only
    the gradients are passed on. Of a mixture, ``experts`` names by site those whose moments are wanted: they become
    slices 0, 1, … of the site, and all others together the last one, so that their mean is that of all.

    Raises NotFiniteError that names a site, InputError where the part gives no gradient. Cost: one forward pass and,
    per probe, one backward pass of the part; moments as in ``collect``.
    """
    observer = Observer(gradients, fisher)
    first, tokens = 0, 0
    slots = {name: {expert: slot for slot, expert in enumerate(chosen)} for name, chosen in (experts or {}).items()}
    plain = [site for site in sites if site.name not in slots]
    mixed = [
        replace(site, slices=len(slots[site.name]) + (len(slots[site.name]) < site.slices))
        for site in sites
        if site.name in slots
    ]

    def expert(site: Site, index: int, inputs: Tensor, output: Tensor, rows: Tensor, total: int) -> Tensor:
        if not bool(torch.isfinite(inputs).all()):
            raise NotFiniteError(f"{site.name}[{index}]: NaN or infinite numbers in its input. Nothing was written.")
        own = slots[site.name]
        return observer.expert(site, own.get(index, len(own)), inputs, output, rows, total)

    with (
        torch.inference_mode(False),
        evaluating(model),
        watched(model, plain, observer),
        watch_experts(model, mixed, expert),
    ):
        for index, passage in enumerate(passages):
            rows = BatchTokens.of(passage.batch, first)
            first, tokens = first + rows.rows, tokens + rows.tokens
            entering = passage.entering.detach()
            backward = bool(passage.gradients)
            observer.begin(rows)
            with torch.set_grad_enabled(backward):
                output = passage.call(entering.requires_grad_(backward))
            observer.weight = 1.0 / max(len(passage.gradients), 1)
            for probe, gradient in enumerate(passage.gradients):
                if not output.requires_grad:
                    raise InputError("this part of the model runs without gradients. Take a method that needs none.")
                more = probe < len(passage.gradients) - 1
                (found,) = torch.autograd.grad(output, entering, gradient, retain_graph=more)
                if arrived is not None:
                    arrived(index, probe, found)
            observer.end()
            del output
    for sums in observer.inputs.values():
        sums.finish()
    for gradient_sums in observer.gradient_sums.values():
        gradient_sums.finish()
    lost = [site.name for site in sites if site.name not in observer.input_of]
    if lost:
        raise InputError(f"no calibration token reached {len(lost)} sites, as {lost[0]}. Exclude them.")
    return Moments(
        fingerprint,
        observer.inputs,
        observer.gradient_sums,
        {site.name: observer.input_of[site.name] for site in sites},
        tokens,
        units,
        {
            **(meta or {}),
            "unmasked": sorted(observer.unmasked),
            "pooled": {site.name: True for site in sites if site.kind == "experts"},
        },
    )
