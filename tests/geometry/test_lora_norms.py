"""LoRA norms: the figures against loops over entries, no verdict, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import lora_norms


def test_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    X, W, A, B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((10, 4), (5, 4), (2, 4), (5, 2)))
    frozen = update = both = 0.0
    for x in X:
        for i in range(5):
            w = sum(float(W[i, j] * x[j]) for j in range(4))
            u = 3.0 / 2 * sum(float(B[i, k] * A[k, j] * x[j]) for k in range(2) for j in range(4))
            frozen, update, both = max(frozen, abs(w)), max(update, abs(u)), max(both, abs(w + u))
    found = lora_norms(X, W, A, B, alpha=3.0)
    root = math.sqrt(math.log(10))
    assert float(found["frozen_norm_ratio"]) == pytest.approx(frozen / root)
    assert float(found["adapter_norm_ratio"]) == pytest.approx(update / root)
    assert float(found["adapted_norm_ratio"]) == pytest.approx(both / root)


def test_a_fresh_adapter_adds_nothing() -> None:
    X, W, A = torch.randn(8, 4), torch.randn(4, 4), torch.randn(2, 4)
    found = lora_norms(X, W, A, torch.zeros(4, 2), alpha=16)
    assert float(found["adapter_norm_ratio"]) == 0
    assert float(found["adapted_norm_ratio"]) == float(found["frozen_norm_ratio"])


def test_it_compares_and_does_not_judge() -> None:
    X = torch.ones(4096, 1)
    found = lora_norms(X, torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), alpha=1)["adapted_norm_ratio"]
    assert found.details["root_log_tokens"] == pytest.approx(2.884, abs=1e-3)
    assert "compare, do not judge" in found.notes[0]


def test_bad_input() -> None:
    X, W, A, B = torch.ones(1, 4), torch.ones(5, 4), torch.ones(2, 3), torch.ones(5, 2)
    with pytest.raises(InputError, match=r"(?s)two tokens.*\(L, in\).*alpha"):
        lora_norms(X, W, A, B, alpha=math.nan)
    with pytest.raises(NotFiniteError):
        lora_norms(X * math.inf, W, A, B, alpha=1)
