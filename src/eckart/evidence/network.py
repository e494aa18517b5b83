"""A byte-level language model small enough to train in seconds, as a function of a table of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

CONTEXT = 8
"""Bytes seen before the one to predict."""
VOCABULARY = 256
EMBEDDING, WIDTH, HIDDEN = 16, 96, 384

Tape = MutableMapping[str, tuple[Tensor, Tensor]]
"""Name of a map → (its inputs x, its outputs y), as a forward pass went by."""


def initial_parameters(generator: torch.Generator) -> dict[str, Tensor]:
    """Random float32 weights of unit gain, zero biases; weights (out, in), the embedding (bytes, width)."""

    def gaussian(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    return {
        "embed.weight": torch.randn(VOCABULARY, EMBEDDING, generator=generator) / 2,
        "mix.weight": gaussian(WIDTH, CONTEXT * EMBEDDING),
        "mix.bias": torch.zeros(WIDTH),
        "up.weight": gaussian(HIDDEN, WIDTH),
        "up.bias": torch.zeros(HIDDEN),
        "down.weight": gaussian(WIDTH, HIDDEN) / 2,
        "down.bias": torch.zeros(WIDTH),
        "head.weight": gaussian(VOCABULARY, WIDTH),
        "head.bias": torch.zeros(VOCABULARY),
    }


def forward(
    parameters: Mapping[str, Tensor],
    contexts: Tensor,
    tape: Tape | None = None,
    beside: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> Tensor:
    """Logits (n, 256) of the byte after each context (n, 8): one residual block between a mix and a head.

    ``beside[name](x, y)`` is added to the output y of that map for its input x, as adapters are.
    """

    def through(name: str, x: Tensor) -> Tensor:
        y = linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])
        if beside is not None and name in beside:
            y = y + beside[name](x, y)
        if tape is not None:
            tape[name] = (x, y)
        return y

    embedded = parameters["embed.weight"][contexts]  # (n, 8, 16)
    if tape is not None:
        tape["embed"] = (contexts, embedded)
    h = through("mix", embedded.flatten(1))
    h = h + through("down", gelu(through("up", layer_norm(h, (WIDTH,)))))
    return through("head", layer_norm(h, (WIDTH,)))


def train(windows: Tensor, steps: int, batch: int, seed: int) -> dict[str, Tensor]:
    """Parameters after ``steps`` of AdamW on uint8 ``windows`` (n, 9): 8 bytes of context and the next one.

    The learning rate 0.01 warms up over 50 steps and falls linearly to zero. About 5 s for 1000 × 256 on
    one thread.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {k: v.requires_grad_() for k, v in initial_parameters(generator).items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        picked = torch.randint(0, windows.shape[0], (batch,), generator=generator)
        sample = windows[picked].long()
        loss = cross_entropy(forward(parameters, sample[:, :CONTEXT]), sample[:, CONTEXT])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return {k: v.detach() for k, v in parameters.items()}
