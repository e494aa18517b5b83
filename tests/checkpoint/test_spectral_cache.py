"""Decompositions on disk: found again by the weight, made anew where anything is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eckart.checkpoint import read_header
from eckart.checkpoint.spectral_cache import SpectralCache
from eckart.errors import FileError, InputError


def weight(seed: int, m: int = 60, n: int = 50) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def test_cold_and_warm_give_the_same_numbers(tmp_path: Path) -> None:
    W = weight(0)
    cold = SpectralCache(tmp_path)(W, 8)
    assert len(list(tmp_path.iterdir())) == 1
    warm = SpectralCache(tmp_path)(W.clone(), 8)
    for name in ("U", "S", "Vh"):
        assert torch.equal(getattr(cold, name), getattr(warm, name))
    torch.testing.assert_close(cold.S, torch.linalg.svdvals(W.double())[:8], atol=1e-5, rtol=1e-5)
    assert cold.U.dtype == torch.float64


def test_fewer_are_cut_and_more_are_made(tmp_path: Path) -> None:
    cache, W = SpectralCache(tmp_path), weight(1)
    many = cache(W, 12)
    stamp = cache.path(W).stat().st_mtime_ns
    few = cache(W, 5)
    assert torch.equal(few.U, many.U[:, :5])
    assert cache.path(W).stat().st_mtime_ns == stamp
    assert cache(W, 20).S.shape == (20,)
    assert read_header(cache.path(W))["S"].shape == (20,)


def test_another_weight_seed_or_dtype_is_another_file(tmp_path: Path) -> None:
    cache, W = SpectralCache(tmp_path), weight(2)
    changed = W.clone()
    changed[3, 4] += 1e-6
    paths = {cache.path(W), cache.path(changed), cache.path(W.bfloat16()), cache.path(W.T)}
    assert len(paths | {SpectralCache(tmp_path, seed=1).path(W)}) == 5
    assert cache.path(W) == cache.path(W.T.contiguous().T)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    cache, W = SpectralCache(tmp_path), weight(3)
    whole = cache(W, 6)
    path = cache.path(W)
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-50], "text": b"no safetensors", "empty": b""}[damage])
    again = cache(W, 6)
    assert torch.equal(again.U, whole.U)
    assert path.read_bytes() == raw


def test_fill_goes_on_where_it_stopped(tmp_path: Path) -> None:
    weights = {f"layer{i}": weight(i) for i in range(4)}
    told: list[tuple[str, int, int]] = []

    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped

    cache = SpectralCache(tmp_path)
    with pytest.raises(Stopped):
        cache.fill(weights, 6, progress=stop)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(stamps) == 2
    cache.fill(weights, 6, progress=lambda *what: told.append(what))
    assert told[0] == ("decompose", 0, 4)
    assert told[-1] == ("decompose", 4, 4)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert len(list(tmp_path.iterdir())) == 4


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rank up to"):
        SpectralCache(tmp_path)(weight(0), 51)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is a file"):
        SpectralCache(tmp_path / "file")
