"""Interaction basis: planted degeneracy is counted and goes, the rest is kept exactly, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eckart.errors import InputError, NotFiniteError
from eckart.geometry import degenerate_directions, interaction_bases


def degenerate_network(twins: int, unread: int) -> list[nn.Module]:
    """5 → relu 8 → 9: the first ``twins`` pairs of neurons are equal, the last ``unread`` have no outgoing weight."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, 8), nn.Linear(8, 9)
    with torch.no_grad():
        for i in range(twins):
            first.weight[2 * i + 1], first.bias[2 * i + 1] = first.weight[2 * i], first.bias[2 * i]
        last.weight[:, 8 - unread :] = 0
    return [nn.Sequential(first, nn.ReLU()), last]


@pytest.mark.parametrize(("twins", "unread"), [(0, 0), (1, 0), (0, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twins_and_unread_neurons_are_counted(twins: int, unread: int, dtype: torch.dtype) -> None:
    layers = [layer.to(dtype) for layer in degenerate_network(twins, unread)]
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = degenerate_directions(layers, x)
    assert (found["1"].details["constant"], found["1"].details["unread"]) == (twins, unread)
    assert float(found["1"]) == twins + unread
    assert found["1"].details["kept"] == 8 - twins - unread
    # Of the 5 inputs no more are read than there are distinct neurons left, so degeneracy travels backwards.
    assert float(found["0"]) == max(0, 5 - (8 - twins - unread))


def test_what_is_dropped_has_no_effect_and_the_rest_is_kept() -> None:
    layers = [layer.double() for layer in degenerate_network(1, 1)]
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = interaction_bases(layers, x)[1]
    with torch.no_grad():
        a = layers[0](x)
        torch.testing.assert_close(layers[1](basis.project(a)), layers[1](a))
        assert not torch.allclose(basis.project(a), a)  # the unread neuron is at its mean


def test_coordinates_invert_and_have_the_importance_as_variance() -> None:
    layers = [layer.double() for layer in degenerate_network(1, 2)]
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = interaction_bases(layers, x)[1]
    k = basis.importance.numel()
    torch.testing.assert_close(basis.to_basis.T @ basis.from_basis, torch.eye(k, dtype=torch.float64))
    with torch.no_grad():
        coordinates = (layers[0](x) - basis.mean) @ basis.to_basis
    torch.testing.assert_close(coordinates.T @ coordinates / 400, basis.importance.diag())
    assert bool((basis.importance.diff() <= 0).all())


def test_a_linear_layer_has_the_singular_values_of_its_whitened_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 1.0, 0.2])
    W = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    (basis,) = interaction_bases([lambda a: a @ W.T], x)
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / 200
    values, U = torch.linalg.eigh(covariance)
    expected = torch.linalg.svdvals(W @ (U * values.sqrt())).square()
    torch.testing.assert_close(basis.importance, expected)


def test_importance_does_not_depend_on_how_the_hidden_layer_is_written() -> None:
    """An invertible map into the hidden layer, undone by the next, changes nothing but the coordinates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    W, V, T = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 4), (3, 5), (5, 5)))
    inverse = torch.linalg.inv(T)
    plain = interaction_bases([lambda a: (a @ W.T).tanh(), lambda a: a @ V.T], x)[1]
    twisted = interaction_bases([lambda a: (a @ W.T).tanh() @ T.T, lambda a: a @ inverse.T @ V.T], x)[1]
    torch.testing.assert_close(plain.importance, twisted.importance)


def test_few_samples_are_said() -> None:
    found = degenerate_directions([nn.Linear(6, 3)], torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert "4 samples in 6 dimensions" in found["0"].notes[0]
    assert found["0"].details["constant"] == 3


def test_bad_input() -> None:
    x = torch.randn(10, 3)
    with pytest.raises(InputError, match="got 0, 10"):
        interaction_bases([], x)
    with pytest.raises(InputError, match="rtol"):
        interaction_bases([nn.Linear(3, 3)], x, rtol=2.0)
    with pytest.raises(InputError, match="does not vary"):
        interaction_bases([nn.Linear(3, 3)], torch.ones(10, 3) / 3)
    with pytest.raises(InputError, match="nothing reacts"):
        interaction_bases([lambda a: 0 * a], x)
    with pytest.raises(InputError, match="layer 0: expected"):
        interaction_bases([lambda a: a.sum(1)], x)

    def broken(a: Tensor) -> Tensor:
        return a / 0

    with pytest.raises(NotFiniteError, match="layer 0"):
        interaction_bases([broken], x)
