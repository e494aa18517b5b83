"""Rich and lazy: the tangent kernel against loops and closed forms, alignments, weight change, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.geometry import kernel_alignment, rich_lazy, tangent_kernel


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def test_tangent_kernel_against_a_loop_over_outputs() -> None:
    model = network()
    x = torch.randn(3, 4, dtype=torch.float64)
    rows = []
    for one in x:
        for k in range(2):
            gradients = torch.autograd.grad(model(one[None])[0, k], list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in gradients]))
    J = torch.stack(rows)
    torch.testing.assert_close(tangent_kernel(model, x), J @ J.T)


def test_tangent_kernel_of_a_linear_model_is_the_gram_matrix() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    torch.testing.assert_close(tangent_kernel(model, x), x @ x.T)


def test_only_the_read_out_moved_is_lazy_in_the_representation() -> None:
    before = network()
    after = copy.deepcopy(before)
    after[2].weight.data += 1
    found = rich_lazy(before, after, torch.randn(8, 4), layer="1")
    assert float(found["representation_alignment"]) == pytest.approx(1)
    assert float(found["kernel_alignment"]) < 1
    size = math.sqrt(sum(float(p.detach().square().sum()) for p in before.parameters()))
    assert float(found["weight_change"]) == pytest.approx(math.sqrt(12) / size)


def test_alignment_is_a_cosine() -> None:
    A, B = torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    assert kernel_alignment(A, 5 * A) == pytest.approx(1)
    assert kernel_alignment(A, B) == pytest.approx(2 / math.sqrt(6))
    assert kernel_alignment(B, torch.diag(torch.tensor([0.0, 0.0, 1.0]))) == 0


def test_rank_of_the_start() -> None:
    before = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    before[0].weight.data = torch.outer(torch.ones(6), torch.ones(4))
    found = rich_lazy(before, before, torch.randn(4, 4))
    assert float(found["initial_effective_rank:0.weight"]) == pytest.approx(1)
    assert 1 < float(found["initial_effective_rank:1.weight"]) <= 2
    assert float(found["kernel_alignment"]) == pytest.approx(1)
    assert float(found["weight_change"]) == 0


def test_frozen_parameters_are_left_out_and_the_models_stay_as_they_are() -> None:
    before = network()
    before[0].requires_grad_(False)
    before.train()
    after = copy.deepcopy(before)
    after[2].weight.data *= 3  # the kernel of the last layer depends on its inputs alone
    found = rich_lazy(before, after, torch.randn(5, 4))
    assert float(found["kernel_alignment"]) == pytest.approx(1)
    assert "initial_effective_rank:0.weight" not in found
    assert before.training
    assert all(p.grad is None for p in after.parameters())


def test_a_small_training_step_is_lazy_and_a_large_one_less_so() -> None:
    before, x = network(), torch.randn(10, 4, dtype=torch.float64)
    direction = [torch.randn_like(p) for p in before.parameters()]
    alignments = []
    for size in (1e-3, 0.3, 2.0):
        after = copy.deepcopy(before)
        for p, u in zip(after.parameters(), direction, strict=True):
            p.data += size * u
        alignments.append(float(rich_lazy(before, after, x)["kernel_alignment"]))
    assert alignments[0] == pytest.approx(1, abs=1e-4)
    assert alignments[0] > alignments[1] > alignments[2]


def test_bad_input() -> None:
    model, x = network(), torch.randn(4, 4)
    with pytest.raises(InputError, match="two inputs"):
        rich_lazy(model, model, x[:1])
    with pytest.raises(InputError, match="no submodule 'body'"):
        rich_lazy(model, model, x, layer="body")
    with pytest.raises(MismatchError, match="different parameters"):
        rich_lazy(model, nn.Linear(4, 2), x)
    with pytest.raises(InputError, match="requires a gradient"):
        rich_lazy(copy.deepcopy(model).requires_grad_(False), model, x)
    broken = copy.deepcopy(model)
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(NotFiniteError):
        rich_lazy(model, broken, x)
