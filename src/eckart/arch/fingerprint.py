"""A model's identity, the same in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

import torch
from torch import Tensor, nn

from eckart.errors import InputError
from eckart.records import Site

_SAMPLE = 1024


def fingerprint(model: nn.Module, sites: Iterable[Site] | None = None) -> str:
    """A sha256 over the names, the shapes and a sample of the numbers of every parameter, in hex.

    The sample is about a thousand entries at equal steps, rounded to bfloat16, so that a model loaded in
    bfloat16 and the same model in float32 agree; float16 rounds otherwise and does not. A change
    that misses the sample goes unnoticed: this tells models apart, it does not seal them. A shared
    parameter counts under each of its names, so that the order of sharing does not matter. Device and
    ``requires_grad`` do not matter; buffers are left out.

    With ``sites``, only their weights and biases count. Raises InputError for a model on the meta device.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if sites is not None:
        parameters = _of_sites(parameters, sites)
    digest = sha256()
    for name, parameter in sorted(parameters.items()):
        if parameter.is_meta:
            raise InputError(f"a fingerprint needs numbers; {name} is on the meta device. Load the weights first.")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(_sample(parameter.detach()))
    return digest.hexdigest()


def _of_sites(parameters: dict[str, nn.Parameter], sites: Iterable[Site]) -> dict[str, nn.Parameter]:
    names = set()
    for site in sites:
        names |= {site.name} if site.kind == "experts" else {f"{site.name}.weight", f"{site.name}.bias"}
    return {name: parameter for name, parameter in parameters.items() if name in names}


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    flat = flat[:: max(1, flat.numel() // _SAMPLE)].cpu()
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    return flat.numpy().tobytes()
