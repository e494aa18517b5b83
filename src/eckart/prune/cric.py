r"""CRIC: before anything is pruned, neurons that only look unimportant are found and scored anew.

*What it does.* Scores from one gradient say little of what happens when many neurons go at once. The cycles try it
out: those picked fade to zero over a few training steps, while all scores are taken again along the way; whatever
falls among the lowest only now joins the next cycle. Each cycle starts from the weights as they were. What comes out
are scores, averaged over all these states, and the model as it was.

*Formula.* Probes: for each set, its lowest quarter, half, three quarters are set to zero, which gives
r = mean L / L_ref. Cycle c: V_c fades over D steps, w ← w (D − t − 1) / (D − t);
V_{c+1} = {groups that were among the lowest K at any step} \ (V_1 ∪ … ∪ V_c); it stops when |V_{c+1}| ≤ tolerance.
score = mean of the saliencies over all steps + r / |set|.

*Cost.* Three forward passes per set, and up to ``cycles`` · ``steps`` training steps that are thrown away; one copy of
the model and of the optimizer's state.

*When it does not help.* Where scores are not what goes wrong. The loss term is the same for all groups of a set, so
within one layer only the averaging is left of it. And before a network has learned: with scores taken at random
weights, HESSO in ``benchmarks/prune_training.py`` (means of three seeds, against HESSO with its own scores) gives, on
the digits (accuracy after 250 steps) .662 against .726 with 90 % removed and .292 against .322 with 95 %; on a small
Llama (nats per byte after 150 steps, 2.683 dense) 2.715 against 2.697 and 2.713 against 2.699.

*Departs from the paper in.* A function that runs before the schedule, in the place of phases of an optimizer. The
optimizer's state is put back, as the weights are; theirs keeps it. It needs a function that computes the loss.

*Reference.* T. Chen, X. Qu, D. Aponte, C. Banbury, J. Ko, T. Ding, Y. Ma, V. Lyapunov, I. Zharkov, L. Liang, “HESSO:
Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning”, 2024,
https://arxiv.org/abs/2409.09085.

*Example.*

>>> import torch
>>> from torch import nn
>>> from eckart.prune import Schedule, chained, fixed
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))
>>> X = torch.randn(100, 10)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
>>> groups = [chained(model, "0", "2")]
>>> found = cric_scores(model, groups, lambda: (model(X) - X[:, :1]).square().mean(), optimizer, keep=0.5)
>>> found.settled, found.scores["0→2"].shape
(True, torch.Size([16]))
>>> engine = Schedule(model, groups=groups, selector=fixed(found.scores), keep=0.5, action="fade", steps=200)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eckart.errors import InputError, NotFiniteError, problems
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT
from eckart.evidence.trial import BATCH, held_out_loss, plainly_trained, train
from eckart.prune.groups import GroupSet
from eckart.prune.masks import plain_optimizer
from eckart.prune.patterns import check_keep, highest
from eckart.prune.schedule import Schedule
from eckart.prune.selectors import Selector, find_selector, fixed
from eckart.prune.structure import Coupled, Units, check_gradients
from eckart.prune.trial import RATE, neurons
from eckart.records import Claim, Paper, Technique, Verdict


@dataclass(frozen=True)
class CricResult:
    """Scores, and how they came about."""

    scores: Mapping[str, Tensor]
    """One per group, by set: the higher, the longer it should stay."""
    probes: Mapping[str, tuple[float, ...]]
    """By set: the loss with a share of its groups at zero, divided by the loss with all."""
    cycles: int
    """How many were run."""
    settled: bool
    """Whether the last brought no more newcomers than the tolerance."""


def cric_scores(
    model: nn.Module,
    groups: Sequence[GroupSet],
    loss: Callable[[], Tensor],
    optimizer: Any,
    *,
    keep: float,
    steps: int = 10,
    cycles: int = 10,
    probes: Sequence[float] = (0.25, 0.5, 0.75),
    tolerance: int = 0,
    selector: str | Selector = "saliency",
) -> CricResult:
    """Corrected scores of coupled groups. The model and the optimizer are as before when it returns.

    Call it before a schedule is attached: it takes steps of its own, and hooks of the optimizer would count them.

    ``loss()``: the loss of the next batch, a scalar to differentiate. ``keep``: share of the groups' weights that will
    stay, in (0, 1]. ``steps`` ≥ 1 per cycle, ``cycles`` ≥ 1 at most; ``probes``: shares in (0, 1); ``tolerance`` ≥ 0.
    Raises InputError with all options out of range, NotFiniteError where a loss or a score is NaN or Inf.
    """
    share = check_keep(keep)
    faults = [f"{n} is an int of at least 1; got {v!r}" for n, v in (("steps", steps), ("cycles", cycles)) if v < 1]
    faults += [f"probes are shares in (0, 1); got {p!r}" for p in probes if not 0 < p < 1]
    faults += [f"tolerance counts groups, from 0; got {tolerance!r}"] * (tolerance < 0)
    if faults:
        raise InputError(problems("cric", faults))
    chosen, structure, plain = find_selector(selector), Coupled(model, groups), plain_optimizer(optimizer)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    memory = copy.deepcopy(plain.state_dict())

    def restore() -> None:
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(weights[name])

    def scored() -> Units:
        plain.zero_grad()
        value = loss()
        _check(value)
        torch.autograd.backward(value)
        views = structure.views()
        check_gradients(views, "cric")
        scores = chosen.score(views)
        if bad := [name for name, s in scores.items() if not bool(s.isfinite().all())]:
            raise NotFiniteError(problems("cric: the scores of these sets hold NaN or Inf", bad))
        return scores

    def lowest(scores: Units) -> Units:
        return {name: ~stays for name, stays in structure.choose(scores, share, floor=1).items()}

    try:
        first = scored()
        with torch.no_grad():
            reference = max(_check(loss()), 1e-30)
            ratios: dict[str, tuple[float, ...]] = {}
            for name, score in first.items():
                found = []
                for probe in probes:
                    k = score.numel() - max(1, int(probe * score.numel()))
                    structure.scale({name: highest(score, k).float()})
                    found.append(_check(loss()) / reference)
                    restore()
                ratios[name] = tuple(found)
        total, seen = {name: s.clone() for name, s in first.items()}, 1
        active = lowest(first)
        history = {name: a.clone() for name, a in active.items()}
        settled, cycle = False, 0
        while cycle < cycles and not settled:
            cycle += 1
            trial = {name: torch.zeros_like(a) for name, a in active.items()}
            for t in range(steps):
                scores = scored()
                for name, low in lowest(scores).items():
                    total[name] += scores[name]
                    trial[name] |= low & ~history[name]
                seen += 1
                plain.step()
                factor = (steps - t - 1) / (steps - t)
                structure.scale(
                    {n: torch.ones(len(a), device=a.device).masked_fill(a, factor) for n, a in active.items()}
                )
            restore()
            active = trial
            settled = sum(int(a.sum()) for a in active.values()) <= tolerance
            history = {name: h | active[name] for name, h in history.items()}
    finally:
        restore()
        plain.load_state_dict(memory)
        plain.zero_grad()
    mean = {name: sum(r) / len(r) if r else 0.0 for name, r in ratios.items()}
    return CricResult({name: s / seen + mean[name] / s.numel() for name, s in total.items()}, ratios, cycle, settled)


def _check(value: Tensor) -> float:
    number = float(value.detach())
    if not abs(number) < float("inf"):
        raise NotFiniteError(f"cric: the loss is {number}.")
    return number


def _pruned(keep: float, corrected: bool, steps: int, seed: int) -> float:
    """Held-out loss of the trained network after its neurons were cut at once and the rest trained on."""
    model = plainly_trained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE / 10)
    windows, generator = learned_problem().calibration, torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        sample = windows[torch.randint(0, windows.shape[0], (BATCH,), generator=generator)].long()
        return cross_entropy(model(sample[:, :CONTEXT]), sample[:, CONTEXT])

    sets, selector = neurons(model), find_selector("saliency")
    if corrected:
        selector = fixed(cric_scores(model, sets, loss, optimizer, keep=keep).scores)
    else:
        torch.autograd.backward(loss())
        selector = fixed(selector.score(Coupled(model, sets).views()))
    engine = Schedule(model, selector=selector, keep=keep, groups=sets, steps=steps, curve="one-shot")
    engine.attach(optimizer)
    train(model, optimizer, steps, seed)
    engine.finish()
    return held_out_loss(model)


def _run_claim() -> Verdict:
    held = True
    figures: dict[str, float] = {}
    for keep in (0.3, 0.1):
        with_cycles, without = _pruned(keep, True, 50, 0), _pruned(keep, False, 50, 0)
        figures |= {f"cric_{keep}": with_cycles, f"saliency_{keep}": without}
        held &= with_cycles < without
    return Verdict(held=held, figures=figures)


METHOD = Technique(
    name="hesso-cric",
    summary="Cycles of trial pruning correct the scores of neurons before any is pruned.",
    paper=Paper(
        authors="T. Chen, X. Qu, D. Aponte, C. Banbury, J. Ko, T. Ding, Y. Ma, V. Lyapunov, I. Zharkov, L. Liang",
        title="HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning",
        year=2024,
        link="https://arxiv.org/abs/2409.09085",
    ),
    entry=cric_scores,
    claim=Claim(
        statement="A trained network cut at once to 30 and 10 % of its neurons and trained on for 50 steps ends at a "
        "lower held-out loss where the cycles chose them than where the saliency of one batch did.",
        source="abstract: CRIC identifies indispensable structures reliably and prevents the collapse of performance",
        run=_run_claim,
    ),
)
