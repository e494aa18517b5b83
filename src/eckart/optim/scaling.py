r"""Learning rate and weight decay of matrices by width: layer-wise scaling and muP, two presets of one scaler.

*What it does.* Turns a learning rate and a weight decay that were tuned on a narrow model into those of a wider one.
Two presets agree on the learning rate and not on the decay.

*Formula.* With w = width/base width, for matrices whose both sides grow: η ← η/w, and λ ← λ√w ("layerwise") or
λ ← λw ("mup", MuAdam with the decay of AdamW, W ← W − η(λW + u)). Vectors (norms, biases) and maps with one side
that grows (embeddings, head) keep η, and have λ = 0 ("layerwise") or keep λ ("mup"). Why the root: after 1/(ηλ) steps
AdamW forgets where it began, and the norm of W is set by √(η/λ); the paper measures a top singular value σ₁ ∝
√(η/λ) d^¾ at width d. With η ∝ 1/d, σ₁ stays the same for λ ∝ √d, and goes as d^¼ for a constant λ and d^−¼ for λ ∝ d.

*Cost.* None. The check, :func:`match_top_singular_values`, takes an SVD of every matrix of both models.

*When it does not help.* Before training has forgotten where it began, and where gradients are of low rank at every
width: then each step of AdamW has a top singular value near η d, σ₁ goes as √(η/λ) d, and λ ∝ d is the rule that keeps
it. So it is on the small problem here, and the paper's claim does not hold there: from width 16 to 64 top singular
values differ by a factor of up to 1.11 for λ ∝ d, 2.45 for λ ∝ √d and 3.31 for a constant λ with 32 predictions a step,
and 1.09, 1.42, 1.69 with 128. The root is better than a constant in these figures (in one shorter trial they tied) and
best in none. With steps of independent noise, σ₁ would go as √(η/λ) d^½ and a constant λ would do. Measure your own
exponent with :func:`match_top_singular_values` on two short runs before you trust either preset.

*Departs from the paper in.* The exponent ¾ is an observation there, not a theorem, and so is the rule. The head counts
as a vector, as in MuAdam, which goes with logits divided by w (a multiplier of the model, not of the optimizer); a
model without that multiplier wants a lower ``lr`` for its head, by ``overrides``. Which matrices grow is read off a
base model where one is given, otherwise all matrices are taken to.

*Reference.* Z. Fan, Y. Liu, Q. Zhao, A. Yuan, Q. Gu, “Robust Layerwise Scaling Rules by Proper Weight Decay Tuning”,
2025, https://arxiv.org/abs/2510.15262; G. Yang, E. Hu and others, “Tensor Programs V: Tuning Large Neural Networks via
Zero-Shot Hyperparameter Transfer”, 2021, https://arxiv.org/abs/2203.03466, for muP.

*Example.*

>>> from torch import nn
>>> from eckart.optim import param_groups
>>> wide = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
>>> groups = param_groups(wide, lr=0.01, weight_decay=0.1, scale="layerwise", base_width=16, width=64)
>>> [(group["role"], group["lr"], group["weight_decay"]) for group in groups]
[('linear', 0.0025, 0.2), ('head', 0.01, 0.0), ('bias', 0.01, 0.0)]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm

from eckart.errors import InputError, MismatchError, NotFiniteError, problems, unknown
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT, EMBEDDING, VOCABULARY
from eckart.records import Claim, Finding, Paper, Technique, Verdict


@dataclass(frozen=True, kw_only=True)
class ScalingRule:
    """Powers of w = width / base width that learning rate and weight decay of a matrix are multiplied by."""

    lr: float
    weight_decay: float
    vectors_decay: bool
    """Whether vectors keep their weight decay; their learning rate stays in any case."""

    def scaled(self, lr: float, weight_decay: float, w: float | None) -> tuple[float, float]:
        """(lr, weight_decay) of a matrix whose width grew by ``w``; of a vector where that is None."""
        if w is None:
            return lr, weight_decay if self.vectors_decay else 0.0
        return lr * w**self.lr, weight_decay * w**self.weight_decay


SCALING_RULES: dict[str, ScalingRule] = {
    "mup": ScalingRule(lr=-1.0, weight_decay=1.0, vectors_decay=True),
    "layerwise": ScalingRule(lr=-1.0, weight_decay=0.5, vectors_decay=False),
}
"""The presets by name."""


def width_ratio(shape: Sequence[int], base: Sequence[int], *, transposed: bool = False) -> float | None:
    """How much the inputs of a matrix (out, in) grew from the base's; None where not both sides did.

    Of more dimensions, a convolution (out, in, …) counts in × … as inputs. ``transposed``: the last two are (in, out).
    """
    rows, columns = shape[0] / base[0], math.prod(shape[1:]) / math.prod(base[1:])
    if len(shape) == 3 and shape[0] == base[0]:  # a stack of matrices; a convolution grew in its first side
        rows, columns = shape[1] / base[1], shape[2] / base[2]
    if transposed:
        rows, columns = columns, rows
    return None if rows == 1 or columns == 1 else columns


def layerwise_scaling(
    lr: float, weight_decay: float, *, width: int, base_width: int, rule: str = "layerwise"
) -> tuple[float, float]:
    """(lr, weight_decay) for the matrices of AdamW at ``width``, from those tuned at ``base_width``; vectors keep lr.

    :func:`eckart.optim.param_groups` with ``scale`` does the same for all parameters of a model. ``rule`` is a name
    in :data:`eckart.optim.SCALING_RULES`. Raises InputError for an unknown rule and numbers out of range.
    """
    faults = [
        f"{name} is an int of at least 1; got {value!r}"
        for name, value in (("width", width), ("base_width", base_width))
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    faults += [
        f"{name} is a number of at least 0; got {value!r}"
        for name, value in (("lr", lr), ("weight_decay", weight_decay))
        if not 0 <= value < math.inf
    ]
    if rule not in SCALING_RULES:
        faults.append(unknown("rule", rule, SCALING_RULES))
    if faults:
        raise InputError(problems("layerwise_scaling", faults))
    return SCALING_RULES[rule].scaled(lr, weight_decay, width / base_width)


def match_top_singular_values(model: nn.Module, base: nn.Module) -> Finding:
    """Whether the matrices of a wide model have the top singular values of a narrow one, both after training.

    The value is the largest factor, at least 1, by which a pair of matrices of the same name differs; 1 is a perfect
    match, and :func:`layerwise_scaling` aims at it. ``details`` has the ratio wide : narrow for each. Matrices are the
    parameters of two dimensions of which both grew. Raises MismatchError where there are none, NotFiniteError for NaN
    or Inf. Costs the singular values of both models in float64.
    """
    narrow = dict(base.named_parameters())
    ratios: dict[str, float] = {}
    for name, wide in model.named_parameters():
        other = narrow.get(name)
        if other is None or other.ndim != 2 or wide.ndim != 2 or width_ratio(wide.shape, other.shape) is None:
            continue
        ratios[name] = top_singular_value(wide, name) / top_singular_value(other, name)
    if not ratios:
        raise MismatchError(
            "match_top_singular_values compares matrices of one name whose both sides differ; there are none."
        )
    apart = max(max(r, 1 / r) if r > 0 else math.inf for r in ratios.values())
    return Finding(
        name="top_singular_value_mismatch",
        value=apart,
        uncertainty=0.0,
        n=len(ratios),
        unit="times",
        details={"ratios": ratios},
    )


def top_singular_value(weight: Tensor, name: str = "the weight") -> float:
    """σ₁ of a matrix, in float64. Raises NotFiniteError for NaN or Inf."""
    if not bool(torch.isfinite(weight).all()):
        raise NotFiniteError(f"{name} has NaN or Inf.")
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


WIDTHS = (16, 32, 64)
STEPS, BATCH, LR, WEIGHT_DECAY = 400, 32, 0.01, 2.0


class _OneBlock(nn.Module):
    """The network of :mod:`eckart.evidence` at any width, without biases, its logits divided by w as in muP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(VOCABULARY, EMBEDDING)
        self.mix = nn.Linear(CONTEXT * EMBEDDING, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for layer in (self.mix, self.up, self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.normal_(self.head.weight, std=WIDTHS[0] ** -0.5)

    def forward(self, contexts: Tensor) -> Tensor:
        h = self.mix(self.embed(contexts).flatten(1))
        h = h + self.down(gelu(self.up(layer_norm(h, (self.width,)))))
        logits: Tensor = self.head(layer_norm(h, (self.width,)))
        return logits * (WIDTHS[0] / self.width)


def _settled(width: int, power: float) -> list[float]:
    """Top singular values of up and down after training with λ ∝ width^power, means over the last 100 steps."""
    windows = learned_problem().calibration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _OneBlock(width)
    w = width / WIDTHS[0]
    matrices = [model.up.weight, model.down.weight]
    vectors = [model.embed.weight, model.mix.weight, model.head.weight]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "lr": LR / w, "weight_decay": WEIGHT_DECAY * w**power},
            {"params": vectors, "lr": LR, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(0)
    seen = []
    for step in range(STEPS):
        sample = windows[torch.randint(0, windows.shape[0], (BATCH,), generator=generator)].long()
        loss = cross_entropy(model(sample[:, :CONTEXT]), sample[:, CONTEXT])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step >= STEPS - 100 and step % 20 == 0:
            seen.append([top_singular_value(weight) for weight in matrices])
    means: list[float] = torch.tensor(seen).mean(0).tolist()
    return means


def _run_claim() -> Verdict:
    figures: dict[str, float] = {}
    base = _settled(WIDTHS[0], 0.0)
    apart: dict[str, float] = {}
    for name, power in (("constant", 0.0), ("√d", 0.5), ("d", 1.0)):
        values = torch.tensor([base, *(_settled(width, power) for width in WIDTHS[1:])]).log()
        apart[name] = float((values.amax(0) - values.amin(0)).max().exp())
        figures[f"λ ∝ {name}: largest factor between widths"] = apart[name]
        slope = float((values[-1] - values[0]).mean()) / math.log(WIDTHS[-1] / WIDTHS[0])
        figures[f"λ ∝ {name}: x in σ₁ ∝ d^x"] = slope
    return Verdict(
        held=apart["√d"] < min(apart["constant"], apart["d"]),
        figures=figures,
        note="two matrices of a byte model of widths 16, 32, 64, 400 steps of AdamW with η ∝ 1/d, one seed",
    )


METHOD = Technique(
    name="layerwise-scaling",
    summary="a rule that carries learning rate and weight decay of AdamW from one width to another",
    paper=Paper(
        authors="Z. Fan, Y. Liu, Q. Zhao, A. Yuan, Q. Gu",
        title="Robust Layerwise Scaling Rules by Proper Weight Decay Tuning",
        year=2025,
        link="https://arxiv.org/abs/2510.15262",
    ),
    entry=layerwise_scaling,
    claim=Claim(
        statement="With η ∝ 1/d, top singular values differ less between widths for λ ∝ √d than for a constant λ "
        "and for λ ∝ d.",
        source="abstract: σ₁ ∝ √(η/λ) d^¾",
        run=_run_claim,
    ),
)
