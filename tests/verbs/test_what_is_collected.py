"""``eckart.compress`` collects the moments that its method uses, and no others, unless it is asked to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import eckart
from eckart.errors import InputError

COLLECTED = {
    "kfac": ("full", False),
    "modules": ("full", False),
    "fwsvd": ("full", True),
    "whitened": ("none", False),
    "svd": ("none", False),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 30, (8, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids}]


def compressed(model: nn.Module, **options: Any) -> eckart.Compressed:
    return eckart.compress(model, data=batches(), **options)


@pytest.mark.parametrize("method", COLLECTED)
def test_by_method(model: nn.Module, method: str) -> None:
    found = compressed(model, method=method, keep=0.6)
    assert (found.calibration["gradients"], found.calibration["fisher"]) == COLLECTED[method]
    planned = compressed(model, plan=found.plan)
    assert (planned.calibration["gradients"], planned.calibration["fisher"]) == COLLECTED[method]
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, planned.model.state_dict()[name])


def test_what_is_asked_for_comes_first(model: nn.Module) -> None:
    assert compressed(model, method="whitened", keep=0.6, gradients="full").calibration["gradients"] == "full"
    with pytest.raises(InputError, match="gradients"):
        compressed(model, method="kfac", keep=0.6, gradients="none")
    with pytest.raises(InputError, match="gradients"):
        compressed(model, method="whitened", keep=0.6, probes=2)
