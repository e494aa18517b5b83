"""What the claims of adaptation methods share: the learned problem's network, moved to text of another kind.

The network of :mod:`eckart.evidence` has learned Python source. Here it is adapted to the prose of docstrings, its
weights frozen and an adapter on every linear map, and judged on docstrings of modules that it has not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eckart.adaptation.method import AdaptMethod, Delta, Layout, Source
from eckart.data import read_texts
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT, forward
from eckart.evidence.problem import SITES
from eckart.records import Site

MAPS = tuple(site for site in SITES if site.kind == "linear")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates that every method tries; the one with the lowest training loss counts."""
STEPS, BATCH = 150, 256
_RUN: dict[Any, Trial] = {}
"""What :func:`adapted` found already."""
SENTENCES = {"calibration": 6000, "evaluation": 1500}


@dataclass(frozen=True)
class Trial:
    """Losses in nats per byte of one adapted network."""

    before: float
    """Held-out loss of the network as it was."""
    after: float
    """Held-out loss of the adapted one."""
    train: float
    """Mean training loss of the last 20 steps; the batches are the same for every method."""
    parameters: int
    weights: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """The adapted network, by name; empty for means and for adapters that are no change of a weight."""

    def figures(self, name: str) -> dict[str, float]:
        return {
            f"{name}: training loss": self.train,
            f"{name}: held-out loss": self.after,
            f"{name}: parameters": float(self.parameters),
        }


@functools.cache
def text_windows(part: str) -> Tensor:
    """(n, 9) uint8: every run of nine bytes within docstring sentences of one part."""
    texts = read_texts("stdlib:docstrings", part=part, limit=SENTENCES[part]).texts
    rows = [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for text in texts]
    return torch.cat([row.unfold(0, CONTEXT + 1, 1) for row in rows if row.numel() > CONTEXT])


@torch.no_grad()
def held_out(predict: Callable[[Tensor], Tensor]) -> float:
    """Mean loss of 20 000 predictions on docstrings of unseen modules, nats per byte; contexts (n, 8) to logits."""
    windows = text_windows("evaluation")
    picked = torch.randint(0, windows.shape[0], (20_000,), generator=torch.Generator().manual_seed(1))
    sample = windows[picked].long()
    return float(cross_entropy(predict(sample[:, :CONTEXT]), sample[:, CONTEXT]))


@functools.cache
def _before() -> float:
    """Held-out loss of the network as it was."""
    base = learned_problem().parameters
    return held_out(lambda contexts: forward(base, contexts))


@functools.cache
def _moments() -> Mapping[str, Any]:
    """Moments of every map on the new text, from 8192 predictions."""
    problem, windows = learned_problem(), text_windows("calibration")
    picked = torch.randint(0, windows.shape[0], (8192,), generator=torch.Generator().manual_seed(2))
    return type(problem)(problem.parameters, windows[picked], problem.held_out, problem.loss).moments()


def deltas_for(
    method: AdaptMethod, rank: int | None, options: Any, seed: int, sites: Sequence[Site] = MAPS
) -> dict[str, Delta]:
    """A started adapter on every one of the maps; ``rank`` None asks the method, map by map."""
    problem = learned_problem()
    found = {}
    for site in sites:
        layout = Layout(name=site.name, kind="linear", out_features=site.out_features, in_features=site.in_features)
        moments = (_moments()[site.name],) if method.needs else ()
        weight = problem.parameters[f"{site.name}.weight"][None]
        source = Source(layout=layout, weight=weight, seed=seed, moments=moments)
        size = method.delta.default_rank(source, options) if rank is None else rank
        found[site.name] = method.delta(layout, size, options)
        found[site.name].start(source)
    if method.tie is not None:
        method.tie(list(found.values()))
    return found


def _train(
    trained: Sequence[Tensor],
    predict: Callable[[Tensor], Tensor],
    steps: int,
    rate: float,
    seed: int,
    after_step: Callable[[int], None],
    penalty: Callable[[], Tensor],
) -> float:
    windows = text_windows("calibration")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(list(trained), lr=rate, weight_decay=0.0)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        sample = windows[torch.randint(0, windows.shape[0], (BATCH,), generator=generator)].long()
        loss = cross_entropy(predict(sample[:, :CONTEXT]), sample[:, CONTEXT])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        torch.autograd.backward(loss + penalty())
        optimizer.step()
        after_step(step + 1)
    return sum(losses[-20:]) / len(losses[-20:])


def _with(
    method: AdaptMethod, rank: int | None, options: Any, steps: int, seed: int, rate: float, sites: Sequence[Site]
) -> tuple[float, Callable[[], Trial]]:
    """The training loss at one rate, and a function that judges what was trained."""
    base = dict(learned_problem().parameters)
    deltas = deltas_for(method, rank, options, seed, sites)

    def weights() -> dict[str, Tensor]:
        return base | {f"{n}.weight": base[f"{n}.weight"] + d.delta()[0] for n, d in deltas.items() if d.linear}

    def predict(contexts: Tensor) -> Tensor:
        return forward(weights(), contexts, beside={n: d for n, d in deltas.items() if not d.linear})

    def penalty() -> Tensor:
        found = [p for d in deltas.values() if (p := d.penalty()) is not None]
        return torch.stack(found).sum() if found else torch.zeros(())

    def after_step(step: int) -> None:
        with torch.no_grad():
            for delta in deltas.values():
                delta.after_step(step)

    trained = list({id(p): p for d in deltas.values() for p in d.parameters()}.values())
    loss = _train(trained, predict, steps, rate, seed, after_step, penalty)

    @torch.no_grad()
    def judged() -> Trial:
        adapted = {name: value.detach() for name, value in weights().items()}
        return Trial(_before(), held_out(predict), loss, sum(p.numel() for p in trained), adapted)

    return loss, judged


def _best(trials: Iterable[tuple[float, Callable[[], Trial]]]) -> Trial:
    """The trial of the lowest training loss; the others are not judged."""
    return min(trials, key=lambda trial: trial[0])[1]()


def adapted(
    method: AdaptMethod,
    *,
    rank: int | None,
    options: Any = None,
    steps: int = STEPS,
    seed: int = 0,
    sites: Sequence[Site] = MAPS,
) -> Trial:
    """The network adapted with the best of ``RATES``. About 0.5 s for each of them and 150 steps, once per process."""
    chosen = method.options() if options is None else options
    key = (method.name, method.delta, rank, repr(chosen), steps, seed, tuple(sites))
    if key not in _RUN:  # many claims compare with the same LoRA
        _RUN[key] = _best(_with(method, rank, chosen, steps, seed, rate, sites) for rate in RATES)
    return _RUN[key]


def means(
    method: AdaptMethod,
    *,
    rank: int | None,
    options: Any = None,
    steps: int = STEPS,
    seeds: int = 3,
    sites: Sequence[Site] = MAPS,
) -> Trial:
    """:func:`adapted` over seeds of batches and starts, averaged."""
    found = [adapted(method, rank=rank, options=options, steps=steps, seed=seed, sites=sites) for seed in range(seeds)]
    return Trial(
        found[0].before,
        sum(t.after for t in found) / seeds,
        sum(t.train for t in found) / seeds,
        found[0].parameters,
    )


@functools.cache
def fine_tuned(steps: int = STEPS, seed: int = 0) -> Trial:
    """All weights of the same maps trained, best of the rates and a tenth of each."""
    base = dict(learned_problem().parameters)
    trials = []
    for rate in (*RATES, *(rate / 10 for rate in RATES)):
        own = {f"{s.name}.weight": base[f"{s.name}.weight"].clone().requires_grad_() for s in MAPS}

        def predict(contexts: Tensor, own: dict[str, Tensor] = own) -> Tensor:
            return forward(base | own, contexts)

        loss = _train(list(own.values()), predict, steps, rate, seed, lambda step: None, lambda: torch.zeros(()))

        def judged(
            loss: float = loss, predict: Callable[[Tensor], Tensor] = predict, own: dict[str, Tensor] = own
        ) -> Trial:
            return Trial(_before(), held_out(predict), loss, sum(p.numel() for p in own.values()))

        trials.append((loss, judged))
    return _best(trials)
