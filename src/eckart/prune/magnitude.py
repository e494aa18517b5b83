r"""Magnitude: the smallest weights go, over the whole model, within each layer or within each row.

*What it does.* The baseline of all pruning: looks at nothing but the absolute values. Needs no data.

*Formula.* score = |w|. Scope ``global``: one threshold for all layers, the k-th largest of all |w| with k = ⌊keep · N⌋;
``layer``: one for each layer; ``row``: every output keeps as many weights as any other.

*Cost.* One selection, O(N).

*When it does not help.* One-shot on a trained transformer it is the worst choice here: at half kept, MiniLM's
embeddings have a mean cosine of .70 with the original's, Wanda's .85 (`benchmarks/prune_oneshot.py`). One threshold for
all layers suits networks that are trained on afterwards; without that it starves layers whose weights are small by
scale.

*Departs from the paper in.* The paper prunes each layer by a threshold in multiples of its standard deviation and
retrains; here shares are exact, and nothing is trained. For training see ``global_mp`` and ``gradual_magnitude``.

*Reference.* S. Han, J. Pool, J. Tran, W. J. Dally, “Learning both Weights and Connections for Efficient Neural
Networks”, 2015, https://arxiv.org/abs/1506.02626.

*Example.*

>>> import torch
>>> W = {"a": torch.tensor([[3.0, 0.1], [0.2, 4.0]]), "b": torch.tensor([[0.3, 0.4]])}
>>> {name: mask.sum().item() for name, mask in magnitude_masks(W, 0.5).items()}
{'a': 2, 'b': 1}
>>> magnitude_masks(W, 0.5, scope="row")["a"]
tensor([[ True, False],
        [False,  True]])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from eckart.compression.trial import LINEAR
from eckart.errors import InputError, unknown
from eckart.evidence import learned_problem
from eckart.forms import Dense
from eckart.prune.patterns import Row, Unstructured, global_masks
from eckart.records import Claim, Paper, Technique, Verdict

Scope = Literal["global", "layer", "row"]


def magnitude_masks(
    weights: Mapping[str, Tensor], keep: float, *, scope: Scope = "global", floor: int = 0
) -> dict[str, Tensor]:
    """Bool masks by layer that keep a share ``keep`` of the weights, those of largest magnitude.

    ``weights``: (…, out, in) by layer. ``scope``: where weights compete. ``floor``: weights that every layer keeps at
    least, for the global scope. Raises InputError for options that do not fit, NotFiniteError for NaN, BudgetError
    where ``keep`` leaves nothing.
    """
    if scope not in ("global", "layer", "row"):
        raise InputError(unknown("scope", str(scope), ("global", "layer", "row")))
    scores = {name: W.detach().abs() for name, W in weights.items()}
    if scope == "global":
        return global_masks(scores, keep, floor=floor)
    if floor:
        raise InputError(f"a floor of {floor} weights is for scope='global'; with scope={scope!r} no layer starves.")
    rule = Row() if scope == "row" else Unstructured()
    return {name: rule.mask(score, keep) for name, score in scores.items()}


def _run_claim() -> Verdict:
    problem = learned_problem()
    weights = {name: problem.weights(name)["weight"] for name in LINEAR}
    biases = {name: problem.weights(name)["bias"] for name in LINEAR}
    generator = torch.Generator().manual_seed(0)
    figures: dict[str, float] = {}
    held = True
    for keep in (0.7, 0.5):
        chance = {name: torch.rand(W.shape, generator=generator) for name, W in weights.items()}
        found = {
            "by chance": magnitude_masks(chance, keep, scope="layer"),
            "row": magnitude_masks(weights, keep, scope="row"),
            "layer": magnitude_masks(weights, keep, scope="layer"),
            "global": magnitude_masks(weights, keep),
        }
        rises = {}
        for scope, masks in found.items():
            rises[scope] = problem.rise({n: Dense(weights[n] * mask, bias=biases[n]) for n, mask in masks.items()})
            figures[f"keep {keep:g}, {scope}: loss rise"] = rises[scope]
        held = held and max(rises["layer"], rises["global"]) < 0.5 * rises["by chance"]
    return Verdict(held=held, figures=figures, note="nats per byte; 4 learned maps, no retraining")


METHOD = Technique(
    name="magnitude",
    summary="the smallest weights go, over all layers, by layer or by row; needs no data",
    paper=Paper(
        authors="S. Han, J. Pool, J. Tran, W. J. Dally",
        title="Learning both Weights and Connections for Efficient Neural Networks",
        year=2015,
        link="https://arxiv.org/abs/1506.02626",
    ),
    entry=magnitude_masks,
    claim=Claim(
        statement="With 70 and 50 % of four learned maps kept by magnitude, by layer or over all, the held-out loss "
        "rises less than half as much as with weights kept by chance.",
        source="Han et al. 2015: small weights are the ones that can go",
        run=_run_claim,
    ),
)
