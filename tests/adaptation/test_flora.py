"""FLoRA: the Tucker product term by term, and its rank along every direction."""

from __future__ import annotations

import pytest
import torch

from eckart.adaptation import Layout, Source
from eckart.adaptation.flora import FloraDelta, Options
from eckart.errors import InputError

LAYOUT = Layout(name="conv", kind="conv", out_features=5, in_features=4 * 3 * 2, slices=2, kernel=(3, 2))


def random_delta(options: Options, rank: int = 2) -> FloraDelta:
    delta = FloraDelta(LAYOUT, rank, options)
    delta.start(Source(layout=LAYOUT, weight=torch.ones(2, 5, 24)))
    delta.fill(G=torch.randn(delta.G.shape, generator=torch.Generator().manual_seed(1)))
    return delta


def test_is_the_sum_over_the_core() -> None:
    delta = random_delta(Options(kernel_rank=2, scale=3.0))
    naive = torch.zeros(2, 5, 4, 3, 2)
    for s in range(2):
        for a in range(2):
            for b in range(2):
                for c in range(2):
                    for d in range(2):
                        outer = torch.einsum(
                            "o,i,k,l->oikl",
                            delta.Out[s, :, a],
                            delta.In[s, :, b],
                            delta.K0[s, :, c],
                            delta.K1[s, :, d],
                        )
                        naive[s] += 3.0 * delta.G[s, a, b, c, d] * outer
    torch.testing.assert_close(delta.delta(), naive.reshape(2, 5, 24), rtol=1e-5, atol=1e-6)


def test_rank_along_every_direction() -> None:
    change = random_delta(Options(kernel_rank=1)).delta().detach().double()[0].reshape(5, 4, 3, 2)
    ranks = [int(torch.linalg.matrix_rank(change.movedim(i, 0).flatten(1), rtol=1e-5)) for i in range(4)]
    assert ranks == [2, 2, 1, 1]


def test_columns_are_those_that_unfold_gives() -> None:
    """The layer computes with the weight that ΔW is, channel by channel and position by position of the kernel."""
    delta = random_delta(Options(kernel_rank=2))
    kernel = delta.delta().reshape(10, 4, 3, 2)
    x = torch.randn(2, 8, 6, 6)
    patches = torch.nn.functional.unfold(x[:, :4], (3, 2))
    whole = torch.nn.functional.conv2d(x, kernel, groups=2)[:, :5].flatten(2)
    torch.testing.assert_close(delta.delta()[0] @ patches, whole, rtol=1e-4, atol=1e-5)


def test_never_more_columns_than_the_tensor_has() -> None:
    delta = FloraDelta(LAYOUT, 5, Options(kernel_rank=9))
    assert tuple(delta.G.shape) == (2, 5, 4, 3, 2)


def test_options_out_of_range_are_named_together() -> None:
    with pytest.raises(InputError, match="2 problems"):
        Options(kernel_rank=0, scale=-1.0)
