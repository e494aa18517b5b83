"""Loss against bytes of state: a small Llama on bytes of ``stdlib:source``, over seeds and learning rates.

    python benchmarks/optim_learning.py [--workers 2] [--seeds 0 1 2]

A Llama of 2 layers and width 128, embedding and head tied; 4 × 128 bytes a step, the learning rate warmed up over 20
steps and then linear to zero. Each optimizer at three learning rates, and at one more on that side as long as the best
is at an edge of its grid (twice at most). Then at its best rate with as many steps as fit into AdamW's CPU time. Losses
are those of the held-out part (64 windows), in nats per byte, means over the seeds; the rate is the one with the least
mean. It is chosen on what is shown, alike for all. Bytes are those of the whole state at its largest, embedding and
norms included, per parameter of the dense model. SST's weights are U, S and V, 1.8 times as many numbers as the dense
ones here, which are not counted.
Each run is one process with one thread; times are CPU times of forward, backward and step, measured beside each other.

torch.optim.Muon has no row: its bfloat16 products take seconds a step on a CPU without them; the rule is the same. The
peer's GaLore is pytorch_optimizer's (``pip install --no-deps pytorch_optimizer``); without it its row is left out,
and that is printed. Results go to benchmarks/results/optim_learning.json run by run; what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eckart import optim
from eckart.data import read_texts
from eckart.training import SparseSpectralTraining

RESULTS = Path(__file__).parent / "results" / "optim_learning.json"
STEPS, BATCH, WINDOW, WARMUP = 200, 4, 128, 20
RANK = 0.25
SETTINGS = {"steps": STEPS, "batch": BATCH, "window": WINDOW, "rank": RANK, "layers": 2, "width": 128}
FACTOR = 3.0
"""Between neighbours of a grid of learning rates."""


def texts() -> tuple[Tensor, Tensor]:
    parts = (
        read_texts("stdlib:source", part=part).joined.encode()[:4_000_000] for part in ("calibration", "evaluation")
    )
    train, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    starts = torch.randint(0, len(held_out) - WINDOW, (64,), generator=torch.Generator().manual_seed(1234))
    return train, torch.stack([held_out[s : s + WINDOW] for s in starts]).long()


def llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
        )
    )


Made = tuple[torch.optim.Optimizer, Callable[[], None]]
"""An optimizer, and what is to be called after its step."""


def plain(make: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Module, float], Made]:
    return lambda model, lr: (make(optim.param_groups(model, weight_decay=0.0), lr=lr), lambda: None)


VECTOR_RATE = 3e-3
"""Of embedding, head and norms where matrices follow another rule; the best of AdamW's grid."""


def muon_like(make: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Module, float], Made]:
    """Rules with updates of a size of their own: the rest keeps the learning rate of AdamW."""
    return lambda model, lr: (
        make(optim.param_groups(model, weight_decay=0.0), lr=lr, vector_scale=VECTOR_RATE / lr),
        lambda: None,
    )


def spectral(model: nn.Module, lr: float) -> Made:
    engine = SparseSpectralTraining(model, rank=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    engine.attach(optimizer)
    return optimizer, lambda: None


def optimizers() -> dict[str, tuple[Callable[[nn.Module, float], Made], tuple[float, float, float]]]:
    """Name → (how it is made, learning rates)."""

    def subspace(**options: Any) -> Callable[[nn.Module, float], Made]:
        return plain(lambda params, lr: optim.Subspace(params, lr, rule="adam", rank=RANK, **options))

    adam, low, wide = (1e-3, 3e-3, 9e-3), (3e-3, 9e-3, 2.7e-2), (1e-2, 3e-2, 9e-2)
    found: dict[str, tuple[Callable[[nn.Module, float], Made], tuple[float, float, float]]] = {
        "AdamW (torch, fused)": (plain(lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0, fused=True)), adam),
        "Muon": (muon_like(lambda p, lr, **o: optim.Muon(p, lr=lr, **o)), wide),
        "Muon, int8 state": (muon_like(lambda p, lr, **o: optim.Muon(p, lr=lr, state_dtype="int8", **o)), wide),
        "GaLore": (plain(lambda p, lr: optim.GaLore(p, lr=lr, rank=RANK, every=50, scale=1.0)), low),
        "DCT-AdamW": (plain(lambda p, lr: optim.DCTAdamW(p, lr=lr, rank=RANK, feedback=None)), low),
        "DCT-AdamW, int8 feedback": (plain(lambda p, lr: optim.DCTAdamW(p, lr=lr, rank=RANK, feedback="int8")), low),
        "rows": (subspace(subspace="rows"), low),
        "rows, int8 feedback": (subspace(subspace="rows", feedback="int8"), low),
        "power": (subspace(subspace="power"), low),
        "AuON": (muon_like(lambda p, lr, **o: optim.AuON(p, lr=lr, **o)), (0.1, 0.3, 0.9)),
        "SST": (spectral, adam),
    }
    try:
        from pytorch_optimizer import GaLore as Peer
    except ImportError:
        print("pytorch_optimizer is not there: no row of the peer's GaLore")
    else:

        def peer(model: nn.Module, lr: float) -> Made:
            groups = optim.param_groups(model, weight_decay=0.0)
            low_rank = {"rank": 32, "update_proj_gap": 50, "scale": 1.0, "projection_type": "std"}
            made = [{"params": g["params"], "weight_decay": 0.0, **(low_rank if g["matrix"] else {})} for g in groups]
            return Peer(made, lr=lr), lambda: None

        found["GaLore (pytorch_optimizer)"] = (peer, low)
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(bytes_of(value) for state in optimizer.state.values() for value in state.values())


def bytes_of(value: Any) -> int:
    """Of tensors, also those that a peer hides in an object."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(bytes_of, value))
    return sum(map(bytes_of, vars(value).values())) if hasattr(value, "__dict__") else 0


def run(task: tuple[str, float, int, int]) -> dict[str, Any]:
    """One training: held-out loss, CPU seconds, bytes of state."""
    name, lr, seed, steps = task
    torch.set_num_threads(1)
    train, held_out = texts()
    model = llama(seed)
    optimizer, after = optimizers()[name][0](model, lr)
    peaks = [group["lr"] for group in optimizer.param_groups]
    draw = torch.Generator().manual_seed(seed)
    seconds = stepping = 0.0
    most = 0
    for step in range(steps):
        starts = torch.randint(0, len(train) - WINDOW, (BATCH,), generator=draw)
        batch = torch.stack([train[s : s + WINDOW] for s in starts]).long()
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        began = time.thread_time()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        middle = time.thread_time()
        optimizer.step()
        after()
        optimizer.zero_grad()
        ended = time.thread_time()
        most = max(most, state_bytes(optimizer))  # SST drops state when it picks other directions
        seconds, stepping = seconds + ended - began, stepping + ended - middle
        if not bool(torch.isfinite(loss)):
            break
    with torch.no_grad():
        final = float(model(input_ids=held_out, labels=held_out).loss)
    return {
        "loss": final if final == final else float("inf"),
        "seconds": seconds,
        "step_seconds": stepping,
        "bytes": most,
        "parameters": sum(p.numel() for p in llama(seed).parameters()),
    }


def key(task: tuple[str, float, int, int]) -> str:
    name, lr, seed, steps = task
    return f"{name} | {lr:.3g} | {seed} | {steps}"


class Runs:
    """What has been run, in a file."""

    def __init__(self, workers: int) -> None:
        old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if old and old["settings"] != SETTINGS:
            raise SystemExit(f"{RESULTS} holds results of other settings; move it away first")
        self.runs: dict[str, dict[str, Any]] = old.get("runs", {})
        self.workers = workers

    def need(self, tasks: list[tuple[str, float, int, int]]) -> None:
        missing = [task for task in tasks if key(task) not in self.runs]
        if not missing:
            return
        with multiprocessing.get_context("spawn").Pool(self.workers) as pool:
            for task, found in zip(missing, pool.imap(run, missing), strict=True):
                self.runs[key(task)] = found
                print(f"{key(task)}: {found['loss']:.3f} nats, {found['seconds']:.1f} s", flush=True)
                self.write({})

    def write(self, summary: dict[str, Any]) -> None:
        plainly = {k: {**v, "loss": min(v["loss"], 99.0)} for k, v in self.runs.items()}
        RESULTS.parent.mkdir(exist_ok=True)
        text = json.dumps({"settings": SETTINGS, "rows": summary, "runs": plainly}, indent=1, allow_nan=False)
        RESULTS.write_text(text + "\n", "utf-8")

    def mean(self, name: str, lr: float, seeds: list[int], steps: int, what: str = "loss") -> float:
        return statistics.fmean(min(self.runs[key((name, lr, seed, steps))][what], 99.0) for seed in seeds)


def best_rate(runs: Runs, name: str, grid: list[float], seeds: list[int]) -> tuple[float, bool]:
    """The rate with the least mean loss, and whether it is inside of the grid."""
    for _ in range(3):
        runs.need([(name, lr, seed, STEPS) for lr in grid for seed in seeds])
        best = min(grid, key=lambda lr: runs.mean(name, lr, seeds, STEPS))
        if min(grid) < best < max(grid):
            return best, True
        if len(grid) == 5:
            break
        grid = sorted([*grid, best / FACTOR if best == min(grid) else best * FACTOR])
    return best, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=None, help="names of optimizers; AdamW is always run")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    seeds, runs = arguments.seeds, Runs(arguments.workers)
    table = optimizers()
    adamw = next(iter(table))
    names = [name for name in table if arguments.only is None or name == adamw or name in arguments.only]
    summary: dict[str, Any] = {}
    for name in names:
        lr, inside = best_rate(runs, name, list(table[name][1]), seeds)
        losses = [runs.runs[key((name, lr, seed, STEPS))]["loss"] for seed in seeds]
        seconds = runs.mean(name, lr, seeds, STEPS, "seconds")
        unit = summary[adamw] if summary else {"seconds": seconds, "bytes": 1, "losses": losses}
        steps = min(STEPS, max(1, int(STEPS * unit["seconds"] / seconds)))
        runs.need([(name, lr, seed, steps) for seed in seeds])
        less = [a - b for a, b in zip(losses, unit["losses"], strict=True)]
        some = runs.runs[key((name, lr, seeds[0], STEPS))]
        summary[name] = {
            "lr": lr,
            "inside": inside,
            "loss": statistics.fmean(losses),
            "losses": losses,
            "less_adamw": less,
            "equal_time": runs.mean(name, lr, seeds, steps),
            "equal_time_steps": steps,
            "bytes": some["bytes"],
            "bytes_a_parameter": some["bytes"] / some["parameters"],
            "seconds": seconds,
            "step_ms": 1e3 * runs.mean(name, lr, seeds, STEPS, "step_seconds") / STEPS,
        }
        runs.write(summary)
    show(summary, adamw)


def show(summary: dict[str, Any], adamw: str) -> None:
    unit = summary[adamw]
    heads = ("lr", "loss", "less AdamW (range)", "equal time", "B/param", "of AdamW")
    print(f"{'optimizer':36} {heads[0]:>8} {heads[1]:>6} {heads[2]:>24} {heads[3]:>10} {heads[4]:>8} {heads[5]:>9}")
    for name, row in summary.items():
        edge = "" if row["inside"] else "*"
        gaps = row["less_adamw"]
        less = f"{statistics.fmean(gaps):+.3f} ({min(gaps):+.3f} to {max(gaps):+.3f})"
        share = row["bytes"] / unit["bytes"]
        print(
            f"{name:36} {row['lr']:>7.3g}{edge:1} {row['loss']:6.3f} {less:>24} {row['equal_time']:10.3f} "
            f"{row['bytes_a_parameter']:8.2f} {share:9.2f}"
        )
    print("* best at the edge of its grid")
    # "A quarter" with a hundredth to spare for counters and scales of blocks.
    small = {n: r for n, r in summary.items() if r["bytes"] <= 0.26 * unit["bytes"]}
    winners = [n for n, r in small.items() if r["loss"] <= unit["loss"]]
    print(f"at most a quarter of AdamW's state: {', '.join(small) or 'none'}")
    print(f"of these reach AdamW's loss: {', '.join(winners) or 'none'}")


if __name__ == "__main__":
    main()
