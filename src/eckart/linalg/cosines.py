"""The orthonormal cosine transform (DCT-II) without its matrix, and single columns of it."""

from __future__ import annotations

import functools
import math

import scipy.fft
import torch
from torch import Tensor

from eckart.errors import InputError

MATMUL_UP_TO = 2048
"""Size from which the FFT takes over from the product with the basis, off the CPU."""


def dct(X: Tensor, dim: int = -1, *, overwrite: bool = False) -> Tensor:
    """X Q along ``dim``, of size n: y_k = c_k Σ_j x_j cos(π (2j + 1) k / 2n), c_0 = √(1/n), else √(2/n). Like X.

    Q is orthogonal, so norms stay and :func:`inverse_dct` takes it back. O(n log n) a vector on the CPU (pocketfft, on
    X's own memory; fastest along the contiguous dimension); elsewhere the product with Q up to n = 2048 and torch's
    FFT above. Float64 and float32 are transformed as such, halves in float32. Autograd runs through it. ``overwrite``:
    X is not needed any more, and its memory may be used for the result.

    Raises InputError for integers, complex numbers, scalars and an empty dimension.
    """
    return _transform(X, dim, inverse=False, overwrite=overwrite)


def inverse_dct(X: Tensor, dim: int = -1) -> Tensor:
    """X Qᵀ along ``dim``: the inverse of :func:`dct`, at its cost."""
    return _transform(X, dim, inverse=True)


def dct_columns(
    n: int, index: Tensor, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The columns ``index`` (…, r) of Q as (…, n, r), on ``device`` (by default the index'): a look-up of n r cosines.

    ``dct(X)[..., index]`` is ``X @ dct_columns(n, index)``. Raises InputError for n < 1; indices have to lie in [0, n).
    """
    if n < 1 or index.is_floating_point():
        raise InputError(f"dct_columns: expected n ≥ 1 and whole indices; got {n}, {index.dtype}.")
    place = torch.device(device) if device is not None else index.device
    k = index.to(device=place, dtype=torch.int64).unsqueeze(-2)
    odd = torch.arange(1, 2 * n, 2, device=place).unsqueeze(-1)
    columns = _cosines(n, dtype, place)[(odd * k) % (4 * n)]
    return torch.where(k == 0, math.sqrt(1 / n), columns)


@functools.lru_cache(maxsize=16)
def _cosines(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """√(2/n) cos(π t / 2n) for t from 0 to 4n − 1: one turn."""
    turn = torch.arange(4 * n, dtype=torch.float64) * (math.pi / (2 * n))
    return (turn.cos() * math.sqrt(2 / n)).to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=4)
def _basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is kept serves gradients later
        return dct_columns(n, torch.arange(n), dtype, device)


def _transform(X: Tensor, dim: int, inverse: bool, overwrite: bool = False) -> Tensor:
    if not X.is_floating_point() or not X.ndim or not X.shape[dim]:
        raise InputError(
            f"dct: expected floating point numbers along dimension {dim}; got {tuple(X.shape)}, {X.dtype}."
        )
    work = X if X.dtype in (torch.float32, torch.float64) else X.float()
    differentiated = X.requires_grad and torch.is_grad_enabled()
    if X.device.type == "cpu" and not differentiated and not torch.compiler.is_compiling():
        call = scipy.fft.idct if inverse else scipy.fft.dct
        values = work.detach().numpy()
        found = call(values, 2, norm="ortho", axis=dim, overwrite_x=overwrite, workers=torch.get_num_threads())
        return torch.from_numpy(found).to(X.dtype)
    n = X.shape[dim]
    last = work.movedim(dim, -1)
    if n <= MATMUL_UP_TO:
        Q = _basis(n, work.dtype, work.device)
        out = last @ (Q.mT if inverse else Q)
    else:
        out = _makhoul_inverse(last) if inverse else _makhoul(last)
    return out.movedim(-1, dim).to(X.dtype)


def _twiddle(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """exp(−iπ k / 2n) for k up to n/2, and the norms c_k of all k."""
    angle = torch.arange(n // 2 + 1, dtype=torch.float64) * (-math.pi / (2 * n))
    c = torch.full((n,), math.sqrt(2 / n), dtype=torch.float64)
    c[0] = math.sqrt(1 / n)
    complex_dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(angle), angle).to(like.device, complex_dtype), c.to(like)


def _makhoul(X: Tensor) -> Tensor:
    """DCT-II by one real FFT of the even entries followed by the odd ones backwards (J. Makhoul, 1980).

    W_k = exp(−iπk/2n) V_k for k ≤ n/2 holds y_k as its real part and −y_{n−k} as its imaginary one.
    """
    n = X.shape[-1]
    turn, c = _twiddle(n, X)
    W = torch.fft.rfft(torch.cat([X[..., ::2], X[..., 1::2].flip(-1)], -1)) * turn
    back = W.imag[..., 1 : (n + 1) // 2].flip(-1)
    return torch.cat([W.real, -back], -1) * c


def _makhoul_inverse(Y: Tensor) -> Tensor:
    n = Y.shape[-1]
    turn, c = _twiddle(n, Y)
    y = Y / c
    mirrored = torch.cat([torch.zeros_like(y[..., :1]), y[..., (n + 1) // 2 :].flip(-1)], -1)
    v = torch.fft.irfft(torch.complex(y[..., : n // 2 + 1], -mirrored) * turn.conj(), n=n)
    out = torch.empty_like(v)
    out[..., ::2], out[..., 1::2] = v[..., : (n + 1) // 2], v[..., (n + 1) // 2 :].flip(-1)
    return out
