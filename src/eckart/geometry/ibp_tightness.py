r"""IBP tightness: how much of an interval bound on a ReLU network is real and how much is looseness.

*What it does.* Compares, at given inputs and with the ReLU pattern frozen there, the size of the true image of a
small box with the size that interval bound propagation gives. 1 means that the bound is exact; untrained wide networks
have values near 0.

*Formula.* With J the Jacobian at x and |W| the matrices of absolute values, D the 0/1 pattern of the ReLUs:
τ = (|J| ε) / (|W_L| D |W_{L−1}| … D |W_1| ε) per output, ε the half widths of the box. For two layers with
independent Gaussian entries and hidden width w: √π Γ((w+1)/2) / (w Γ(w/2)) ≈ √(π/2w), from
E|Σ a_k b_k| = √(2/π) E‖a‖ above and E Σ|a_k||b_k| = 2w/π below.

*Cost.* One backward pass per output for |J|, one pass with |W| for the rest.

*When it does not help.* As a certificate: it bounds nothing, being local and linear. Tightness is neither
needed nor enough for robustness (so the authors); a network of zeros is tight. For large boxes, in which
ReLUs switch, the pattern at x is not the pattern of the box.

*Departs from the paper in.* The authors' code takes the class differences into the last layer; here that happens where
``labels`` are given. It clips the box to the range of the data; here half widths may be given per entry instead.

*Reference.* Y. Mao, M. N. Müller, M. Fischer, M. Vechev, “Understanding certified training with interval bound
propagation”, ICLR 2024, https://arxiv.org/abs/2306.10426.

*Example.*

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
>>> model[0].weight.data = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.double)
>>> model[2].weight.data = torch.ones(1, 2, dtype=torch.double)
>>> x = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.double)
>>> finding = ibp_tightness(model, x)  # both ReLUs on: (2, 0) against (2, 2); one on: exact
>>> finding.details["per_sample"]
[0.5, 1.0]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eckart.errors import InputError, NotFiniteError
from eckart.geometry.neural_collapse import check_labels
from eckart.geometry.representations import real_tensor
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict

_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_SHAPE = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout)


def ibp_tightness(
    model: nn.Sequential, x: Tensor, *, half_width: Tensor | None = None, labels: Tensor | None = None
) -> Finding:
    """Finding ``ibp_tightness`` in [0, 1]: the mean of τ over samples and outputs, 1 where bounds are exact.

    ``model``: Sequential (nested ones too) of Linear, Conv, ReLU, BatchNorm in its running statistics, average
    pooling, Flatten, Identity, Dropout (as in eval mode); its weights are read in float64 on the CPU. ``x``:
    (samples, *shape). ``half_width``: the box, of the shape of one input, ≥ 0 (default: equal everywhere; its size
    cancels). ``labels`` (samples,): outputs are then the differences true class − other class. Outputs that do not
    depend on the input are left out and counted. ``details["per_sample"]`` has the means.

    Raises InputError for other modules, by name, and shapes that do not belong together; NotFiniteError for NaN or Inf.
    """
    layers = list(_layers(model))
    dtype = torch.float64
    real_tensor(x.flatten() if isinstance(x, Tensor) else x, "x", "entries")
    if x.ndim < 2:
        raise InputError(f"x: expected a batch (samples × shape of an input); got shape {tuple(x.shape)}.")
    box = torch.ones(x.shape[1:], dtype=dtype) if half_width is None else half_width.detach().cpu().double()
    if box.shape != x.shape[1:] or not (box >= 0).all() or not box.isfinite().all():
        raise InputError(f"half_width: expected {tuple(x.shape[1:])} numbers ≥ 0; got shape {tuple(box.shape)}.")
    h = x.detach().cpu().double().requires_grad_()
    bound = box.expand(x.shape)
    y = h
    for layer in layers[:-1]:
        y, bound = _step(layer, y, bound)
    y, bound, last = _last(layers[-1], y, bound, labels)
    if not y.isfinite().all():
        raise NotFiniteError("ibp_tightness: NaN or Inf in the outputs of the model.")
    image = torch.stack(
        [
            (torch.autograd.grad(column.sum(), h, retain_graph=True)[0].abs() * box).flatten(1).sum(1)
            for column in y.unbind(1)
        ],
        dim=1,
    )
    used = (bound > 0) & last
    ratio = torch.where(used, image / bound.clamp_min(1e-300), 0.0)
    n, dead = x.shape[0], int((last & ~used).sum())
    notes = (f"{dead} outputs do not depend on the input there and are left out",) if dead else ()
    if not used.any():
        return Finding(name="ibp_tightness", value=None, n=n, notes=notes)
    alive = used.any(1)
    per_sample = ratio.sum(1)[alive] / used.sum(1)[alive]
    spread = float(per_sample.std()) / math.sqrt(len(per_sample)) if len(per_sample) > 1 else None
    return Finding(
        name="ibp_tightness",
        value=float(per_sample.mean()),
        uncertainty=None if spread is None else 1.96 * spread,
        n=n,
        notes=notes,
        details={"per_sample": per_sample.tolist()},
    )


def gaussian_tightness(width: int) -> float:
    """√π Γ((w+1)/2)/(w Γ(w/2)): τ of two Gaussian layers with w hidden units and no ReLU, in expectation, w ≥ 1."""
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise InputError(f"gaussian_tightness: width counts hidden units, from 1; got {width!r}.")
    return math.sqrt(math.pi) * math.exp(math.lgamma((width + 1) / 2) - math.lgamma(width / 2)) / width


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Sequential) or len(model) == 0:
        raise InputError(f"model: expected a nn.Sequential that is not empty; got {type(model).__name__}.")
    for layer in model:
        if isinstance(layer, nn.Sequential):
            yield from _layers(layer)
        elif isinstance(layer, (*_AFFINE, *_BATCH_NORM, *_AVERAGE, *_SHAPE, nn.ReLU)):
            yield layer
        else:
            raise InputError(
                f"model: {type(layer).__name__} is not piecewise linear with a known bound here; expected "
                "Linear, Conv, BatchNorm, average pooling, Flatten, Identity, Dropout and ReLU."
            )


def _step(layer: nn.Module, y: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out of a layer, and the half widths of the box that do."""
    if isinstance(layer, nn.ReLU):
        return y.relu(), bound * (y > 0)
    if isinstance(layer, nn.Dropout):
        return y, bound
    if isinstance(layer, _AFFINE):
        forward = _affine(layer)
        weight = layer.weight.detach().cpu().double()
        bias = None if layer.bias is None else layer.bias.detach().cpu().double()
        return forward(y, weight, bias), forward(bound, weight.abs(), None)
    if isinstance(layer, _BATCH_NORM):
        if layer.running_mean is None or layer.running_var is None:
            raise InputError("model: a BatchNorm without running statistics has no fixed weight.")
        scale = (layer.running_var.detach().cpu().double() + layer.eps).rsqrt()
        gain = torch.ones_like(scale) if layer.weight is None else layer.weight.detach().cpu().double()
        shift = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach().cpu().double()
        shape = (1, -1, *[1] * (y.ndim - 2))
        slope = (gain * scale).view(shape)
        mean = layer.running_mean.detach().cpu().double().view(shape)
        return (y - mean) * slope + shift.view(shape), bound * slope.abs()
    return layer(y), layer(bound)  # averages, with positive weights, and changes of shape


def _affine(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The map of the layer as a function of input, weight and bias, with its own stride, padding and groups."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer._conv_forward
    return nn.functional.linear


def _last(layer: nn.Module, y: Tensor, bound: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (n, k), their bound, and which of them count; with labels, differences to the true class."""
    if labels is None:
        y, bound = _step(layer, y, bound)
        return y.flatten(1), bound.flatten(1), torch.ones(y.flatten(1).shape, dtype=torch.bool)
    if not isinstance(layer, nn.Linear):
        raise InputError(f"labels: the last layer has to be Linear, to take differences in it; got {layer}.")
    W = layer.weight.detach().cpu().double()
    target = check_labels(labels, y.shape[0], W.shape[0])
    differences = W[target][:, None] - W  # (n, classes, features)
    logits = nn.functional.linear(y, W, None if layer.bias is None else layer.bias.detach().cpu().double())
    margins = logits.gather(1, target[:, None]) - logits
    counts = torch.ones_like(margins, dtype=torch.bool).scatter_(1, target[:, None], False)
    return margins, torch.einsum("nkf,nf->nk", differences.abs(), bound), counts


CLAIM_WIDTHS = (16, 64, 256)
CLAIM_RADIUS, CLAIM_STEPS = 0.3, 300


def _gaussian_network(width: int, depth: int, generator: torch.Generator) -> nn.Sequential:
    sizes = [256, *[width] * depth, 10]
    model = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)])
    for layer in model:
        nn.init.normal_(layer.weight, generator=generator)  # type: ignore[arg-type]
    return model.double()


def _trained(x: Tensor, y: Tensor, radius: float) -> nn.Sequential:
    """A small ReLU network trained on the worst case within the interval bound of ``radius``; 0: as usual."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(CLAIM_STEPS):
        centre, width = x, torch.full_like(x, radius * min(1.0, 2 * step / CLAIM_STEPS))
        for layer in model:
            if isinstance(layer, nn.Linear):
                centre, width = layer(centre), nn.functional.linear(width, layer.weight.abs())
            else:
                low, high = (centre - width).relu(), (centre + width).relu()
                centre, width = (low + high) / 2, (high - low) / 2
        wrong = torch.ones_like(centre).scatter_(1, y[:, None], -1.0)
        optimiser.zero_grad()
        torch.autograd.backward(cross_entropy(centre + wrong * width, y))
        optimiser.step()
    return model


def _run_claim() -> Verdict:
    generator = torch.Generator().manual_seed(0)
    figures, errors = {}, []
    for width in CLAIM_WIDTHS:
        found = ibp_tightness(_gaussian_network(width, 1, generator), torch.randn(1, 256, generator=generator))
        figures[f"Gaussian, hidden width {width}"] = float(found)
        errors.append(abs(float(found) / gaussian_tightness(width) - 1))
    deeper = [float(ibp_tightness(_gaussian_network(64, k, generator), torch.ones(1, 256))) for k in (1, 2, 3)]
    figures |= {f"Gaussian, width 64, {k} hidden layers": value for k, value in enumerate(deeper, 1)}
    y = torch.arange(400) % 4
    means = 1.5 * torch.randn(4, 20, generator=generator, dtype=torch.float64)
    x = means[y] + torch.randn(400, 20, generator=generator, dtype=torch.float64)
    plain, certified = (float(ibp_tightness(_trained(x, y, radius), x, labels=y)) for radius in (0.0, CLAIM_RADIUS))
    figures |= {"trained as usual": plain, f"trained on interval bounds of ±{CLAIM_RADIUS}": certified}
    figures["largest relative distance from the closed form"] = max(errors)
    held = max(errors) < 0.1 and deeper[0] > deeper[1] > deeper[2] and certified > plain
    return Verdict(held=held, figures=figures, note="four Gaussian classes in 20 dimensions, two hidden layers of 64")


METHOD = Diagnostic(
    name="ibp-tightness",
    summary="how much of an interval bound on a ReLU network is real: 1 exact, near 0 loose",
    group="certificates",
    paper=Paper(
        authors="Y. Mao, M. N. Müller, M. Fischer, M. Vechev",
        title="Understanding certified training with interval bound propagation",
        year=2024,
        link="https://arxiv.org/abs/2306.10426",
    ),
    entry=ibp_tightness,
    claim=Claim(
        statement="For Gaussian linear networks tightness falls with width, within 10 % of the closed form at hidden "
        "widths 16, 64 and 256, and with depth; training on interval bounds raises it above usual training.",
        source="abstract: decreases with width and depth at initialization, but improves with IBP training",
        run=_run_claim,
    ),
)
