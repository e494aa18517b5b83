"""Tensors kept in 8 or 4 bits between uses, and unbiased rounding to bfloat16."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from eckart.errors import InputError

TINY = torch.finfo(torch.float32).tiny
CACHED_ENTRIES = 2**16
"""Numbers that are worked on at a time on a CPU, so that they stay in its cache."""


def pack(
    X: Tensor,
    *,
    bits: int = 8,
    signed: bool = True,
    block: int | None = 256,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales of X (…, n): every ``block`` entries along the last dimension share their maximum.

    ``block=None``: one scale a row. Signed: x ≈ s c for c in ±127 (±7), an error of at most s/2 = max|x|/254 (/14).
    Unsigned, for X ≥ 0 that roots are taken of: x ≈ s (c/255)⁴, exact at 0, above it never 0: relative error
    of at most about 2/c, 1 % near the maximum and 12 % at 1.5e-5 of it; less than 4e-9 of it rounds up to that.
    ``generator``, on X's device: rounding up or down at random such that the mean of :func:`unpack` is x (but for that
    floor); without it to the nearest.

    Codes (…, n) are int8 or uint8; with 4 bits two in a byte of uint8, (…, n/2). Scales are (…, ⌈n/block⌉). NaN and
    Inf spoil their block, as NaN. Raises InputError for other bits, an odd n with 4 bits, or integers.
    """
    if bits not in (4, 8) or (block is not None and block < 1):
        raise InputError(f"pack: expected 8 or 4 bits and a block of at least 1; got {bits!r}, {block!r}.")
    if not X.is_floating_point() or not X.ndim or (bits == 4 and X.shape[-1] % 2):
        raise InputError(
            f"pack: expected floating point numbers, an even last dimension for 4 bits; "
            f"got {tuple(X.shape)}, {X.dtype}."
        )
    n = X.shape[-1]
    width, groups = (n + 1) // 2 if bits == 4 else n, 1 if block is None else max(1, -(-n // block))
    codes = X.new_empty(*X.shape[:-1], width, dtype=torch.int8 if signed and bits == 8 else torch.uint8)
    scales = X.new_empty(*X.shape[:-1], groups, dtype=torch.float32)
    for part, of_codes, of_scales in _by_parts(X, codes, scales):
        _pack_into(of_codes, of_scales, part.float(), bits, signed, block, generator)
    return codes, scales


def unpack(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int = 8,
    signed: bool = True,
    block: int | None = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What :func:`pack` stored, in ``dtype``; the options have to be those of the call to it."""
    n = codes.shape[-1] * (2 if bits == 4 else 1)
    out = codes.new_empty(*codes.shape[:-1], n, dtype=dtype)
    for of_codes, of_scales, part in _by_parts(codes, scales, out):
        part.copy_(_unpacked(of_codes, of_scales, bits, signed, block))
    return out


def round_stochastically(
    X: Tensor, dtype: torch.dtype = torch.bfloat16, generator: torch.Generator | None = None
) -> Tensor:
    """X in bfloat16, each entry rounded up or down at random with mean X; a new tensor, or X where that is its dtype.

    16 random bits an entry are added below those that stay. Small updates of bfloat16 weights count on average
    this way, which are lost where every one is rounded to the nearest. NaN and Inf stay. ``generator``: on X's device.
    Raises InputError for another ``dtype``.
    """
    if X.dtype == dtype:
        return X
    if dtype != torch.bfloat16 or not X.is_floating_point():
        raise InputError(
            f"round_stochastically: expected floating point numbers to bfloat16; got {X.dtype} to {dtype}."
        )
    exact = X.float().contiguous()
    words = torch.empty((exact.numel() + 3) // 4, dtype=torch.int64, device=X.device)
    words.random_(-(2**63), None, generator=generator)  # 4 × 16 bits
    noise = words.view(torch.int16)[: exact.numel()].to(torch.int32).bitwise_and_(0xFFFF).view(exact.shape)
    rounded = noise.add_(exact.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(exact.isfinite(), rounded, exact).to(dtype)


def _by_parts(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Rows along the last dimension, so few at a time on a CPU that what is computed from them stays in its cache."""
    entries = max(T.numel() for T in tensors)
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling() or entries <= CACHED_ENTRIES:
        return [tensors]
    rows = max(1, CACHED_ENTRIES // max(T.shape[-1] for T in tensors))
    return zip(*(torch.split(T.reshape(-1, T.shape[-1]), rows) for T in tensors), strict=True)


def _pack_into(
    codes: Tensor,
    scales: Tensor,
    X: Tensor,
    bits: int,
    signed: bool,
    block: int | None,
    generator: torch.Generator | None,
) -> None:
    n, top = X.shape[-1], _top(bits, signed)
    blocks = _blocks(X, block)
    peaks = blocks.abs().amax(-1, keepdim=True)  # torch's norm for it takes ten times as long
    scales.copy_(peaks.squeeze(-1))
    inverse = torch.where(peaks < TINY, 0.0, 1 / peaks)  # 1/s of what is smaller overflows
    share = blocks if signed else (blocks * inverse).clamp_min_(0)
    levels = blocks * (inverse * top) if signed else share.sqrt().sqrt_().mul_(top)
    if generator is None:
        levels.round_()
    else:
        low = levels.floor()
        chance = levels - low if signed else (share - (low / top) ** 4) / (((low + 1) / top) ** 4 - (low / top) ** 4)
        levels = low + (torch.rand(levels.shape, generator=generator, device=X.device) < chance)
    if not signed:
        levels = levels.clamp_(1, top).mul_(share.sign_())
    whole = levels.flatten(-2)[..., :n]
    if bits == 8:
        codes.copy_(whole)
        return
    nibbles = (whole + 8 if signed else whole).to(torch.uint8)
    codes.copy_(nibbles[..., ::2] | (nibbles[..., 1::2] << 4))


def _unpacked(codes: Tensor, scales: Tensor, bits: int, signed: bool, block: int | None) -> Tensor:
    if bits == 4:
        whole = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.float32)
        whole = whole - 8 if signed else whole
    else:
        whole = codes.to(torch.float32)
    n, top = whole.shape[-1], _top(bits, signed)
    blocks = _blocks(whole, block)
    if signed:
        values = blocks * (scales / top).unsqueeze(-1)
    else:
        values = (blocks / top).square_().square_().mul_(scales.unsqueeze(-1))
    return values.flatten(-2)[..., :n]


def _top(bits: int, signed: bool) -> int:
    return (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1


def _blocks(X: Tensor, block: int | None) -> Tensor:
    """(…, n) as (…, ⌈n/block⌉, block), padded with zeros; (…, 1, n) without blocks."""
    n = X.shape[-1]
    if block is None or n <= block:
        return X.unsqueeze(-2)
    if n % block:
        X = pad(X, (0, -n % block))
    return X.reshape(*X.shape[:-1], X.shape[-1] // block, block)
