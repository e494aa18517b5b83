"""Small real problems that claims of this room share: which kind of byte follows eight bytes of Python source."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eckart.data import read_texts

CONTEXT = 8
"""Bytes seen before the one whose kind is predicted."""
KINDS = 5
"""Letter, digit, white space, underscore or bracket, anything else."""


def _kind_of(byte: int) -> int:
    character = chr(byte)
    if character.isascii() and character.isalpha():
        return 0
    if character.isdigit():
        return 1
    if character.isspace():
        return 2
    return 3 if character in "_()[]{}" else 4


@functools.cache
def byte_kinds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 64) bits of the contexts as ±1, (count,) kinds of the byte that follows, from the standard library."""
    texts = read_texts("stdlib:source", part="calibration", limit=40).texts
    modules = [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for text in texts]
    windows = torch.cat([m.unfold(0, CONTEXT + 1, 1) for m in modules if m.numel() > CONTEXT])
    picked = torch.randint(0, windows.shape[0], (count,), generator=torch.Generator().manual_seed(seed))
    sample = windows[picked]
    bits = (sample[:, :CONTEXT, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    kinds = torch.tensor([_kind_of(byte) for byte in range(256)])
    return bits.flatten(1).float() * 2 - 1, kinds[sample[:, CONTEXT].long()]


def classifier(width: int, seed: int, classes: int = KINDS) -> nn.Sequential:
    """A network of one hidden layer with random weights drawn by ``seed``, float32."""
    model = nn.Sequential(nn.Linear(8 * CONTEXT, width), nn.Tanh(), nn.Linear(width, classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p.shape[1] ** -0.5 if p.ndim == 2 else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


Model = TypeVar("Model", bound=nn.Module)


def fit(model: Model, x: Tensor, y: Tensor, *, steps: int, lr: float) -> Model:
    """``steps`` of full-batch Adam on the cross-entropy, the rate falling linearly to zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(x), y))
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows classified right."""
    return float((model(x).argmax(1) == y).double().mean())


@functools.cache
def trained_byte_classifier() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A trained float64 classifier of 16 hidden units (1125 parameters) and its loss on 512 samples; about a second."""
    x, y = byte_kinds(512, 0)
    model = fit(classifier(16, 0), x, y, steps=300, lr=1e-2).double()
    x = x.double()
    return model, lambda m: cross_entropy(m(x), y)
