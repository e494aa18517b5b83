r"""FARMS: the heavy-tail exponent of a weight by windows of one shape, and how far it is from noise.

*What it does.* Measures how heavy the tail of a weight's spectrum is without the bias of its shape: cuts windows of
one aspect out of the matrix, pools their eigenvalues and fits a power law to the upper half. Smaller α: heavier tail.

*Formula.* Windows of w × Q w (w = 512 or what fits), on a grid of at most 5 × 5 places; λ = σ² of all of them, pooled
and sorted; α = 1 + k/Σ_{i≤k} ln(λ_i/λ_{k+1}), k half of them. Noise does not score 0 or ∞ but a number of its own, by
the law of Marchenko and Pastur: α_∞(Q) = 1 + ½/∫ ln(x/x̃) f(x) dx over x > median x̃, that is 2.12 at Q = 1 (2.71,
3.45, 4.47 at Q = 2, 4, 8: the bias that windows remove). ``distance_from_noise`` = mean over windows of α − α_w(Q),
with α_w that of the w quantiles of the law at (i − ½)/w, which noise of that finite size has on average.

*Cost.* 25 windows of 512 × 512: 0.5 s of one core for any matrix of that side or more, a tenth of the whole
spectrum of 4096 × 4096.

*When it does not help.* The cut at the median fits the middle of the spectrum as much as its tail: a few strong spikes
hardly move it (see ``spikes``). It ranks layers; whether small or large α is better depends on the paper and the
model. A distance below 0 says “heavier than noise”, not “well trained”.

*Departs from the paper in.* The published code pools one value of α and compares it with none; the reference of noise
is added here, and for the distance windows are fitted one by one, because the noise level of a pool of overlapping
windows has no closed form. Their other cut, near the peak of a histogram, scattered between 3 and 8 on noise and
is left out. There are no more windows than cover the matrix. Their runs on language models use 2000 rows, which costs
more than the whole spectrum.

*Reference.* Y. Hu, K. Goel, V. Killiakov, Y. Yang, “Eigenspectrum Analysis of Neural Networks without Aspect Ratio
Bias”, 2025, https://arxiv.org/abs/2506.06280; the median cut: H. Lu, Y. Zhou, S. Liu, Z. Wang, M. W. Mahoney, Y. Yang,
“AlphaPruning”, 2024.

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W = torch.randn(128, 512, generator=generator)
>>> for finding in farms(W).values():
...     print(finding)
alpha_farms: 2.11 ± 0.029 (n = 512)
distance_from_noise: -0.01136 ± 0.029 (n = 512)
"""

from __future__ import annotations

import functools
import math
from itertools import product

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.noise import noise_quantiles
from eckart.records import Claim, Diagnostic, Finding, Paper, SiteKind, Verdict
from eckart.spectra.tails import median_hill
from eckart.spectra.values import Spectrum, as_matrices, gram, not_finite

NAMES = ("alpha_farms", "distance_from_noise")
"""The findings of :func:`farms`."""
_BIAS = 0.3
"""Over thousands of draws α of noise is lower than α_w by 0.0 to 0.4 (α − 1)/w."""
FEWEST_ROWS = 8
"""The shortest side of a window that a tail can be fitted to."""


def farms(
    W: Tensor,
    *,
    kind: SiteKind | None = None,
    groups: int = 1,
    rows: int = 512,
    aspect: int = 1,
    places: int = 5,
    spectrum: Spectrum | None = None,
) -> dict[str, Finding]:
    """The exponent of a weight (out, in) by windows, and its distance from noise, by name: ``NAMES`` of its module.

    - ``alpha_farms``: α of the pooled eigenvalues, above 1; ``details["noise"]`` is what noise scores in the same
      windows;
    - ``distance_from_noise``: α − α of noise, mean over windows; 0 within its uncertainty for noise of any shape, below
      0 for heavier tails.

    ``rows``: the shorter side w of a window, or as much as fits. ``aspect``: Q, its longer side over the shorter, a
    whole number. ``places``: windows along either side, no more than cover it. A kernel of a convolution (4-D or more,
    or ``kind="conv"``) gives one matrix per kernel position, all in one pool, as the paper does; a stack gives one pool
    too.

    ``spectrum``: that of W, where it is known, to be used for a window that is the whole matrix.

    The uncertainty is 1.96 standard errors over windows that do not overlap, no less than noise has itself: over draws,
    α of a w × Qw noise matrix has standard deviation (α − 1)(0.9 + 0.45 ln w)/w (measured, w = 8 to 256, Q = 1 to 8),
    and lies up to 0.3 (α − 1)/w below α_w, which is added.

    None with a note for NaN, for windows of fewer than 8 rows, and where more than half of a window's values are 0.
    Raises InputError for tensors that are no weights and options out of range.
    """
    _check(rows, aspect, places)
    matrices = _positions(as_matrices(W, "farms", kind, groups), W, kind)
    if flaw := not_finite(matrices):
        return _none(flaw)
    short, long = sorted(matrices.shape[1:])
    w = min(rows, short, long // aspect)
    if w < FEWEST_ROWS:
        return _none(f"windows of {w} × {w * aspect} are too small for a tail; it takes {FEWEST_ROWS} rows")
    if spectrum is not None and (short, long) == (w, w * aspect) and spectrum.values.shape == matrices.shape[:2]:
        spectra = [(row / row[0].clamp_min(1e-300)).square() for row in spectrum.values]
    else:
        spectra = [_eigenvalues(window) for matrix in matrices for window in _windows(matrix, w, aspect, places)]
    if any(not values[values.numel() // 2] > values[0] * 8 * torch.finfo(values.dtype).eps for values in spectra):
        return _none("more than half of the singular values of a window are zero, so it has no tail")
    alphas = torch.tensor([median_hill(values) for values in spectra], dtype=torch.float64)
    if not bool(alphas.isfinite().all()):
        return _none("the larger singular values of a window are all equal, so it has no tail")
    noise = noise_alpha(w, aspect)
    disjoint = matrices.shape[0] * (short // w) * (long // (w * aspect))
    independent = min(alphas.numel(), max(disjoint, 1))
    scatter = float(alphas.std()) if alphas.numel() > 2 else 0.0
    spread = max(scatter, (noise - 1) * (0.9 + 0.45 * math.log(w)) / w)
    width = 1.96 * spread / math.sqrt(independent) + _BIAS * (noise - 1) / w
    pool = torch.cat(spectra)
    details = {"noise": noise, "window": [w, w * aspect], "windows": alphas.numel()}
    return {
        "alpha_farms": Finding(
            name="alpha_farms", value=median_hill(pool), uncertainty=width, n=pool.numel(), details=details
        ),
        "distance_from_noise": Finding(
            name="distance_from_noise",
            value=float(alphas.mean()) - noise,
            uncertainty=width,
            n=pool.numel(),
            details=details,
        ),
    }


@functools.lru_cache(maxsize=256)
def noise_alpha(rows: int, aspect: float) -> float:
    """What :func:`farms` scores on average on one rows × (aspect · rows) window of noise, α_w(Q) above."""
    levels = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    return median_hill(noise_quantiles(levels, aspect))


def _check(rows: int, aspect: int, places: int) -> None:
    for name, value, least in (("rows", rows, FEWEST_ROWS), ("aspect", aspect, 1), ("places", places, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"farms: {name} is a whole number of at least {least}; got {value!r}.")


def _none(note: str) -> dict[str, Finding]:
    return {name: Finding(name=name, value=None, notes=(note,)) for name in NAMES}


def _positions(matrices: Tensor, W: Tensor, kind: SiteKind | None) -> Tensor:
    """The kernel of a convolution as one (out, in) matrix per position; anything else as it is."""
    if kind != "conv" and (kind is not None or W.ndim < 4):
        return matrices
    positions = math.prod(W.shape[2:])
    slices, out, columns = matrices.shape
    stacked = matrices.reshape(slices, out, columns // positions, positions)
    return stacked.permute(0, 3, 1, 2).reshape(-1, out, columns // positions)


def _windows(matrix: Tensor, w: int, aspect: int, places: int) -> list[Tensor]:
    """Windows with the longer side along the longer side of the matrix, at evenly spaced places."""
    A = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    starts = []
    for side, length in zip(A.shape, (w, w * aspect), strict=True):
        count = min(places, -(-side // length))
        starts.append([round(place * (side - length) / max(count - 1, 1)) for place in range(count)])
    return [A[i : i + w, j : j + w * aspect] for i, j in product(*starts)]


def _eigenvalues(window: Tensor) -> Tensor:
    """σ² of a window, falling, in units of its largest entry squared."""
    dtype = torch.float64 if window.device.type == "cpu" else torch.float32
    G, _ = gram(window, dtype)
    found: Tensor = torch.linalg.eigvalsh(G, UPLO="L").flip(0)
    return found.cpu()


def _run_claim() -> Verdict:
    """Noise with a planted power-law tail at four aspects: the whole spectrum drifts, windows do not."""
    figures: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    tail = 2 * torch.rand(64, dtype=torch.float64, generator=generator).pow(-1 / 3)
    whole, windows = [], []
    for aspect in (1, 2, 4, 8):
        m, n = 256, 256 * aspect
        W = torch.randn(m, n, dtype=torch.float64, generator=generator) / math.sqrt(n)
        left, right = (torch.linalg.qr(torch.randn(k, 64, dtype=torch.float64, generator=generator)).Q for k in (m, n))
        W += left * tail @ right.T
        G, _ = gram(W, torch.float64)
        whole.append(median_hill(torch.linalg.eigvalsh(G)))
        windows.append(float(farms(W, rows=128)["alpha_farms"]))
        figures |= {f"aspect {aspect}: whole matrix": whole[-1], f"aspect {aspect}: windows": windows[-1]}
    drift = {"whole matrix": max(whole) - min(whole), "windows": max(windows) - min(windows)}
    figures |= {f"{name}: largest − least": value for name, value in drift.items()}
    return Verdict(held=drift["windows"] < drift["whole matrix"] / 2, figures=figures)


METHOD = Diagnostic(
    name="farms",
    summary="heavy-tail exponent by windows of one aspect, and its distance from what noise scores",
    group="weights",
    paper=Paper(
        authors="Y. Hu, K. Goel, V. Killiakov, Y. Yang",
        title="Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias",
        year=2025,
        link="https://arxiv.org/abs/2506.06280",
    ),
    entry=farms,
    claim=Claim(
        statement="On matrices of aspect 1 to 8 with one planted tail the exponent of windows moves less than half as "
        "much as that of the whole matrix.",
        source="Hu et al. 2025, section 3: the aspect ratio biases the exponent, fixed-aspect subsampling removes it",
        run=_run_claim,
    ),
)
