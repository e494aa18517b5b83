r"""A penalty that makes a convolution orthogonal as a linear map, when that can be, and what it is worth.

*What it does.* Measures how far a convolution is from keeping (or, with fewer outputs than inputs, projecting) lengths,
from its kernel alone. Added to a loss it keeps the singular values of layers near 1, whatever the size of the signals.

*Formula.* For a kernel K (M, C, k, k) with stride S, R = conv(K, K; padding P = ⌊(k − 1)/S⌋ S, stride S) holds the
inner products of filters at all shifts, and L = ‖R − I‖²_F − max(0, M − S²C), with I the identity at shift 0. With
circular padding the layer on N × N outputs is a matrix 𝒦. Once N is at least the number of shifts per dimension (q
below), ‖𝒦𝒦ᵀ − I‖²_F = N² L for M ≤ S²C, else ‖𝒦ᵀ𝒦 − I‖²_F = N² L. Over one dimension S² becomes S, N² N. L = 0 can be
reached iff M ≤ C k² for M ≤ C S², else iff S ≤ k. Stability: every singular value has |σ² − 1| ≤ √(q L) at any N, with
q = (2⌊(k − 1)/S⌋ + 1)² shifts for M ≤ S²C, else (2⌊(k + S − 2)/S⌋ + 1)²: a matrix of circulant blocks has a symbol Σ_t
R_t e^{iωt}, and Σ_t ‖R_t‖ ≤ √q ‖R‖_F.

*Cost.* One convolution of the kernel with itself, M² C k² (2P/S + 1)² multiply-adds, no matter how large the signals
are. :func:`circular_singular_values` takes N² SVDs of M × S²C matrices, to look at, not to train with.

*When it does not help.* Where no orthogonal kernel exists: M = 6, C = 1, k = 2, S = 3 ends at L = 2 with dead
directions (σ from 0 to 1), since a stride above k skips inputs. With zero padding, which is what most layers have,
inputs at the border lose some of their outputs, so singular values below 1 remain at L = 0. With M = C S² orthogonal
kernels exist, but descent may get stuck: of two tries with S = 1, M = C = 6 came to L = 1e-4, M = C = 4 stayed at 0.16,
with one σ at 0.015. The bound is loose: at L = 1.3e-4 (M = 4, C = 6) it says 0.971 to 1.028, and values are from 0.993
to 1.006.

*Departs from the paper in.* The constants q of the stability statement are those of the argument above; the paper's
have M (or C) as a further factor. Kernels and strides may differ between dimensions (with k² and S² as products, and S
≤ k in each), and kernels may be even, for which the paper proves nothing. A grouped convolution is one map per group,
summed. Kernels of less than float32 are taken to float32 first.

*Reference.* E. M. Achour, F. Malgouyres, F. Mamalet, “Existence, Stability and Scalability of Orthogonal Convolutional
Neural Networks”, JMLR 2022, https://arxiv.org/abs/2108.05623; J. Wang, Y. Chen, R. Chakraborty, S. X. Yu, “Orthogonal
Convolutional Neural Networks”, CVPR 2020, https://arxiv.org/abs/1911.12207, for the penalty.

*Example.*

>>> import torch
>>> conv = torch.nn.Conv2d(2, 3, 3, bias=False)
>>> with torch.no_grad():
...     _ = torch.nn.init.dirac_(conv.weight)  # copies its 2 inputs; the third output is 0
>>> float(orthogonal_convolution_penalty(conv).detach())
0.0
>>> [round(v, 3) for v in circular_singular_values(conv, size=4).unique().tolist()]
[1.0]
>>> orthogonal_convolution_exists(out_channels=10, in_channels=1, kernel_size=3, stride=4)  # 10 filters in 9 pixels
False
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, pad

from eckart.errors import InputError, NotFiniteError, problems
from eckart.records import Claim, Paper, Technique, Verdict

Stride = int | Sequence[int]


def orthogonal_convolution_penalty(conv: nn.Module | Tensor, stride: Stride | None = None) -> Tensor:
    """L ≥ 0 (to rounding), a differentiable scalar; 0 iff the layer with circular padding is orthogonal.

    ``conv``: an nn.Conv1d or nn.Conv2d (its stride and groups count, its padding does not), or a kernel (M, C, k) or
    (M, C, k, k) with ``stride``, an int or one per dimension (1 where None). In float32 or float64, whatever the dtype
    of the kernel or the autocast state.

    Raises InputError for other modules, dilation, integers, complex numbers, and a stride beside a module.
    """
    weight, steps, groups = _kernel(conv, stride)
    with torch.autocast(weight.device.type, enabled=False):
        wide = weight if weight.dtype == torch.float64 else weight.float()
        parts = [_penalty(part, steps) for part in wide.chunk(groups)]
        return torch.stack(parts).sum()


def _penalty(K: Tensor, steps: tuple[int, ...]) -> Tensor:
    M, C = K.shape[:2]
    sides = K.shape[2:]
    padding = [(k - 1) // s * s for k, s in zip(sides, steps, strict=True)]
    R = (conv1d if len(sides) == 1 else conv2d)(K, K, stride=steps, padding=padding)
    identity = torch.zeros_like(R)
    centre = identity
    for p, s in zip(padding, steps, strict=True):
        centre = centre.select(2, p // s)
    centre.diagonal().fill_(1)
    return (R - identity).square().sum() - max(0, M - math.prod(steps) * C)


def orthogonal_convolution_exists(
    *, out_channels: int, in_channels: int, kernel_size: Stride, stride: Stride = 1, dimensions: int = 2
) -> bool:
    """Whether any kernel of this shape makes the layer with circular padding orthogonal (L = 0).

    Rows for M ≤ C S^d, columns else. ``kernel_size`` and ``stride`` are ints or one int per dimension. Raises
    InputError for sizes below 1 and another number of dimensions than 1 or 2.
    """
    faults = [
        f"{name} is an int of at least 1; got {value!r}"
        for name, value in (("out_channels", out_channels), ("in_channels", in_channels))
        if not _count(value)
    ]
    if dimensions not in (1, 2):
        faults.append(f"dimensions is 1 or 2; got {dimensions!r}")
    if faults:
        raise InputError(problems("orthogonal convolution", faults))
    sides = _per_dimension("kernel_size", kernel_size, dimensions)
    steps = _per_dimension("stride", stride, dimensions)
    if out_channels <= in_channels * math.prod(steps):
        return out_channels <= in_channels * math.prod(sides)
    return all(s <= k for s, k in zip(steps, sides, strict=True))


@torch.no_grad()
def singular_value_bounds(conv: nn.Module | Tensor, stride: Stride | None = None) -> tuple[float, float]:
    """(low, high) that all singular values of the layer with circular padding lie in, for signals of any size.

    √(1 ∓ √(q L)), low at least 0; of a grouped convolution the widest of its groups. Arguments and errors as for
    :func:`orthogonal_convolution_penalty`; NotFiniteError for NaN or Inf.
    """
    weight, steps, groups = _kernel(conv, stride)
    if not bool(torch.isfinite(weight).all()):
        raise NotFiniteError("the kernel has NaN or Inf.")
    worst = 0.0
    for K in weight.double().chunk(groups):
        rows = K.shape[0] <= math.prod(steps) * K.shape[1]
        shifts = (2 * ((k - 1) // s if rows else (k + s - 2) // s) + 1 for k, s in zip(K.shape[2:], steps, strict=True))
        worst = max(worst, math.sqrt(math.prod(shifts) * max(0.0, float(_penalty(K, steps)))))
    return math.sqrt(max(0.0, 1 - worst)), math.sqrt(1 + worst)


@torch.no_grad()
def circular_singular_values(conv: nn.Module | Tensor, size: Stride, stride: Stride | None = None) -> Tensor:
    """All singular values of the layer with circular padding, float64 on the CPU, falling.

    ``size``: N, outputs per dimension (inputs: N S), an int or one per dimension; the kernel may not be larger than
    the input. By FFT, exact to rounding: min(M, C S^d) values for each of N^d frequencies, and for each group. Other
    arguments and errors as for :func:`singular_value_bounds`.
    """
    weight, steps, groups = _kernel(conv, stride)
    sides, d = weight.shape[2:], weight.ndim - 2
    outputs = _per_dimension("size", size, d)
    inputs = [n * s for n, s in zip(outputs, steps, strict=True)]
    if any(k > n for k, n in zip(sides, inputs, strict=True)):
        raise InputError(f"a kernel of {tuple(sides)} does not fit into {tuple(inputs)} inputs; take a larger size.")
    if not bool(torch.isfinite(weight).all()):
        raise NotFiniteError("the kernel has NaN or Inf.")
    room = [r for k, n in zip(reversed(sides), reversed(inputs), strict=True) for r in (0, n - k)]
    found = []
    for K in weight.double().cpu().chunk(groups):
        spectrum = torch.fft.fftn(pad(K, room), dim=tuple(range(2, 2 + d)))
        # Frequencies that a stride folds onto each other: n·j + i for j = 0 … S − 1.
        spectrum = spectrum.reshape(*K.shape[:2], *(x for n, s in zip(outputs, steps, strict=True) for x in (s, n)))
        order = [3 + 2 * i for i in range(d)] + [0, 1] + [2 + 2 * i for i in range(d)]
        folded = spectrum.permute(order).reshape(math.prod(outputs), K.shape[0], -1)
        found.append(torch.linalg.svdvals(folded).flatten() / math.sqrt(math.prod(steps)))
    return torch.cat(found).sort(descending=True).values


def _kernel(conv: nn.Module | Tensor, stride: Stride | None) -> tuple[Tensor, tuple[int, ...], int]:
    """The kernel (M, C, …), its strides, and its groups."""
    if isinstance(conv, (nn.Conv1d, nn.Conv2d)):
        if stride is not None:
            raise InputError("orthogonal convolution: a module has its stride; give one beside a kernel only.")
        if any(d != 1 for d in conv.dilation):
            raise InputError(f"orthogonal convolution: dilation {conv.dilation} is not supported; it has to be 1.")
        return conv.weight, tuple(conv.stride), conv.groups
    if not isinstance(conv, Tensor):
        raise InputError(
            f"orthogonal convolution: expected nn.Conv1d, nn.Conv2d or a kernel; got {type(conv).__name__}."
        )
    if conv.ndim not in (3, 4) or conv.numel() == 0 or not conv.is_floating_point():
        raise InputError(
            "orthogonal convolution: a kernel is (M, C, k) or (M, C, k, k) of real floats; "
            f"got {tuple(conv.shape)} of {conv.dtype}."
        )
    return conv, _per_dimension("stride", 1 if stride is None else stride, conv.ndim - 2), 1


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _per_dimension(name: str, value: Stride, dimensions: int) -> tuple[int, ...]:
    each = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(each) != dimensions or not all(_count(v) for v in each):
        raise InputError(f"{name} is an int of at least 1, or {dimensions} of them; got {value!r}.")
    return each


# ---- the claim

SHAPES = ((4, 6, 3, 1), (6, 4, 3, 1), (4, 2, 3, 2), (9, 2, 3, 2), (6, 1, 2, 3), (12, 1, 2, 3))
"""(M, C, k, S): rows, columns, both with a stride; then rows that cannot be, M > C k², and columns, S > k."""


def _trained(M: int, C: int, k: int, S: int, *, flat: bool = False) -> Tensor:
    """A random kernel after 400 steps of Adam on the penalty; ``flat``: on ‖K̄K̄ᵀ − I‖² of the kernel as a matrix."""
    K = torch.randn(M, C, k, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / math.sqrt(C * k * k)
    K.requires_grad_()
    optimizer = torch.optim.Adam([K], lr=0.03)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 400)
        optimizer.zero_grad()
        rows = K.flatten(1) if C * k * k >= M else K.flatten(1).T
        loss = (rows @ rows.T - torch.eye(len(rows))).square().sum() if flat else orthogonal_convolution_penalty(K, S)
        torch.autograd.backward(loss)
        optimizer.step()
    return K.detach()


def _run_claim() -> Verdict:
    figures: dict[str, float] = {}
    held = True
    for M, C, k, S in SHAPES:
        name = f"M {M}, C {C}, k {k}, S {S}"
        K = _trained(M, C, k, S)
        penalty = float(orthogonal_convolution_penalty(K, S))
        values = circular_singular_values(K, 12, S)
        figures[f"{name}: L"] = penalty
        figures[f"{name}: least σ"], figures[f"{name}: largest σ"] = float(values[-1]), float(values[0])
        low, high = singular_value_bounds(K, S)
        held &= low - 1e-9 <= float(values[-1]) and float(values[0]) <= high + 1e-9
        if orthogonal_convolution_exists(out_channels=M, in_channels=C, kernel_size=k, stride=S):
            flat = circular_singular_values(_trained(M, C, k, S, flat=True), 12, S)
            figures[f"{name}: least σ, matrix"], figures[f"{name}: largest σ, matrix"] = float(flat[-1]), float(flat[0])
            spread = float((flat.square() - 1).abs().max())
            held &= penalty < 0.01 and float((values.square() - 1).abs().max()) < spread
        else:
            held &= penalty > 0.5
    return Verdict(
        held=held,
        figures=figures,
        note="kernels trained on the penalty alone, singular values on 12 × 12 outputs; matrix: trained so that the "
        "kernel as a matrix is orthogonal",
    )


METHOD = Technique(
    name="orthogonal-convolution",
    summary="a penalty of the kernel alone that makes a convolution orthogonal, with its range of singular values",
    paper=Paper(
        authors="E. M. Achour, F. Malgouyres, F. Mamalet",
        title="Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks",
        year=2022,
        link="https://arxiv.org/abs/2108.05623",
    ),
    entry=orthogonal_convolution_penalty,
    claim=Claim(
        statement="The penalty falls to 0 where the theorem says that orthogonal kernels exist and only there; "
        "singular values keep within the bound, and closer to 1 than with an orthogonal kernel matrix.",
        source="theorems on existence and on stability; the comparison with kernel orthogonality is Wang's",
        run=_run_claim,
    ),
)
