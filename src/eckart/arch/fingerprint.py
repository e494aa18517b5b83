"""A model's identity, the same in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn

from eckart.errors import InputError
from eckart.records import Site

_SAMPLE = 1024


def fingerprint(
    model: nn.Module,
    sites: Iterable[Site] | None = None,
    *,
    at_steps: Mapping[str, Callable[[int], Tensor]] | None = None,
) -> str:
    """A sha256 over the names, the shapes and a sample of the numbers of every parameter, in hex.

    The sample is about a thousand entries at equal steps, rounded to bfloat16, so that a model loaded in
    bfloat16 and the same model in float32 agree; float16 rounds otherwise and does not. A change
    that misses the sample goes unnoticed: this tells models apart, it does not seal them. A shared
    parameter counts under each of its names, so that the order of sharing does not matter. Device and
    ``requires_grad`` do not matter; buffers are left out.

    With ``sites``, only their weights and biases count. ``at_steps`` gives, for parameters without numbers here, every
    step-th entry of the flattened weight. Raises InputError for others on the meta device.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if sites is not None:
        parameters = _of_sites(parameters, sites)
    digest = sha256()
    for name, parameter in sorted(parameters.items()):
        if parameter.is_meta and name not in (at_steps or {}):
            raise InputError(f"a fingerprint needs numbers; {name} is on the meta device. Load the weights first.")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(_sample(parameter.detach(), (at_steps or {}).get(name)))
    return digest.hexdigest()


def _of_sites(parameters: dict[str, nn.Parameter], sites: Iterable[Site]) -> dict[str, nn.Parameter]:
    names = set()
    for site in sites:
        names |= {site.name} if site.kind == "experts" else {f"{site.name}.weight", f"{site.name}.bias"}
    return {name: parameter for name, parameter in parameters.items() if name in names}


def _sample(tensor: Tensor, at_steps: Callable[[int], Tensor] | None) -> bytes:
    step = max(1, tensor.numel() // _SAMPLE)
    flat = tensor.reshape(-1)[::step].cpu() if at_steps is None else at_steps(step)
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    return flat.numpy().tobytes()
