r"""The inverse of a damped empirical Fisher matrix F = λI + (1/m) Σ gᵢ gᵢᵀ, from m gradients and never written down.

With the gradients as rows of G (m, d), Woodbury's identity gives F⁻¹x = (x − Gᵀ(mλI + GGᵀ)⁻¹Gx)/λ. For a gradient that
is itself a row j it collapses to F⁻¹g_j = m Gᵀ(mλI + GGᵀ)⁻¹e_j, which divides by no λ and loses no digits to the
difference. F may be cut into blocks of coordinates, each inverted alone; a block of b ≤ m coordinates is inverted as
the b × b matrix that it is, a larger one by way of m × m.

Products with the gradients run in float32 at least, whatever they are stored in; factorisations in float64 unless asked
otherwise. Products carry rounding of ε, so mλ is raised to ε tr GGᵀ where it is below: there F⁻¹ of gradients that
nearly repeat would be rounding only. Choose λ well above ε times the mean of ‖g‖².
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from eckart.errors import InputError, NotFiniteError, problems

CHUNK = 1 << 24
"""Entries of a copy in a wider dtype that are held at once."""


def block_runs(size: int, block: int | None) -> list[tuple[int, int, int]]:
    """(start, count, length) of runs of equal blocks over ``size`` coordinates; the last block may be shorter."""
    if block is None or block >= size:
        return [(0, 1, size)] if size else []
    whole, rest = divmod(size, block)
    runs = [(0, whole, block)]
    return [*runs, (whole * block, 1, rest)] if rest else runs


def working_dtype(stored: torch.dtype) -> torch.dtype:
    """What products with gradients stored so are computed in: float64 for float64, else float32."""
    return torch.float64 if stored == torch.float64 else torch.float32


def ridge_solve(A: Tensor, B: Tensor, ridge: float, digits: float) -> Tensor:
    """(A + ρI)⁻¹B for stacks of positive semidefinite A (…, n, n) and B (…, n, k), by Cholesky.

    ρ is ``ridge``, or ``digits`` times the trace where that is more. A matrix that rounding has made
    indefinite all the same gets ten times as much, up to six times. Raises NotFiniteError where that does not help.
    """
    n = A.shape[-1]
    rho = (digits * A.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=ridge)
    eye = torch.eye(n, dtype=A.dtype, device=A.device)
    for _ in range(6):
        L, info = torch.linalg.cholesky_ex(A + rho[..., None, None] * eye)
        failed = info != 0
        if not bool(failed.any()):
            return torch.cholesky_solve(B, L)
        rho = torch.where(failed, 10 * rho, rho)
    raise NotFiniteError("the Gram matrix of the gradients is not positive: they hold NaN or Inf, or overflow.")


class GradientWindow:
    """The last m gradients of one or several pieces of a parameter vector, for F⁻¹ of the newest one.

    Pieces may lie on different devices: ``buffers[i]`` (m, d_i) holds their rows, ``gram`` is (m, m) GGᵀ over all of
    them. Rows that were not written yet are zero, and m stays the divisor, as in the paper. The window is a view of
    tensors that belong to the caller; nothing else is kept.
    """

    def __init__(self, buffers: list[Tensor], gram: Tensor) -> None:
        """``gram`` in the dtype of the factorisation, on the device where it is to be computed."""
        self.buffers = buffers
        self.gram = gram

    @torch.no_grad()
    def push(self, gradients: list[Tensor], row: int) -> None:
        """Writes the pieces (d_i,) of a gradient into ``row`` and its products with all rows into GGᵀ. O(dm)."""
        total = torch.zeros_like(self.gram[row])
        for buffer, g in zip(self.buffers, gradients, strict=True):
            buffer[row] = g
            total += _times(buffer, buffer[row]).to(total)
        self.gram[row] = total
        self.gram[:, row] = total

    @torch.no_grad()
    def newest(self, row: int, damping: float) -> list[Tensor]:
        """F⁻¹g for the gradient in ``row``, as it is stored: pieces (d_i,) in float32 at least. O(dm + m³)."""
        m = self.gram.shape[0]
        unit = torch.zeros(m, 1, dtype=self.gram.dtype, device=self.gram.device)
        unit[row] = m
        c = ridge_solve(self.gram, unit, m * damping, _digits(self.buffers[0].dtype))[:, 0]
        return [_combined(c, buffer) for buffer in self.buffers]


@torch.no_grad()
def newest_blockwise(
    buffer: Tensor, gram: Tensor, row: int, damping: float, runs: list[tuple[int, int, int]], solve: torch.dtype
) -> Tensor:
    """F⁻¹g (d,) for the gradient in ``row`` of ``buffer`` (m, d), each block of ``runs`` on its own.

    ``gram`` (blocks of more than m coordinates, m, m) is their GGᵀ, in order and up to date; see
    ``push_blockwise``. Blocks of at most m coordinates are factored from the buffer: O(d b m) for length b.
    """
    m, d = buffer.shape
    out = torch.empty(d, dtype=working_dtype(buffer.dtype), device=buffer.device)
    place = 0
    for start, count, length in runs:
        view = _blocks(buffer, start, count, length)
        into = out[start : start + count * length].view(count, length)
        if length > m:
            unit = torch.zeros(count, m, 1, dtype=gram.dtype, device=gram.device)
            unit[:, row] = m
            c = ridge_solve(gram[place : place + count], unit, m * damping, _digits(buffer.dtype))
            place += count
            for part in _chunks(count, m * length):
                into[part] = (c[part].mT.to(out.dtype) @ view[part].to(out.dtype))[:, 0]
        else:
            for part in _chunks(count, m * length):
                V = view[part].to(solve)
                g = V[:, row, :, None]
                into[part] = ridge_solve(V.mT @ V / m, g, damping, torch.finfo(solve).eps)[..., 0].to(out.dtype)
    return out


@torch.no_grad()
def push_blockwise(buffer: Tensor, gram: Tensor, g: Tensor, row: int, runs: list[tuple[int, int, int]]) -> None:
    """Writes g (d,) into ``row``, and its products within each block of more than m coordinates into ``gram``."""
    m = buffer.shape[0]
    buffer[row] = g
    dtype = working_dtype(buffer.dtype)
    place = 0
    for start, count, length in runs:
        if length <= m:
            continue
        view = _blocks(buffer, start, count, length)
        for part in _chunks(count, m * length):
            V = view[part].to(dtype)
            dots = (V @ V[:, row, :, None])[..., 0].to(gram.dtype)
            inside = gram[place + part.start : place + part.stop]
            inside[:, row] = dots
            inside[:, :, row] = dots
        place += count


def gram_blocks(runs: list[tuple[int, int, int]], m: int) -> int:
    """How many blocks of ``runs`` are inverted by way of m × m."""
    return sum(count for _, count, length in runs if length > m)


class InverseFisher:
    """F⁻¹ for m given gradients, in blocks: products, diagonal, columns, and the update of the optimal brain surgeon.

    F = λI + (1/m) Σ gᵢgᵢᵀ, cut to blocks of ``block`` neighbouring coordinates (None: one block). Coordinates that are
    not to take part have zeros in every gradient; on them F is λ.
    """

    def __init__(
        self, gradients: Tensor, damping: float, *, block: int | None = None, dtype: torch.dtype = torch.float64
    ) -> None:
        """``gradients`` (m, d) of any float dtype, kept as they are; ``damping`` λ > 0; work in ``dtype``.

        Raises InputError for other shapes and values, NotFiniteError for NaN or Inf. Factorises as it is asked, block
        by block: O(d m²) in all for blocks of more than m coordinates, O(d b (b + m)) for blocks of b ≤ m.
        """
        found = []
        if not isinstance(gradients, Tensor) or gradients.ndim != 2 or 0 in gradients.shape:
            found.append("gradients are a tensor (m, d), neither of them 0")
        elif not gradients.is_floating_point():
            found.append(f"gradients are of a float dtype; got {gradients.dtype}")
        if not isinstance(damping, (int, float)) or not math.isfinite(damping) or damping <= 0:
            found.append(f"damping is a positive number; got {damping!r}")
        if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
            found.append(f"block counts coordinates, an int of at least 1, or None; got {block!r}")
        if dtype not in (torch.float32, torch.float64):
            found.append(f"dtype is torch.float32 or torch.float64; got {dtype}")
        if found:
            raise InputError(problems("InverseFisher", found))
        if not bool(torch.isfinite(gradients).all()):
            raise NotFiniteError("InverseFisher: the gradients hold NaN or Inf.")
        self.gradients = gradients.detach()
        self.damping, self.dtype = float(damping), dtype
        self.runs = block_runs(gradients.shape[1], block)

    @torch.no_grad()
    def solve(self, x: Tensor) -> Tensor:
        """F⁻¹x for x (d,), in the working dtype."""
        self._check(x)
        out = torch.empty_like(x, dtype=self.dtype)
        for place, V in self._parts():
            part = x[place].to(self.dtype).view(V.shape[0], V.shape[2], 1)
            out[place] = self._apply(V, part).reshape(-1)
        return out

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """(d,): the entries [F⁻¹]ᵢᵢ, in the working dtype; all in (0, 1/λ]."""
        m, d = self.gradients.shape
        out = torch.empty(d, dtype=self.dtype, device=self.gradients.device)
        eps = torch.finfo(self.dtype).eps
        for place, V in self._parts():
            count, _, length = V.shape
            if length <= m:
                eye = torch.eye(length, dtype=self.dtype, device=V.device).expand(count, -1, -1)
                inverse = ridge_solve(V.mT @ V / m, eye, self.damping, eps).diagonal(dim1=-2, dim2=-1)
            else:
                S = ridge_solve(V @ V.mT, V, m * self.damping, eps)
                inverse = (1 - (V * S).sum(1)) / self.damping
                # The difference cancels where g carries nearly all of F in this coordinate; it stays positive.
                inverse = inverse.clamp(min=eps / self.damping)
            out[place] = inverse.reshape(-1)
        return out

    @torch.no_grad()
    def column(self, index: int) -> Tensor:
        """F⁻¹eᵢ (d,), zero outside of the block of i."""
        if not isinstance(index, int) or not 0 <= index < self.gradients.shape[1]:
            raise InputError(f"InverseFisher.column: an index in [0, {self.gradients.shape[1]}); got {index!r}.")
        unit = torch.zeros(self.gradients.shape[1], dtype=self.dtype, device=self.gradients.device)
        unit[index] = 1
        return self.solve(unit)

    @torch.no_grad()
    def energy(self, delta: Tensor) -> Tensor:
        """½ δᵀFδ for δ (d,), a scalar."""
        self._check(delta)
        x = delta.to(self.dtype)
        total = self.damping * x.square().sum()
        for place, V in self._parts():
            total += (V @ x[place].view(V.shape[0], V.shape[2], 1)).square().sum() / V.shape[1]
        return total / 2

    @torch.no_grad()
    def surgery(self, weights: Tensor, drop: Tensor, *, joint: bool = True) -> Tensor:
        """What to add to ``weights`` (d,) so that those marked in ``drop`` (d, bool) become 0, at the least ½δᵀFδ.

        ``joint``: all of a block at once, exactly: δ_K = G_Kᵀ(mλI + G_K G_Kᵀ)⁻¹ G_D w_D for the kept K. Otherwise the
        paper's sum of the updates of single weights, δ = −F⁻¹(w_D/[F⁻¹]_DD), with the dropped ones set to 0 after it.
        """
        self._check(weights)
        if drop.shape != weights.shape or drop.dtype != torch.bool:
            raise InputError(f"InverseFisher.surgery: drop is bool {tuple(weights.shape)}; got {tuple(drop.shape)}.")
        w = weights.to(self.dtype)
        dropped = torch.where(drop, w, 0)
        if not joint:
            delta = -self.solve(dropped / self.diagonal())
            return torch.where(drop, -w, delta)
        m = self.gradients.shape[0]
        delta = torch.empty_like(w)
        for place, V in self._parts():
            count, _, length = V.shape
            y = V @ dropped[place].view(count, length, 1)
            kept = V * ~drop[place].view(count, 1, length)
            delta[place] = self._pulled(kept, y, m).reshape(-1)
        return torch.where(drop, -w, delta)

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """(coordinates, (blocks, m, length) gradients in the working dtype), a bounded number of entries each."""
        m = self.gradients.shape[0]
        for start, count, length in self.runs:
            view = _blocks(self.gradients, start, count, length)
            for part in _chunks(count, m * length):
                yield slice(start + part.start * length, start + part.stop * length), view[part].to(self.dtype)

    def _apply(self, V: Tensor, x: Tensor) -> Tensor:
        """F⁻¹x for stacks (blocks, m, length) and (blocks, length, 1)."""
        m, length = V.shape[1:]
        eps = torch.finfo(self.dtype).eps
        if length <= m:
            return ridge_solve(V.mT @ V / m, x, self.damping, eps)
        return (x - V.mT @ ridge_solve(V @ V.mT, V @ x, m * self.damping, eps)) / self.damping

    def _pulled(self, V: Tensor, y: Tensor, m: int) -> Tensor:
        """Vᵀ(mλI + VVᵀ)⁻¹y = (mλI + VᵀV)⁻¹Vᵀy, by the smaller of the two."""
        eps = torch.finfo(self.dtype).eps
        if V.shape[2] <= m:
            return ridge_solve(V.mT @ V, V.mT @ y, m * self.damping, eps)
        return V.mT @ ridge_solve(V @ V.mT, y, m * self.damping, eps)

    def _check(self, x: Tensor) -> None:
        d, device = self.gradients.shape[1], self.gradients.device
        if x.shape != (d,) or x.device != device:
            raise InputError(f"InverseFisher: expected ({d},) on {device}; got {tuple(x.shape)} on {x.device}.")


def _blocks(G: Tensor, start: int, count: int, length: int) -> Tensor:
    """(count, m, length): columns of G (m, d) as blocks, without a copy."""
    columns = G[:, start : start + count * length]
    return columns.view(G.shape[0], count, length).transpose(0, 1)


def _chunks(count: int, entries: int) -> Iterator[slice]:
    """Slices of ``count`` things of ``entries`` numbers each, about CHUNK numbers at a time."""
    step = max(1, CHUNK // max(entries, 1))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _times(G: Tensor, g: Tensor) -> Tensor:
    """G g in the working dtype, a few rows at a time where they have to be converted."""
    dtype = working_dtype(G.dtype)
    if G.dtype == dtype:
        return G @ g
    g = g.to(dtype)
    return torch.cat([G[part].to(dtype) @ g for part in _chunks(G.shape[0], G.shape[1])])


def _combined(c: Tensor, G: Tensor) -> Tensor:
    """Gᵀc in the working dtype, on the device of G."""
    dtype = working_dtype(G.dtype)
    c = c.to(G.device, dtype)
    if G.dtype == dtype:
        return c @ G
    total = torch.zeros(G.shape[1], dtype=dtype, device=G.device)
    for part in _chunks(G.shape[0], G.shape[1]):
        total += c[part] @ G[part].to(dtype)
    return total


def _digits(stored: torch.dtype) -> float:
    """Relative rounding of products with gradients stored so."""
    return torch.finfo(working_dtype(stored)).eps
