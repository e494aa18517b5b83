"""Pruning while training, every method against gradual magnitude pruning after as many steps; and zeros that stay zero.

    python benchmarks/prune_training.py [--methods iss-p,rigl] [--tasks digits]

Two tasks: the digits of scikit-learn with an MLP (accuracy on the third that is held out), and a small byte-level Llama
on the standard library's source (nats per byte on files that it never saw). The Llama has one layer of width 64 and is
trained for 150 steps of 384 bytes, so that all fits into minutes: it says which method copes with a short training, not
what a long one gives. Its learning rate is that of 3e-3, 5e-3 and 1e-2 with which the dense twin ends lowest.
In so few steps the maps inside learn little, and with 5 % of them the loss is that of the dense twin within the spread
of the seeds: differences between methods on the Llama are small, and say more about the first steps than the last.

90 and 95 % removed of the maps inside, N:M with 1 of 8 and 1 of 16 kept, three seeds. Baselines: gradual magnitude with
the same share in each layer, and with shares by Erdős-Rényi-Kernel (ERK). Methods that remove whole neurons are
measured against gradual magnitude pruning of neurons, N:M methods against gradual magnitude towards N:M. "Held" means a
better mean over the seeds than a baseline; beside it stands in how many seeds. One thread.

Every row is written to benchmarks/results/prune_training.json as it is measured. A run that was cut off goes on
where it was; one that finds a complete file, or one of other settings, begins anew; ``--methods`` renews these rows.
"""

from __future__ import annotations

import argparse
import copy
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
    sparse_soup,
)

SEEDS = (0, 1, 2)
KEEPS = (0.1, 0.05)
PATTERN_KEEPS = (1 / 8, 1 / 16)
RESULT = Path(__file__).parent / "results" / "prune_training.json"


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
    rate: float
    """Highest learning rate."""


def warm(run: Run, step: int) -> None:
    """Sets the learning rate of a step: warmed up over 20, then linear to zero."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate * min(1.0, (step + 1) / 20) * (1 - step / run.steps)


def train(run: Run, begin: int = 0) -> None:
    """Steps from ``begin`` to the last."""
    for step in range(begin, run.steps):
        warm(run, step)
        run.optimizer.zero_grad()
        run.loss().backward()
        run.optimizer.step()


class _Soup:
    """Gradual magnitude whose last quarter, with the masks final, is trained three times and averaged."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.engine = gradual_magnitude(run.model, keep=run.keep, steps=run.steps)
        self.start: tuple[Any, Any] | None = None

    @property
    def masks(self) -> MaskSet:
        return self.engine.masks

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        self.engine.attach(optimizer)
        optimizer.register_step_post_hook(lambda *_: self._remember())

    def _remember(self) -> None:
        if self.start is None and self.engine.done:
            self.start = copy.deepcopy((self.run.model.state_dict(), self.run.optimizer.state_dict()))

    def finish(self) -> None:
        run, (weights, memory) = self.run, self.start or ({}, {})
        self.engine.finish()
        states = [copy.deepcopy(run.model.state_dict())]
        for _ in range(2):
            run.model.load_state_dict(weights)
            run.optimizer.load_state_dict(copy.deepcopy(memory))
            with keep_zero(self.masks, run.model, run.optimizer):
                train(run, self.engine.end)
            states.append(copy.deepcopy(run.model.state_dict()))
        sparse_soup(run.model, states, masks=self.masks)


def _with_cric(run: Run) -> Engine:
    found = cric_scores(run.model, run.groups, run.loss, run.optimizer, keep=run.keep)
    return hesso_training(run.model, keep=run.keep, steps=run.steps, groups=run.groups, selector=fixed(found.scores))


WEIGHTS: dict[str, Callable[[Run], Engine]] = {
    "gradual-magnitude": lambda r: gradual_magnitude(r.model, keep=r.keep, steps=r.steps),
    "gradual-magnitude, erk": lambda r: gradual_magnitude(r.model, keep=r.keep, steps=r.steps, allocation="erk"),
    "global-mp": lambda r: global_mp(r.model, keep=r.keep, steps=r.steps),
    "iss-p": lambda r: iss_p(r.model, keep=r.keep, steps=r.steps),
    "rigl": lambda r: rigl_training(r.model, keep=r.keep, steps=r.steps),
    "dsl": lambda r: dynamic_sparse_learning(r.model, keep=r.keep, steps=r.steps, embeddings=False, head=False),
    "wgsef": lambda r: group_envelope(r.model, keep=r.keep, steps=r.steps),
    "fixed at the start, erk": lambda r: gradual_magnitude(
        r.model, keep=r.keep, steps=r.steps, allocation="erk", curve="one-shot"
    ),
    "sparse-soups (150 % of the steps)": _Soup,
}
"""Methods that remove single weights; the first two are the baselines. A new one is one line."""
NEURONS: dict[str, Callable[[Run], Engine]] = {
    "gradual-magnitude, neurons": lambda r: Schedule(
        r.model, selector="magnitude", keep=r.keep, steps=r.steps, groups=r.groups
    ),
    "hesso": lambda r: hesso_training(r.model, keep=r.keep, steps=r.steps, groups=r.groups),
    "hesso-cric (steps more)": _with_cric,
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

    name, unit, steps, rate = "digits", "accuracy", 250, 3e-3

    @classmethod
    def settings(cls) -> dict[str, Any]:
        return {"steps": cls.steps, "rate": cls.rate, "widths": [64, 128, 128, 10]}

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
    """The next byte of source code, by a small Llama."""

    name, unit, steps, rate = "llama", "nats per byte", 150, 3e-3
    width, hidden, layers, batch, context = 64, 192, 1, 8, 48

    @classmethod
    def settings(cls) -> dict[str, Any]:
        names = ("steps", "rate", "width", "hidden", "layers", "batch", "context")
        return {name: getattr(cls, name) for name in names}

    def __init__(self) -> None:
        parts = [
            read_texts("stdlib:source", part=part).joined.encode()[:2_000_000] for part in ("calibration", "evaluation")
        ]
        self.train, self.test = (torch.frombuffer(bytearray(p), dtype=torch.uint8).long() for p in parts)
        starts = torch.randint(len(self.test) - self.context - 1, (64,), generator=torch.Generator().manual_seed(0))
        self.held = torch.stack([self.test[s : s + self.context + 1] for s in starts.tolist()])

    def model(self) -> nn.Module:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=self.width,
                intermediate_size=self.hidden,
                num_hidden_layers=self.layers,
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
            starts = torch.randint(len(self.train) - self.context - 1, (self.batch,), generator=draw)
            return self._loss(model, torch.stack([self.train[s : s + self.context + 1] for s in starts.tolist()]))

        return loss

    def score(self, model: nn.Module) -> float:
        return float(self._loss(model, self.held))


def trained(task: Any, make: Callable[[Run], Engine] | None, keep: float, seed: int) -> tuple[float, float, int, float]:
    """Score, density of what is pruned, weights that leaked, seconds of the thread."""
    torch.manual_seed(seed)
    begin = time.thread_time()
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate)
    run = Run(model, optimizer, task.batches(model, seed), task.groups(model), keep, task.steps, task.rate)
    engine = make(run) if make else None
    if engine is not None:
        engine.attach(optimizer)
    train(run)
    if engine is not None:
        engine.finish()
    masks = getattr(engine, "masks", MaskSet({}))
    with torch.no_grad():
        score = task.score(model.eval())
    return score, masks.density(), sum(masks.leaks(model).values()), time.thread_time() - begin


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


TABLES = ((WEIGHTS, KEEPS, 2), (NEURONS, KEEPS, 1), (PATTERNS, PATTERN_KEEPS, 1))
"""Methods, shares, and how many of the first methods are baselines."""


def compared(result: dict[str, Any]) -> None:
    """Writes into every row how it stands to its baselines."""
    rows = {(r["task"], r["removed"], r["method"]): r for r in result["rows"]}
    for (task, removed, method), row in rows.items():
        table, _, n = next(t for t in TABLES if method in t[0])
        row["against"] = {}
        for base in list(table)[:n]:
            if base == method or (task, removed, base) not in rows:
                continue
            sign = 1 if row["unit"] == "accuracy" else -1
            gains = [sign * (a - b) for a, b in zip(row["scores"], rows[task, removed, base]["scores"], strict=True)]
            row["against"][base] = {
                "gain": fmean(gains),
                "seeds_better": sum(g > 0 for g in gains),
                "verdict": "held" if fmean(gains) > 0 else "failed",
            }


def write(result: dict[str, Any]) -> None:
    compared(result)
    part = RESULT.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(RESULT)


def show(row: dict[str, Any]) -> None:
    against = "   ".join(
        f"{a['gain']:+.4f} {a['verdict']:<6} {a['seeds_better']}/{len(SEEDS)}" for a in row["against"].values()
    )
    print(
        f"  {row['removed']:.1%}  {row['method']:<34}{row['mean']:.4f} ± {row['half_range']:.4f}  {against:<44}"
        f"{row['density']:.2%} kept, {row['leaks']} leaks, {row['seconds']:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", default="")
    parser.add_argument("--tasks", default="digits,llama")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {m for m in chosen.methods.split(",") if m}
    settings = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seeds": list(SEEDS),
        "tasks": {task.name: task.settings() for task in (Digits, Bytes)},
    }
    result: dict[str, Any] = {"settings": settings, "complete": False, "leaks": {}, "dense": {}, "rows": []}
    if RESULT.exists():
        before = json.loads(RESULT.read_text())
        if before.get("settings") == settings and (wanted or not before["complete"]):
            result = {**before, "complete": False}
            result["rows"] = [r for r in before["rows"] if r["method"] not in wanted]

    print("leaks after 1,000 steps".ljust(28) + "held by the hook   gradients masked only")
    for name in OPTIMIZERS:
        if name not in result["leaks"]:
            result["leaks"][name] = {"hook": leaks(name, True), "gradients": leaks(name, False)}
            write(result)
        found = result["leaks"][name]
        print(f"  {name:<26}{found['hook']:>12}{found['gradients']:>20}", flush=True)

    done = {(r["task"], r["removed"], r["method"]): r for r in result["rows"]}
    for task in (make() for make in (Digits, Bytes) if make.name in chosen.tasks.split(",")):
        if task.name not in result["dense"]:
            result["dense"][task.name] = [trained(task, None, 1.0, seed)[0] for seed in SEEDS]
        print(f"\n{task.name} ({task.unit}), {task.steps} steps; dense {fmean(result['dense'][task.name]):.4f}")
        for table, keeps, _ in TABLES:
            for keep in keeps:
                for name, make in table.items():
                    if (task.name, 1 - keep, name) not in done:
                        runs = [trained(task, make, keep, seed) for seed in SEEDS]
                        scores = [run[0] for run in runs]
                        row = {
                            "task": task.name,
                            "unit": task.unit,
                            "removed": 1 - keep,
                            "method": name,
                            "scores": scores,
                            "mean": fmean(scores),
                            "half_range": (max(scores) - min(scores)) / 2,
                            "density": runs[0][1],
                            "leaks": sum(run[2] for run in runs),
                            "seconds": fmean(run[3] for run in runs),
                        }
                        result["rows"].append(row)
                        done[task.name, 1 - keep, name] = row
                        write(result)
                    show(done[task.name, 1 - keep, name])
    expected = sum(len(table) * len(keeps) for table, keeps, _ in TABLES) * 2
    result["complete"] = len(result["rows"]) == expected
    write(result)
    for task in ("digits", "llama"):
        verdicts = [a["verdict"] for r in result["rows"] if r["task"] == task for a in r["against"].values()]
        print(f"{task}: {verdicts.count('held')} comparisons held, {verdicts.count('failed')} failed")


if __name__ == "__main__":
    main()
