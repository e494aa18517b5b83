"""The network of :mod:`eckart.evidence` as a module, trained on the same text: what claims of training share."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm

from eckart.evidence.network import CONTEXT, EMBEDDING, HIDDEN, VOCABULARY, WIDTH, initial_parameters
from eckart.evidence.problem import learned_problem
from eckart.linalg import truncated_svd

BATCH = 256
"""Predictions per step."""


class ByteModel(nn.Module):
    """Logits (n, 256) of the byte after each context (n, 8), as :func:`eckart.evidence.network.forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, EMBEDDING)
        self.mix = nn.Linear(CONTEXT * EMBEDDING, WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, contexts: Tensor) -> Tensor:
        h = self.mix(self.embed(contexts).flatten(1))
        h = h + self.down(gelu(self.up(layer_norm(h, (WIDTH,)))))
        logits: Tensor = self.head(layer_norm(h, (WIDTH,)))
        return logits


def untrained(seed: int = 0) -> ByteModel:
    """The model with random weights, those that the learned problem began with for seed 0."""
    model = ByteModel()
    model.load_state_dict(initial_parameters(torch.Generator().manual_seed(seed)))
    return model


def plainly_trained() -> ByteModel:
    """The model with the weights of the learned problem: 1000 steps of :func:`train` and nothing else."""
    model = ByteModel()
    model.load_state_dict(dict(learned_problem().parameters))
    return model


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    total: Callable[[Callable[[], Tensor]], Tensor] = lambda loss: loss(),
) -> None:
    """The loop of :func:`eckart.evidence.network.train`: 0.01 warmed up over 50 steps, then linearly to zero.

    ``total`` gets a function that computes the loss of the batch, and returns what is differentiated. About 6 s for
    1000 steps on one thread.
    """
    windows = learned_problem().calibration
    generator = torch.Generator().manual_seed(seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / 50) * (1 - step / steps)
        sample = windows[torch.randint(0, windows.shape[0], (BATCH,), generator=generator)].long()

        def loss(sample: Tensor = sample) -> Tensor:
            return cross_entropy(model(sample[:, :CONTEXT]), sample[:, CONTEXT])

        optimizer.zero_grad()
        torch.autograd.backward(total(loss))
        optimizer.step()


@torch.no_grad()
def truncated(model: ByteModel, ranks: Mapping[str, int]) -> ByteModel:
    """The same model, the named weights replaced by their best approximation of the given rank."""
    for name, rank in ranks.items():
        weight = model.get_parameter(f"{name}.weight")
        svd = truncated_svd(weight, rank)
        weight.copy_((svd.U * svd.S) @ svd.Vh)
    return model


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    """Cross-entropy on the held-out text of the learned problem, nats per byte."""
    sample = learned_problem().held_out.long()
    return float(cross_entropy(model(sample[:, :CONTEXT]), sample[:, CONTEXT]))
