"""Models of every kind of layer that adapters serve, small enough to train in milliseconds. Imports no Eckart, so that
a process without it can build them too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

KINDS = ("linear", "conv1d", "dilated", "grouped", "circular", "conv1", "conv3", "table")
LANGUAGE = ("linear", "conv1d")


class Images(nn.Module):
    """Two convolutions and a head."""

    def __init__(self, middle: nn.Module, channels: int = 8) -> None:
        super().__init__()
        dims = middle.weight.ndim - 2  # type: ignore[operator, union-attr]
        first: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.stem = first(3, channels, 1)
        self.middle = middle
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.middle(torch.relu(self.stem(x))))
        return self.head(h.flatten(2).mean(2))


class Words(nn.Module):
    """An embedding table and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)).mean(1))


def build(kind: str) -> nn.Module:
    """The model of a kind, always the same."""
    torch.manual_seed(7)
    if kind == "linear":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=50,
            )
        ).eval()
    if kind == "conv1d":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=1)
        ).eval()
    if kind == "table":
        return Words().eval()
    middle: dict[str, nn.Module] = {
        "dilated": nn.Conv2d(8, 8, 3, dilation=2, padding=2),
        "grouped": nn.Conv2d(8, 12, 3, groups=2, stride=2, padding=1),
        "circular": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        "conv1": nn.Conv1d(8, 8, 5, padding="same", padding_mode="reflect"),
        "conv3": nn.Conv3d(8, 8, 3, padding=1),
    }
    return Images(middle[kind], channels=8).eval() if kind != "grouped" else _grouped(middle[kind])


def _grouped(middle: nn.Module) -> nn.Module:
    model = Images(middle)
    model.head = nn.Linear(12, 5)
    return model.eval()


def targets(kind: str) -> str | list[str]:
    """What an adapter is put on."""
    return "all-linear" if kind in LANGUAGE else ["table"] if kind == "table" else ["middle"]


def inputs(kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind in LANGUAGE:
        return torch.randint(0, 50, (3, 7), generator=generator)
    if kind == "table":
        return torch.randint(0, 30, (4, 6), generator=generator)
    sizes = {"conv1": (9,), "conv3": (5, 5, 5)}.get(kind, (9, 9))
    return torch.randn(4, 3, *sizes, generator=generator).to(dtype)


def outputs(model: nn.Module, kind: str, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        found = model(inputs(kind, dtype))
    return found.logits if kind in LANGUAGE else found
