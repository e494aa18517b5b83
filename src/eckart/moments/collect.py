"""One pass over the data with hooks, and the moments of every site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from eckart.arch import fingerprint as fingerprint_of
from eckart.arch import site_module
from eckart.errors import InputError, NotFiniteError
from eckart.moments.distributed import processes
from eckart.moments.experts import watch_experts
from eckart.moments.losses import Batch, LossFn
from eckart.moments.observe import Gradients, Observer
from eckart.moments.store import Moments, warn_about
from eckart.moments.tokens import BatchTokens
from eckart.records import Progress, Site, silent


def collect(
    model: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    *,
    loss: LossFn | None = None,
    gradients: Gradients = "full",
    probes: int = 1,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
    fingerprint: str | None = None,
    fisher: bool = True,
    meta: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Moments:
    """Second moments of the inputs and of the output gradients of ``sites``.

    Args:
        model: any module; run in evaluation mode, and left as it was, whatever happens.
        batches: mappings (keyword arguments of the model; ``attention_mask`` and ``decoder_attention_mask``,
            (batch, tokens), mark padding with 0) or tensors. They are moved to the device of the model.
        loss: see :data:`eckart.moments.LossFn`; needed unless ``gradients`` is "none".
        gradients: "full" for E[g gᵀ], "scale" for E‖g‖² alone, "none" for no backward pass.
        probes: how often the loss draws targets or vectors per batch, at least 1; their moments are averaged.
        seed: of those draws, which each batch makes anew, so that they do not depend on ``share``.
        share: (i, n) for batches i, i + n, …: the n shares together have the moments of all batches.
        fingerprint: of the model, where it is known already.
        fisher: with "full", also the row and column sums of the Fisher information. Keeps the inputs of one
            batch for the backward pass.
        meta: JSON values that say what the data are, kept in ``Moments.meta``.

    Even rows, counted over all batches, are half A and odd rows half B. Sites that read one tensor share its
    moments. Memory: the model, the moments and one batch with its activations. Cost: one forward and ``probes``
    backward passes (no weight gradients), and per token in² + probes · out² multiply-adds for each site.

    Raises NotFiniteError that names the first site with NaN or Inf, InputError for data that do not fit the model.
    """
    _check_arguments(batches, sites, loss, gradients, probes, share[1])
    index, shares = share
    observer = Observer(gradients, fisher and gradients == "full")
    first, seen, tokens, units = 0, 0, 0, 0.0
    with torch.inference_mode(False), evaluating(model), watched(model, sites, observer):
        for done, given in enumerate(batches):
            progress("calibrate", done, len(batches))
            rows = BatchTokens.of(given, first)
            first += rows.rows
            if done % shares != index:
                continue
            batch = _moved(given, model)
            generator = draws(seed, done)
            observer.begin(rows)
            with torch.set_grad_enabled(gradients != "none"):
                outputs = model(**batch) if isinstance(batch, Mapping) else model(batch)
                if loss is not None:
                    units += _backward(observer, loss, outputs, batch, generator, probes)
            observer.end()
            seen, tokens = seen + rows.rows, tokens + rows.tokens
            del outputs
    progress("calibrate", len(batches), len(batches))
    for sums in observer.inputs.values():
        sums.finish()
    for gradient in observer.gradient_sums.values():
        gradient.finish()
    order = [site.name for site in sites if site.name in observer.input_of]
    moments = Moments(
        fingerprint_of(model) if fingerprint is None else fingerprint,
        observer.inputs,
        observer.gradient_sums,
        {name: observer.input_of[name] for name in order},
        tokens,
        units if gradients != "none" else float(seen),
        {
            **(meta or {}),
            "gradients": gradients,
            "loss": "none" if loss is None else getattr(loss, "__qualname__", type(loss).__name__).split(".")[0],
            "probes": probes if gradients != "none" else 0,
            "fisher": observer.fisher,
            "seed": seed,
            "batches": len(range(index, len(batches), shares)),
            "torch": torch.__version__,
            "unreached": [site.name for site in sites if site.name not in observer.input_of],
            "unmasked": sorted(observer.unmasked),
            "pooled": {site.name: True for site in sites if site.kind == "experts"},
        },
    )
    if processes() == 1:
        warn_about(moments)
    return moments


def draws(seed: int, batch: int) -> torch.Generator:
    """The generator of one batch's draws. Seeds are hashed, so that neighbouring ones have nothing in common."""
    mixed = sha256(f"{seed} {batch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:4]))


def _check_arguments(
    batches: Sequence[Batch],
    sites: Sequence[Site],
    loss: LossFn | None,
    gradients: Gradients,
    probes: int,
    shares: int,
) -> None:
    if gradients not in ("full", "scale", "none"):
        raise InputError(f"gradients is 'full', 'scale' or 'none'; got {gradients!r}.")
    if (gradients == "none") != (loss is None):
        raise InputError(
            f"gradients are those of a loss: give both, or gradients='none' and no loss; got gradients={gradients!r} "
            f"with {'no loss' if loss is None else 'a loss'}."
        )
    if not len(batches) or probes < 1 or not sites:
        raise InputError(
            f"collect needs batches, sites and at least one probe; got {len(batches)} batches, {len(sites)} sites, "
            f"{probes} probes."
        )
    if len(batches) < shares:
        raise InputError(
            f"{shares} processes cannot share {len(batches)} batches: each needs one. Start fewer processes, take "
            "more samples, or a smaller batch size."
        )


def _backward(
    observer: Observer,
    loss: LossFn,
    outputs: Any,
    batch: Batch,
    generator: torch.Generator,
    probes: int,
) -> float:
    """The backward passes of one batch; returns its units."""
    observer.weight = 1.0 / probes
    units = 0.0
    for probe in range(probes):
        value, count = loss(outputs, batch, generator)
        if not bool(torch.isfinite(value)):
            raise NotFiniteError(
                f"the loss is {float(value)}, though the outputs of all sites are finite. Check the layers between "
                "them and the loss, the data, or calibrate in float32."
            )
        if not value.requires_grad:
            raise InputError("the loss depends on none of the sites, so it says nothing about them.")
        # No weight needs a gradient: what is asked for are the beginnings of the graph, and hooks read the rest.
        torch.autograd.grad(value, observer.leaves, retain_graph=probe < probes - 1, allow_unused=True)
        units += float(count)
    return units / probes


def _moved(batch: Batch, model: nn.Module) -> Batch:
    first = next(model.parameters(), None)
    if first is None or first.device.type == "meta":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(first.device)
    return {name: value.to(first.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients; everything is put back."""
    modes = [(module, module.training) for module in model.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in needs:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in needs:
            parameter.requires_grad_(needed)
        for module, training in modes:
            module.training = training


@contextmanager
def watched(model: nn.Module, sites: Sequence[Site], observer: Observer) -> Iterator[None]:
    """Hooks on the modules of the sites that tell ``observer`` what passes."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("encoder_hidden_states")
        observer.encoder_states = states if isinstance(states, Tensor) else None

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        observer.encoder_states = None

    handles = []
    try:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "decoder" and any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
        for site in sites:
            if site.kind != "experts":
                hook = observer.hook(site)
                handles.append(site_module(model, site).register_forward_hook(hook, with_kwargs=True))
        with watch_experts(model, [site for site in sites if site.kind == "experts"], observer.expert):
            yield
    finally:
        for handle in handles:
            handle.remove()
