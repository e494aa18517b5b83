r"""SNNK: feed-forward layers as a dot product of a fixed random feature map of the input and trained parameters.

*What it does.* Replaces f(W x + b), or a whole block of layers, by Θ Ψ(x) + c: Ψ is a random map that is drawn from
a seed, Θ (out × m) is all that is stored and trained. Bundling finds Θ in closed form from what the block
computes on calibration inputs: no backward pass.

*Formula.* Ψ(x) = m^-½ exp(a G x − a² ‖x‖² / 2), or m^-½ relu(a G x), m^-½ gelu(a G x), G (m, in) standard normal.
Bundle: with centred features and outputs, Θ = Y Ψᵀ (Ψ Ψᵀ + λ I)⁻¹ and c = ȳ − Θ ψ̄, λ a share of the mean of
diag(Ψ Ψᵀ). Raw estimate: Θ = Φ(W, b) with Φ(w) = m^-½ exp(G w / a − ‖w‖² / (2 a²) + b), so that
E[Φ(w) · Ψ(x)] = exp(wᵀ x + b), exactly, for any a.

*Cost.* Bundle: a pass over n inputs, n m (in + m + out) multiply-adds, and O(m³); float64. A call of the layer: m (in +
out) multiply-adds, so it is faster than a block with h hidden units only for m < h. Stored: out (m + 1) numbers
and the seed; in memory G too, m · in.

*When it does not help.* For compressing a trained MLP, which has structure that random features do not know. On the
learned problem, at 150 features for 96 → 384 → 96 (a fifth of its numbers) the bundle raises the loss by 0.70 nats
per byte; two rank-15 factorisations of the same size, `kfac`, by 0.47; at half of the numbers 0.44 against 0.03.
Leaving the MLP out costs 1.28. The raw estimate is worse than nothing outside of small norms: its relative variance
grows as exp(a² ‖x‖² + ‖w‖² / a² + …), and at layer norm's ‖x‖ = √in it is noise. Raw "relu" features estimate the
arc-cosine kernel ‖w‖‖x‖ (sin θ + (π − θ) cos θ) / 2π, which is not relu(wᵀ x): right as a layer to train, wrong as an
estimate (28 times the variance of the outputs, same problem). Θ Ψ is not linear in x: it cannot be merged.

*Departs from the paper in.* Ridge on calibration data is the main path. a is 1 / the root mean square of ‖x‖ in a
bundle. Of the universal random features only real exponents are here: a Fourier expansion of f has complex
features of the same exponential variance, and ridge fits any f. G is not orthogonal. The authors' code draws
the global random seed anew in every forward pass and keeps G as a plain attribute that a checkpoint loses, and its
correction lacks the ½ for inputs of three dimensions; here G comes from a hash of the saved seed.

*Reference.* A. Sehanobish, K. Choromanski, Y. Zhao, A. Dubey, V. Likhosherstov, “Scalable Neural Network Kernels”,
2024, https://arxiv.org/abs/2310.13225.

*Example.*

>>> import torch
>>> from torch import nn
>>> generator = torch.Generator().manual_seed(0)
>>> x = torch.randn(400, 6, generator=generator)
>>> mlp = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 4))
>>> layer = bundle(mlp, x, features=100)
>>> {name: tuple(value.shape) for name, value in layer.state_dict().items()}
{'readout': (4, 100), 'bias': (4,), 'seed': (), 'scale': ()}
>>> error = (layer(x) - mlp(x)).square().sum() / (mlp(x) - mlp(x).mean(0)).square().sum()
>>> bool(error < 0.05)
True
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

from eckart.errors import InputError, NotFiniteError, problems
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT, WIDTH, forward
from eckart.layers import SNNKLinear
from eckart.layers.random_features import Kind
from eckart.linalg.hashed import gaussians
from eckart.records import Claim, Paper, Technique, Verdict

CHUNK = 4096
"""Inputs whose features are held at once, float64."""
RIDGE = 1e-3


def raw_estimate(layer: nn.Linear, *, features: int, scale: float = 1.0, seed: int = 0) -> SNNKLinear:
    """The raw random estimate of exp(W x + b), unbiased over seeds and useless for large ‖w‖ or ‖x‖; see above.

    For other functions take :func:`bundle`.
    """
    weight = layer.weight.detach().double().cpu()
    new = SNNKLinear(
        layer.in_features,
        layer.out_features,
        features,
        scale=scale,
        seed=seed,
        bias=False,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    u = weight / scale
    exponent = u @ gaussians(seed, (features, layer.in_features)).T - u.square().sum(1, keepdim=True) / 2
    if layer.bias is not None:
        exponent += layer.bias.detach().double().cpu()[:, None]
    with torch.no_grad():
        new.readout.copy_(exponent.exp() / math.sqrt(features))
    return new


@torch.no_grad()
def fit_features(layer: SNNKLinear, inputs: Tensor, outputs: Tensor, *, ridge: float = RIDGE) -> float:
    """Sets Θ and the bias to the ridge solution for ``inputs`` (n, in) and ``outputs`` (n, out).

    ``ridge`` is λ as a share of the mean of diag(Ψ Ψᵀ), ≥ 0. Returns the relative squared error on them.
    Raises InputError for other shapes, NotFiniteError for NaN or Inf, also in the features.
    """
    _check_pairs(inputs, outputs, layer.in_features, layer.out_features, ridge)
    n, m = inputs.shape[0], layer.features
    gram = torch.zeros(m + layer.out_features, m + layer.out_features, dtype=torch.float64)
    total = gram.new_zeros(m + layer.out_features)
    for x, y in zip(torch.split(inputs, CHUNK), torch.split(outputs, CHUNK), strict=True):
        rows = torch.cat([layer.lift(x.double()).cpu(), y.double().cpu()], dim=1)
        gram += rows.T @ rows
        total += rows.sum(0)
    if not torch.isfinite(gram).all():
        raise NotFiniteError("SNNK: NaN or Inf in the features or the outputs; take a smaller scale.")
    if layer.bias is not None:
        gram -= total.outer(total) / n
    features, cross, energy = gram[:m, :m], gram[:m, m:], gram[m:, m:]
    damped = features + ridge * features.diagonal().mean() * torch.eye(m, dtype=torch.float64)
    # Not solve: fewer inputs than features, or an input that never varies, make a singular matrix at λ = 0.
    theta = torch.linalg.lstsq(damped, cross, driver="gelsd").solution
    layer.readout.copy_(theta.T)
    if layer.bias is not None:
        layer.bias.copy_((total[m:] - theta.T @ total[:m]) / n)
    missed = energy.trace() - 2 * (theta * cross).sum() + (theta * (features @ theta)).sum()
    return float(missed / energy.trace()) if energy.trace() else 0.0


@torch.no_grad()
def bundle(
    network: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    features: int,
    kind: Kind = "exp",
    scale: float | None = None,
    ridge: float = RIDGE,
    seed: int = 0,
) -> SNNKLinear:
    """One :class:`SNNKLinear` for a function of rows, such as an MLP, fitted to ``network(inputs)`` in closed form.

    ``inputs`` (…, in) are what the block reads on calibration data; leading dimensions are flattened after the call.
    Several times more inputs than ``features`` are wanted. ``scale`` defaults to 1 / the root mean square of ‖x‖.
    The layer has the inputs' dtype and device. Given the block
    itself, an nn.Module, it can be saved in its place. To end a block in one layer give the whole block; a residual
    connection around it stays outside.
    """
    outputs = network(inputs)
    rows = inputs.flatten(0, -2)
    if scale is None:
        norm = float(rows.double().square().sum(1).mean().sqrt())
        scale = 1 / norm if norm > 0 and math.isfinite(norm) else 1.0
    layer = SNNKLinear(
        inputs.shape[-1],
        outputs.shape[-1],
        features,
        kind=kind,
        scale=scale,
        seed=seed,
        replaces=network.state_dict() if isinstance(network, nn.Module) else (),
        device=inputs.device,
        dtype=inputs.dtype,
    )
    fit_features(layer, rows, outputs.flatten(0, -2), ridge=ridge)
    return layer


def _check_pairs(inputs: Tensor, outputs: Tensor, in_features: int, out_features: int, ridge: float) -> None:
    found = []
    if inputs.ndim != 2 or inputs.shape[1] != in_features or not len(inputs):
        found.append(f"inputs is (n, {in_features}) with n ≥ 1; got {tuple(inputs.shape)}")
    if outputs.ndim != 2 or outputs.shape[1] != out_features or len(outputs) != len(inputs):
        found.append(f"outputs is ({len(inputs)}, {out_features}); got {tuple(outputs.shape)}")
    if not 0 <= ridge < math.inf:
        found.append(f"ridge is a number of at least 0; got {ridge!r}")
    if found:
        raise InputError(problems("SNNK fit", found))


CLAIM_FEATURES = 96


def _run_claim() -> Verdict:
    problem = learned_problem()
    up, down = problem.weights("up"), problem.weights("down")
    windows = problem.held_out.long()
    tape: dict[str, tuple[Tensor, Tensor]] = {}
    forward(problem.parameters, windows[:, :CONTEXT], tape)
    stream, head = tape["mix"][1], problem.weights("head")
    read = problem.inputs()["up"].float()
    mean = read.mean(0)

    def mlp(x: Tensor) -> Tensor:
        return linear(gelu(linear(x, up["weight"], up["bias"])), down["weight"], down["bias"])

    def rise(block: Callable[[Tensor], Tensor]) -> float:
        h = stream + block(layer_norm(stream, (WIDTH,)))
        logits = linear(layer_norm(h, (WIDTH,)), head["weight"], head["bias"])
        return float(cross_entropy(logits, windows[:, CONTEXT]).detach()) - problem.loss

    # The raw ReLU-SNNK of the paper: W₂ Φ(W₁, b) Ψ(x), the bias as one more input.
    G = gaussians(0, (CLAIM_FEATURES, WIDTH + 1)).float()

    def relu_features(x: Tensor, constant: Tensor) -> Tensor:
        return linear(torch.cat([x, constant[:, None]], 1), G).relu() / math.sqrt(CLAIM_FEATURES)

    raw = down["weight"] @ relu_features(up["weight"], up["bias"])
    affine = torch.linalg.lstsq((read - mean).double(), (mlp(read) - mlp(read).mean(0)).double(), driver="gelsd")
    slope = affine.solution.T.float()
    figures = {
        "no MLP: loss rise": rise(torch.zeros_like),
        "raw estimate: loss rise": rise(lambda x: linear(relu_features(x, torch.ones(len(x))), raw, down["bias"])),
        "affine map of the same size, closed form: loss rise": rise(
            lambda x: linear(x - mean, slope, mlp(read).mean(0))
        ),
        "bundle, closed form: loss rise": rise(bundle(mlp, read, features=CLAIM_FEATURES)),
    }
    for features in (150, 384):
        figures[f"bundle of {features} features: loss rise"] = rise(bundle(mlp, read, features=features))
    return Verdict(
        held=figures["bundle, closed form: loss rise"] == min(list(figures.values())[:4]),
        figures=figures,
        note="nats per byte; the MLP has 74 208 numbers, a bundle of m features 96 (m + 1)",
    )


METHOD = Technique(
    name="snnk",
    summary="an MLP as one trained matrix on random features of its input, found in closed form",
    paper=Paper(
        authors="A. Sehanobish, K. Choromanski, Y. Zhao, A. Dubey, V. Likhosherstov",
        title="Scalable Neural Network Kernels",
        year=2024,
        link="https://arxiv.org/abs/2310.13225",
    ),
    entry=bundle,
    claim=Claim(
        statement="The MLP bundled into 96 random features in closed form, an eighth of its numbers, raises the "
        "held-out loss less than the raw random estimate and than the best affine map of the same size.",
        source="abstract: the parameters of the bundled network have explicit formulae for the squared error",
        run=_run_claim,
    ),
)
