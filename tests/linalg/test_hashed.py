"""Seeded numbers that checkpoints are rebuilt from: pinned, and against a twin in Python's integers."""

from __future__ import annotations

import math

import pytest
import torch

from eckart.errors import InputError
from eckart.linalg.hashed import LARGEST_SEED, check_seed, gaussians, permutation, random_bits

MASK = 2**64 - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def naive_bits(seed: int, count: int, stream: int) -> list[int]:
    start = mix((seed + mix(stream + 1)) & MASK)
    return [mix((start + i * 0x9E3779B97F4A7C15) & MASK) for i in range(1, count + 1)]


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (7, 3), (LARGEST_SEED, 2**31)])
def test_bits_are_those_of_splitmix(seed: int, stream: int) -> None:
    assert random_bits(seed, 20, stream).tolist() == naive_bits(seed, 20, stream)


def test_the_stream_never_changes() -> None:
    """Files that hold only a seed depend on it."""
    assert random_bits(0, 2).tolist() == [4720248854425330031, 1629287585893752162]
    assert permutation(0, 8, 2).tolist() == [0, 3, 5, 2, 7, 4, 6, 1]
    torch.testing.assert_close(
        gaussians(0, (3,)),
        torch.tensor([-0.7031246412272363, -0.15468936107959266, -0.7927525970393263], dtype=torch.float64),
    )


def test_permutation_holds_every_index_once_and_depends_on_seed_and_stream() -> None:
    assert permutation(1, 100).sort().values.tolist() == list(range(100))
    assert permutation(1, 100).tolist() != permutation(2, 100).tolist()
    assert permutation(1, 100).tolist() != permutation(1, 100, 1).tolist()


def test_gaussians_are_box_and_mullers() -> None:
    bits = naive_bits(5, 12, 0)
    uniform = [(b >> 11) / 2**53 for b in bits]
    expected = [
        math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)
        for u, v in zip(uniform[:6], uniform[6:], strict=True)
    ]
    found = gaussians(5, (2, 3))
    assert found.shape == (2, 3)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_gaussians_have_the_moments_of_a_normal() -> None:
    z = gaussians(3, (200, 500))
    for power, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert float(z.pow(power).mean()) == pytest.approx(expected, abs=0.06)
    assert float((z[:, 1:] * z[:, :-1]).mean()) == pytest.approx(0, abs=0.02)


def test_no_other_random_stream_is_touched() -> None:
    before = torch.get_rng_state()
    gaussians(0, (5, 5))
    permutation(0, 5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, None])
def test_seed_has_to_fit_into_a_checkpoint(seed: object) -> None:
    with pytest.raises(InputError, match="seed"):
        check_seed(seed, "it")
