"""The problem that claims are tested on: a language model of Python source, with learned weights.

Random matrices would not do: they have flat spectra, inputs without structure and no loss. Here a small
network (:mod:`eckart.evidence.network`) learns to predict the next byte of Python's standard library, as
installed, in about five seconds. Modules are split by name, so that the rise of the loss is measured on
files that neither the training nor the calibration has seen. Figures differ a little between Python
versions, since the text does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eckart.data import read_texts
from eckart.errors import InputError, unknown
from eckart.evidence.network import CONTEXT, EMBEDDING, HIDDEN, VOCABULARY, WIDTH, forward, train
from eckart.forms import Form
from eckart.moments import SiteMoments
from eckart.records import Site

SITES = (
    Site(name="embed", kind="embedding", out_features=EMBEDDING, in_features=VOCABULARY, role="embed"),
    Site(name="mix", kind="linear", out_features=WIDTH, in_features=CONTEXT * EMBEDDING, bias=True),
    Site(name="up", kind="linear", out_features=HIDDEN, in_features=WIDTH, bias=True, role="up", depth=0),
    Site(name="down", kind="linear", out_features=WIDTH, in_features=HIDDEN, bias=True, role="down", depth=0),
    Site(name="head", kind="linear", out_features=VOCABULARY, in_features=WIDTH, bias=True, role="head"),
)
"""The maps of the network. ``up`` and ``head`` read the output of a layer norm, so their centred
covariance is singular, as in real transformers; ``up`` is tall, ``down`` and ``mix`` are wide."""

MODULES = 200
"""Source files read of either part of the standard library."""

HELD_OUT_BYTES = 20_000
"""Predictions behind every figure of :meth:`Problem.rise`."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A trained network, the text to calibrate on and the text to judge on."""

    parameters: Mapping[str, Tensor]
    """``"up.weight"`` → float32 tensor; see :func:`eckart.evidence.network.initial_parameters`."""
    calibration: Tensor
    """(n, 9) uint8 windows of modules of the calibration part, the ones trained on."""
    held_out: Tensor
    """(20 000, 9) uint8 windows of modules of the evaluation part."""
    loss: float
    """Cross-entropy of the network on ``held_out``, nats per byte."""

    def weights(self, name: str) -> dict[str, Tensor]:
        """``{"weight": (out, in), "bias": (out,)}`` of a map, float32; the embedding transposed, no bias."""
        if name not in {site.name for site in SITES}:
            raise InputError(unknown("map", name, [site.name for site in SITES]))
        if name == "embed":
            return {"weight": self.parameters["embed.weight"].T.contiguous()}
        return {"weight": self.parameters[f"{name}.weight"], "bias": self.parameters[f"{name}.bias"]}

    def contexts(self, tokens: int = 8192, seed: int = 0, *, held_out: bool = False) -> Tensor:
        """(tokens, 8) byte values drawn by ``seed`` from the calibration text, or from the held-out one."""
        windows = self.held_out if held_out else self.calibration
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randint(0, windows.shape[0], (tokens,), generator=generator)
        return windows[picked, :CONTEXT].long()

    def inputs(self, tokens: int = 8192, seed: int = 0, *, held_out: bool = False) -> dict[str, Tensor]:
        """What each linear map reads, (tokens, in) float64, on the same draw as :meth:`moments`."""
        tape: dict[str, tuple[Tensor, Tensor]] = {}
        parameters = {k: v.double() for k, v in self.parameters.items()}
        forward(parameters, self.contexts(tokens, seed, held_out=held_out), tape)
        return {name: x for name, (x, _) in tape.items() if name != "embed"}

    def frequencies(self, tokens: int = 8192, seed: int = 0, *, held_out: bool = False) -> Tensor:
        """(256,) float64: how often the embedding looks up each byte, summing to 1."""
        contexts = self.contexts(tokens, seed, held_out=held_out)
        return contexts.flatten().bincount(minlength=VOCABULARY).double() / contexts.numel()

    def moments(self, tokens: int = 8192, seed: int = 0) -> dict[str, SiteMoments]:
        """Moments of every map over ``tokens`` predictions drawn from the calibration text by ``seed``.

        Targets are sampled from the network's own prediction, so the gradients are those of the true
        Fisher information and no label is used. Float64, about a second for 8192 tokens.
        """
        contexts = self.contexts(tokens, seed)
        # requires_grad on all, so that every output of a map is part of the graph.
        parameters = {k: v.double().requires_grad_() for k, v in self.parameters.items()}
        tape: dict[str, tuple[Tensor, Tensor]] = {}
        logits = forward(parameters, contexts, tape)
        generator = torch.Generator().manual_seed(seed)
        targets = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = cross_entropy(logits, targets, reduction="sum")
        gradients = torch.autograd.grad(loss, [y for _, y in tape.values()])
        return {
            name: _embedding_moments(x, g, tokens) if name == "embed" else _linear_moments(x.detach(), g)
            for (name, (x, _)), g in zip(tape.items(), gradients, strict=True)
        }

    def rise(self, forms: Mapping[str, Form]) -> float:
        """How much the held-out loss rises (nats per byte) when the named maps are replaced by ``forms``."""
        parameters = dict(self.parameters)
        for name, form in forms.items():
            weight = form.dense().to(torch.float32)
            if weight.shape != self.weights(name)["weight"].shape:
                raise InputError(
                    f"map {name!r} is {tuple(self.weights(name)['weight'].shape)}; "
                    f"the form given for it is {tuple(weight.shape)}."
                )
            parameters[f"{name}.weight"] = weight.T if name == "embed" else weight
            if form.bias is not None:
                parameters[f"{name}.bias"] = form.bias.to(torch.float32)
        return _held_out_loss(parameters, self.held_out) - self.loss


def _linear_moments(x: Tensor, g: Tensor) -> SiteMoments:
    """Moments of y = W x from inputs x (n, in) and gradients g (n, out), one row per token."""
    n = x.shape[0]
    x_norms, g_norms = x.square().sum(1), g.square().sum(1)
    return SiteMoments(
        count=n,
        mean=x.mean(0),
        second=x.T @ x / n,
        gradient=g.T @ g / n,
        gradient_scale=float(g_norms.mean()),
        fisher_rows=g.square().T @ x_norms / n,
        fisher_columns=x.square().T @ g_norms / n,
    )


def _embedding_moments(entries: Tensor, g: Tensor, units: int) -> SiteMoments:
    """Moments of a table from look-ups and their gradients (…, width): x is one-hot, E[x xᵀ] diagonal."""
    entries, g = entries.flatten(), g.flatten(0, -2)
    n = entries.numel()
    g_norms = g.square().sum(1)
    zeros = torch.zeros(VOCABULARY, dtype=g.dtype)
    return SiteMoments(
        count=n,
        second=zeros.index_add(0, entries, torch.ones_like(g_norms)) / n,
        gradient=g.T @ g / n,
        gradient_scale=float(g_norms.mean()),
        fisher_rows=g.square().mean(0),
        fisher_columns=zeros.index_add(0, entries, g_norms) / n,
        tokens_per_unit=n / units,
    )


@torch.no_grad()
def _held_out_loss(parameters: Mapping[str, Tensor], windows: Tensor) -> float:
    sample = windows.long()
    return float(cross_entropy(forward(parameters, sample[:, :CONTEXT]), sample[:, CONTEXT]))


def _windows(part: Literal["calibration", "evaluation"]) -> Tensor:
    """(n, 9) uint8: every run of nine bytes within the modules of one part."""
    texts = read_texts("stdlib:source", part=part, limit=MODULES).texts
    modules = [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for text in texts]
    return torch.cat([m.unfold(0, CONTEXT + 1, 1) for m in modules if m.numel() > CONTEXT])


@functools.cache
def learned_problem() -> Problem:
    """The one problem of this process, trained on first use (about 5 s on one thread) from fixed seeds."""
    calibration, evaluation = _windows("calibration"), _windows("evaluation")
    generator = torch.Generator().manual_seed(1)
    held_out = evaluation[torch.randint(0, evaluation.shape[0], (HELD_OUT_BYTES,), generator=generator)]
    parameters = train(calibration, steps=1000, batch=256, seed=0)
    return Problem(
        parameters=parameters,
        calibration=calibration,
        held_out=held_out,
        loss=_held_out_loss(parameters, held_out),
    )
