r"""Rich or lazy: how far training moved the tangent kernel, the representation and the weights.

*What it does.* Compares a network before and after training. Lazy learning leaves the neural tangent kernel as it was
and only combines fixed features; rich learning changes the features. Beside that it gives the effective rank of the
initial weights, which biases a network to one or the other.

*Formula.* With J (n·k × parameters) the Jacobian of the k outputs at n inputs, K = JJᵀ; kernel alignment
⟨K₀, K_T⟩ / (‖K₀‖‖K_T‖); representation alignment, the same of the Gram matrices HHᵀ of a layer; relative weight
change ‖θ_T − θ₀‖ / ‖θ₀‖. Alignments are between 0 and 1 (both matrices being positive semi-definite); 1 is lazy.

*Cost.* n·k backward passes for each model, and n·k × parameters numbers at once: take some tens of inputs.

*When it does not help.* To say whether a network generalises; both regimes can. Alignment does not see a change of
scale: K_T = 2K₀ has alignment 1. Kernels with one large common part (an output bias, inputs with a large mean)
are aligned whatever happens to the rest: linear students whose initial singular values are all equal ended at 0.974,
0.956 and 0.998 for ranks 1, 4 and 20, so the alignment need not rise with every step of the rank. Figures at
different n cannot be compared.

*Departs from the paper in.* The effective rank here is exp of the entropy of the energies σ²/Σσ², see
:mod:`eckart.geometry.effective_rank`. Nothing is centred.

*Reference.* Y. H. Liu, A. Baratin, J. Cornford, S. Mihalas, E. Shea-Brown, G. Lajoie, “How connectivity structure
shapes rich and lazy learning in neural circuits”, ICLR 2024, https://arxiv.org/abs/2310.08513.

*Example.*

>>> import copy, torch
>>> from torch import nn
>>> before = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
>>> after = copy.deepcopy(before)
>>> _ = nn.init.constant_(after[2].bias, 5.0)  # moves the outputs, and no feature
>>> found = rich_lazy(before, after, torch.randn(6, 4), layer="1")
>>> [round(float(found[name]), 4) for name in ("kernel_alignment", "representation_alignment")]
[1.0, 1.0]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.functional import cross_entropy, mse_loss

from eckart.arch import get_module
from eckart.errors import InputError, MismatchError, NotFiniteError
from eckart.geometry.representations import real_tensor
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict
from eckart.spectra import entropy_rank


def rich_lazy(before: nn.Module, after: nn.Module, x: Tensor, *, layer: str = "") -> dict[str, Finding]:
    """Findings ``kernel_alignment`` (0 to 1), ``representation_alignment`` (0 to 1, where ``layer`` is given),
    ``weight_change`` (relative) and ``initial_effective_rank:NAME`` for each matrix of parameters.

    ``before`` and ``after`` are the same network at two times; both are copied, and run in float64 on the CPU in eval
    mode. ``x`` (n, *shape): a batch; outputs of any shape, one row per input. ``layer`` names a submodule, whose output
    is the representation. Parameters that are not trained (``requires_grad`` False in ``before``) are left out of K.

    Raises InputError for a batch of fewer than two inputs, an unknown layer and networks without trained parameters,
    MismatchError for two networks of different parameters, NotFiniteError for NaN or Inf.
    """
    real_tensor(x.flatten() if isinstance(x, Tensor) else x, "x", "entries")
    if x.ndim < 2 or x.shape[0] < 2:
        raise InputError(f"x: expected a batch of two inputs or more; got shape {tuple(x.shape)}.")
    trained = [name for name, p in before.named_parameters() if p.requires_grad]
    shapes = [{name: tuple(p.shape) for name, p in m.named_parameters()} for m in (before, after)]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise MismatchError(f"rich_lazy: before and after have different parameters: {odd[:4]}.")
    if not trained:
        raise InputError("rich_lazy: no parameter of the network requires a gradient.")
    inputs = x.detach().cpu()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    models = [copy.deepcopy(model).cpu().double().eval() for model in (before, after)]
    n = x.shape[0]
    kernels = [tangent_kernel(model, inputs, trained) for model in models]
    findings = {"kernel_alignment": _alignment("kernel_alignment", kernels[0], kernels[1], n)}
    if layer:
        grams = [H @ H.T for H in (_output_of(model, layer, inputs) for model in models)]
        findings["representation_alignment"] = _alignment("representation_alignment", grams[0], grams[1], n)
    start, end = (torch.cat([model.get_parameter(name).detach().flatten() for name in trained]) for model in models)
    moved, size = float((end - start).norm()), float(start.norm())
    findings["weight_change"] = Finding(
        name="weight_change",
        value=moved / size if size else None,
        uncertainty=0.0,
        n=start.numel(),
        notes=() if size else ("the network started at zero; details hold the absolute change",),
        details={"change": moved, "initial_norm": size},
    )
    for name in trained:
        W = models[0].get_parameter(name).detach()
        if W.ndim == 2 and min(W.shape) > 1:
            energies = torch.linalg.svdvals(W).square()
            key = f"initial_effective_rank:{name}"
            findings[key] = Finding(
                name=key,
                value=entropy_rank(energies) if energies[0] > 0 else None,
                uncertainty=0.0,
                n=energies.numel(),
                unit="directions",
                notes=() if energies[0] > 0 else ("the matrix is zero",),
            )
    return findings


def kernel_alignment(K0: Tensor, KT: Tensor) -> float:
    """⟨K₀, K_T⟩ / (‖K₀‖‖K_T‖) of two matrices (n, n); 0 to 1 for positive semi-definite ones, NaN where one is 0."""
    return float((K0 * KT).sum() / (K0.norm() * KT.norm()))


def tangent_kernel(model: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """K = JJᵀ (n·k, n·k) of the outputs at ``x`` (n, *shape) with respect to the parameters ``names`` (None: all)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    chosen = {name: parameters[name] for name in (names or parameters)}

    def outputs(theta: dict[str, Tensor], one: Tensor) -> Tensor:
        y: Tensor = functional_call(model, {**parameters, **theta}, (one[None],))
        return y.flatten()

    jacobians = vmap(jacrev(outputs), in_dims=(None, 0))(chosen, x)
    J = torch.cat([j.flatten(0, 1).flatten(1) for j in jacobians.values()], dim=1)
    if not J.isfinite().all():
        raise NotFiniteError("tangent_kernel: NaN or Inf among the gradients of the network.")
    return J @ J.T


@torch.no_grad()
def _output_of(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """(n, features): what the submodule returns as the batch passes."""
    if layer not in dict(model.named_modules()):
        raise InputError(f"layer: the network has no submodule {layer!r}; see model.named_modules().")
    seen: list[Tensor] = []
    handle = get_module(model, layer).register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(x)
    finally:
        handle.remove()
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].shape[:1] != x.shape[:1]:
        raise InputError(f"layer: {layer!r} has to run once and return a tensor with one row per input.")
    return seen[0].flatten(1)


def _alignment(name: str, K0: Tensor, KT: Tensor, n: int) -> Finding:
    value = kernel_alignment(K0, KT)
    if math.isnan(value):
        return Finding(name=name, value=None, n=n, notes=("one of the two kernels is zero",))
    return Finding(name=name, value=value, uncertainty=0.0, n=n)


CLAIM_HIDDEN, CLAIM_TIME, CLAIM_SEQUENCES, CLAIM_SEEDS = 64, 10, 200, 3
CLAIM_RANKS = (1, 8, 64)
CLAIM_INPUTS = 20


class _Recurrent(nn.Module):
    """h ← (h + W relu(h) + V x_t)/2 over time, and a linear read-out of relu(h)."""

    def __init__(self, W: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        width = W.shape[0]
        self.input = nn.Parameter(torch.randn(width, 2, generator=generator, dtype=W.dtype) / 2**0.5)
        self.hidden = nn.Parameter(W)
        self.output = nn.Parameter(torch.randn(2, width, generator=generator, dtype=W.dtype) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.hidden.shape[0])
        for at_time in x.unbind(1):
            h = (h + h.relu() @ self.hidden.T + at_time @ self.input.T) / 2
        return h.relu() @ self.output.T


def _truncated(G: Tensor, rank: int) -> Tensor:
    """The rank-``rank`` part of G, scaled back to the Frobenius norm of G."""
    U, S, Vh = torch.linalg.svd(G)
    W: Tensor = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    W *= G.norm() / W.norm()
    return W


def _trained(
    model: nn.Module, x: Tensor, y: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor], to: float
) -> nn.Module:
    """A copy after gradient descent until the loss is ``to``, or 5000 steps."""
    trained = copy.deepcopy(model)
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.05)
    for _ in range(5000):
        loss = loss_of(trained(x), y)
        if loss.item() < to:
            break
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return trained


def _recurrent_alignments(seed: int) -> dict[str, float]:
    """Which of two noisy streams has the larger sum: alignment by rank of the recurrent weights."""
    alignments = {}
    for rank in CLAIM_RANKS:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(CLAIM_SEQUENCES, CLAIM_TIME, 2, generator=generator, dtype=torch.float64)
        y = (x[:, :, 0].sum(1) > x[:, :, 1].sum(1)).long()
        G = torch.randn(CLAIM_HIDDEN, CLAIM_HIDDEN, generator=generator, dtype=torch.float64) / CLAIM_HIDDEN**0.5
        model = _Recurrent(_truncated(G, rank), generator)
        found = rich_lazy(model, _trained(model, x, y, cross_entropy, 0.1), x[:30])
        alignments[f"recurrent, initial rank {rank}"] = float(found["kernel_alignment"])
    return alignments


def _linear_alignments(seed: int) -> dict[str, float]:
    """A two-layer linear student of a linear teacher: first layer of full rank, rank 1, rank 1 along the teacher."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * CLAIM_INPUTS, CLAIM_INPUTS, generator=generator, dtype=torch.float64)
    teacher = torch.randn(CLAIM_INPUTS, 1, generator=generator, dtype=torch.float64) / CLAIM_INPUTS**0.5
    G = torch.randn(CLAIM_HIDDEN, CLAIM_INPUTS, generator=generator, dtype=torch.float64)
    starts = {"full rank": G, "rank 1": _truncated(G, 1), "rank 1 along the task": G[:, :1] @ teacher.T}
    alignments = {}
    for name, W in starts.items():
        model = nn.Sequential(nn.Linear(CLAIM_INPUTS, CLAIM_HIDDEN, bias=False), nn.Linear(CLAIM_HIDDEN, 1, bias=False))
        model.double()
        with torch.no_grad():
            model[0].weight.copy_(W / W.norm() * CLAIM_INPUTS**0.5)  # type: ignore[operator]
            model[1].weight.normal_(std=0.1 / CLAIM_HIDDEN**0.5, generator=generator)  # type: ignore[operator]
        found = rich_lazy(model, _trained(model, x, x @ teacher, mse_loss, 0.01), x)
        alignments[f"linear, {name}"] = float(found["kernel_alignment"])
    return alignments


def _run_claim() -> Verdict:
    means: dict[str, float] = {}
    for seed in range(CLAIM_SEEDS):
        for name, value in (_recurrent_alignments(seed) | _linear_alignments(seed)).items():
            means[name] = means.get(name, 0.0) + value / CLAIM_SEEDS
    a, b, c, full, low, along = means.values()
    return Verdict(
        held=a < b < c and low < full and low < along,
        figures=means,
        note=f"kernel alignment, mean of {CLAIM_SEEDS} seeds; equal ‖W‖_F, trained to equal loss",
    )


METHOD = Diagnostic(
    name="rich-lazy",
    summary="how far training moved tangent kernel, representation and weights; the rank of the initial weights",
    group="representations",
    paper=Paper(
        authors="Y. H. Liu, A. Baratin, J. Cornford, S. Mihalas, E. Shea-Brown, G. Lajoie",
        title="How connectivity structure shapes rich and lazy learning in neural circuits",
        year=2024,
        link="https://arxiv.org/abs/2310.08513",
    ),
    entry=rich_lazy,
    claim=Claim(
        statement="At equal Frobenius norm the kernel alignment after training rises with the rank of the initial "
        "recurrent weights (1, 8, 64); for a linear student rank 1 is below full rank, unless it lies along the task.",
        source="abstract: high-rank initialisations are lazier, except for low-rank ones that align with the task",
        run=_run_claim,
    ),
)
