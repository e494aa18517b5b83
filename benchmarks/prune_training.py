"""Pruning while training, every method against gradual magnitude pruning after as many steps; and zeros that stay zero.

    python benchmarks/prune_training.py [--methods iss-p,rigl] [--tasks digits]

Two tasks: the digits of scikit-learn with an MLP (accuracy on the third that is held out), and a byte-level Llama of
two layers on the standard library's source (nats per byte on files that it never saw). 90 and 95 % removed of the maps
inside, three seeds. Methods that remove whole neurons are measured against gradual magnitude pruning of neurons.
"Held" means a better mean over the seeds than that baseline. One thread. Writes benchmarks/results/prune_training.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from eckart.data import read_texts
from eckart.optim import Dion, GaLore, Muon
from eckart.prune import (
    GradientFlow,
    GroupSet,
    MaskSet,
    Schedule,
    chained,
    cric_scores,
    dynamic_sparse_learning,
    find_groups,
    fixed,
    global_mp,
    gradual_magnitude,
    group_envelope,
    hesso_training,
    iss_p,
    keep_zero,
    rigl_training,
)

SEEDS = (0, 1, 2)
KEEPS = (0.1, 0.05)
PATTERN_KEEPS = (1 / 8, 1 / 16)


class Engine(Protocol):
    """What a method gives: anything that hooks an optimizer and leaves a sparse model behind."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None: ...
    def finish(self) -> Any: ...


@dataclass
class Run:
    """One training, as methods see it before it starts."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    """Loss of the next batch."""
    groups: Sequence[GroupSet]
    keep: float
    steps: int
    seed: int


def _with_cric(run: Run) -> Engine:
    found = cric_scores(run.model, run.groups, run.loss, run.optimizer, keep=run.keep)
    return hesso_training(run.model, keep=run.keep, steps=run.steps, groups=run.groups, selector=fixed(found.scores))


WEIGHTS: dict[str, Callable[[Run], Engine]] = {
    "gradual-magnitude": lambda r: gradual_magnitude(r.model, keep=r.keep, steps=r.steps),
    "global-mp": lambda r: global_mp(r.model, keep=r.keep, steps=r.steps),
    "iss-p": lambda r: iss_p(r.model, keep=r.keep, steps=r.steps),
    "rigl": lambda r: rigl_training(r.model, keep=r.keep, steps=r.steps),
    "dsl": lambda r: dynamic_sparse_learning(r.model, keep=r.keep, steps=r.steps, embeddings=False, head=False),
    "wgsef": lambda r: group_envelope(r.model, keep=r.keep, steps=r.steps),
    "gradual-magnitude, erk": lambda r: gradual_magnitude(r.model, keep=r.keep, steps=r.steps, allocation="erk"),
    "fixed at the start, erk": lambda r: gradual_magnitude(
        r.model, keep=r.keep, steps=r.steps, allocation="erk", curve="one-shot"
    ),
}
"""Methods that remove single weights; the first is the baseline. A new one is one line."""
NEURONS: dict[str, Callable[[Run], Engine]] = {
    "gradual-magnitude, neurons": lambda r: Schedule(
        r.model, selector="magnitude", keep=r.keep, steps=r.steps, groups=r.groups
    ),
    "hesso": lambda r: hesso_training(r.model, keep=r.keep, steps=r.steps, groups=r.groups),
    "hesso-cric (100 steps more)": _with_cric,
    "wgsef, neurons": lambda r: group_envelope(r.model, keep=r.keep, steps=r.steps, groups=r.groups),
}
"""Methods that remove neurons; the first is the baseline."""


class _Flow:
    """Progressive gradient flow as an engine."""

    def __init__(self, run: Run, schedule: str) -> None:
        self.flow = GradientFlow(run.model, pattern=f"1:{round(1 / run.keep)}", steps=run.steps, schedule=schedule)
        self.masks = MaskSet({})

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        self.flow.attach(optimizer)

    def finish(self) -> None:
        self.masks = self.flow.bake()


PATTERNS: dict[str, Callable[[Run], Engine]] = {
    "gradual-magnitude, 1:m": lambda r: gradual_magnitude(
        r.model, keep=r.keep, steps=r.steps, pattern=f"1:{round(1 / r.keep)}"
    ),
    "sr-ste": lambda r: _Flow(r, "sr-ste"),
    "mdgf-linear": lambda r: _Flow(r, "mdgf-linear"),
    "mdgf-exponential": lambda r: _Flow(r, "mdgf-exponential"),
    "sdgf-stepwise": lambda r: _Flow(r, "sdgf-stepwise"),
}
"""Methods that keep one of every m weights; the first is the baseline."""


# ---- tasks


class Digits:
    """8 × 8 pixels to ten classes, 64 → 128 → 128 → 10."""

    name, unit, better, steps, rate = "digits", "accuracy", 1, 400, 3e-3

    def __init__(self) -> None:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
        X = torch.tensor(data.data / 16, dtype=torch.float32)[order]
        y = torch.tensor(data.target)[order]
        cut = 2 * len(y) // 3
        self.X, self.y, self.test_X, self.test_y = X[:cut], y[:cut], X[cut:], y[cut:]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def groups(self, model: nn.Module) -> Sequence[GroupSet]:
        return [chained(model, "0", "2"), chained(model, "2", "4")]

    def batches(self, model: nn.Module, seed: int) -> Callable[[], Tensor]:
        draw = torch.Generator().manual_seed(seed)

        def loss() -> Tensor:
            rows = torch.randint(len(self.y), (128,), generator=draw)
            return cross_entropy(model(self.X[rows]), self.y[rows])

        return loss

    def score(self, model: nn.Module) -> float:
        return float((model(self.test_X).argmax(1) == self.test_y).float().mean())


class Bytes:
    """The next byte of source code, by a Llama of width 64."""

    name, unit, better, steps, rate = "llama", "nats per byte", -1, 150, 3e-3

    def __init__(self) -> None:
        parts = [
            read_texts("stdlib:source", part=part).joined.encode()[:2_000_000] for part in ("calibration", "evaluation")
        ]
        self.train, self.test = (torch.frombuffer(bytearray(p), dtype=torch.uint8).long() for p in parts)
        starts = torch.randint(len(self.test) - 65, (64,), generator=torch.Generator().manual_seed(0))
        self.held = torch.stack([self.test[s : s + 65] for s in starts.tolist()])

    def model(self) -> nn.Module:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
            )
        )

    def groups(self, model: nn.Module) -> Sequence[GroupSet]:
        return find_groups(model)

    def _loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        logits = model(input_ids=rows[:, :-1]).logits
        return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def batches(self, model: nn.Module, seed: int) -> Callable[[], Tensor]:
        draw = torch.Generator().manual_seed(seed)

        def loss() -> Tensor:
            starts = torch.randint(len(self.train) - 65, (16,), generator=draw)
            return self._loss(model, torch.stack([self.train[s : s + 65] for s in starts.tolist()]))

        return loss

    def score(self, model: nn.Module) -> float:
        return float(self._loss(model, self.held))


def trained(task: Any, make: Callable[[Run], Engine] | None, keep: float, seed: int) -> tuple[float, float, int, float]:
    """Score, density of what is pruned, weights that leaked, seconds of the thread."""
    torch.manual_seed(seed)
    begin = time.thread_time()
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate)
    loss = task.batches(model, seed)
    engine = make(Run(model, optimizer, loss, task.groups(model), keep, task.steps, seed)) if make else None
    if engine is not None:
        engine.attach(optimizer)
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = task.rate * min(1.0, (step + 1) / 20) * (1 - step / task.steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    report = engine.finish() if engine is not None else None
    masks = getattr(engine, "masks", MaskSet({}))
    with torch.no_grad():
        score = task.score(model.eval())
    density = getattr(report, "density", masks.density())
    return score, density, sum(masks.leaks(model).values()), time.thread_time() - begin


# ---- leaks

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Muon of torch": lambda p: torch.optim.Muon(p, lr=0.01),
    "eckart Muon": lambda p: Muon(p, lr=0.01),
    "eckart GaLore": lambda p: GaLore(p, lr=0.01, rank=8),
    "eckart Dion": lambda p: Dion(p, lr=0.01, rank=8),
}


def leaks(name: str, held: bool, steps: int = 1000) -> int:
    """Pruned weights of a 32 × 24 matrix that are not zero after ``steps``; with masked gradients only if not held."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32, bias=False))
    weight = model[0].weight
    masks = MaskSet({"0.weight": torch.rand(32, 24) < 0.3})
    optimizer = OPTIMIZERS[name]([weight])
    if held:
        keep_zero(masks, model, optimizer)
    else:
        masks.apply(model)
    for _ in range(steps):
        weight.grad = torch.randn(32, 24)
        if not held:
            weight.grad.mul_(masks["0.weight"])
        optimizer.step()
    return sum(masks.leaks(model).values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", default="")
    parser.add_argument("--tasks", default="digits,llama")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [m for m in chosen.methods.split(",") if m]
    result: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "seeds": SEEDS}

    print("leaks after 1,000 steps".ljust(28) + "held by the hook   gradients masked only")
    result["leaks"] = {n: {"hook": leaks(n, True), "gradients": leaks(n, False)} for n in OPTIMIZERS}
    for name, found in result["leaks"].items():
        print(f"  {name:<26}{found['hook']:>12}{found['gradients']:>20}", flush=True)

    rows: list[dict[str, Any]] = []
    for task in (make() for make in (Digits, Bytes) if make.name in chosen.tasks.split(",")):
        dense = [trained(task, None, 1.0, seed)[0] for seed in SEEDS]
        print(f"\n{task.name} ({task.unit}), {task.steps} steps; dense {fmean(dense):.4f}")
        result[f"dense_{task.name}"] = dense
        for table, keeps in ((WEIGHTS, KEEPS), (NEURONS, KEEPS), (PATTERNS, PATTERN_KEEPS)):
            base = next(iter(table))
            names = [n for n in table if n == base or not wanted or n in wanted]
            for keep in keeps:
                for name in names:
                    runs = [trained(task, table[name], keep, seed) for seed in SEEDS]
                    scores = [run[0] for run in runs]
                    row = {
                        "task": task.name,
                        "removed": 1 - keep,
                        "method": name,
                        "scores": scores,
                        "mean": fmean(scores),
                        "density": runs[0][1],
                        "leaks": sum(run[2] for run in runs),
                        "seconds": fmean(run[3] for run in runs),
                    }
                    first = next(
                        (r for r in rows if (r["task"], r["removed"], r["method"]) == (task.name, 1 - keep, base)), row
                    )
                    gain = task.better * (row["mean"] - first["mean"])
                    row["gain"] = gain
                    row["verdict"] = "baseline" if name == base else "held" if gain > 0 else "failed"
                    rows.append(row)
                    spread = max(scores) - min(scores)
                    print(
                        f"  {1 - keep:.0%}  {name:<30}{row['mean']:.4f} ± {spread / 2:.4f}  {gain:+.4f}  "
                        f"{row['verdict']:<9} {row['density']:.2%} kept, {row['leaks']} leaks, {row['seconds']:.1f} s",
                        flush=True,
                    )
    result["rows"] = rows
    if not wanted and len(chosen.tasks.split(",")) == 2:
        target = Path(__file__).parent / "results" / "prune_training.json"
        target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
