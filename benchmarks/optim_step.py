"""CPU time, worst step and bytes of state of optimizers, in units of torch's fused AdamW.

    python benchmarks/optim_step.py [seconds]

One matrix of 1024 × 4096 (and one of 512 × 512 for the overhead), float32, one thread, thread CPU time. Every round
takes one step of fused AdamW and one of each other optimizer in turn, so that all see the same machine; the least
time of the rounds counts (the first step of what takes over 5 s), which is one without a refresh where not every step
has one. Then each of the rest runs 400 steps, or as many as fit its budget of seconds, twice; the lesser of the two
times of a step counts, and the worst of them is set against their median: what a refresh costs shows there. Before
every step 64 MB of other memory are written, as a backward pass would: the state of a small subspace fits into a
processor's cache, where no training finds it. State is what ``state_dict`` holds, in bytes per parameter.

Peers: torch's AdamW and Muon, and GaLore, Fira, APOLLO, AdamP and Muon of pytorch_optimizer where it is installed
(``pip install --no-deps pytorch_optimizer``). Newton-Schulz is compared at 1 : 4 with torch's own iteration, as it
is (bfloat16) and with its type changed to float32, and all against float64. Writes benchmarks/results/optim_step.json.
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, _zeropower_via_newtonschulz

from eckart import optim
from eckart.linalg import newton_schulz

SHAPES = {"1024x4096": ((1024, 4096), 128), "512x512": ((512, 512), 64)}
ROUNDS = 7
QUICK_ROUNDS = 40
"""Of those whose step takes less than QUICK seconds."""
QUICK = 0.2
LONG = 400
BUDGET = 20.0
"""CPU seconds for each long run of one optimizer, by default; at least LEAST steps are taken."""
LEAST = 3
BARS = {"rows": 1.6, "power": 8.0, "dct": 12.0, "worst": 3.0, "muon": 1.4, "adamw": 1.1}

HALVES = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether this CPU has products of bfloat16, which Muon of torch and of pytorch_optimizer compute with."""

Make = Callable[[list[Tensor], int], torch.optim.Optimizer]


def ours() -> dict[str, Make]:
    return {
        "eckart AdamW": lambda p, r: optim.Subspace(p, lr=1e-3, rule="adam", subspace=None),
        "eckart rows": lambda p, r: optim.Subspace(p, lr=1e-3, rule="adam", subspace="rows", rank=r),
        "eckart power": lambda p, r: optim.Subspace(p, lr=1e-3, rule="adam", subspace="power", rank=r),
        "eckart DCT": lambda p, r: optim.Subspace(p, lr=1e-3, rule="adam", subspace="dct", rank=r),
        "eckart DCT, int8 feedback": lambda p, r: optim.Subspace(
            p, lr=1e-3, rule="adam", subspace="dct", rank=r, feedback="int8"
        ),
        "eckart GaLore": lambda p, r: optim.GaLore(p, lr=1e-3, rank=r),
        "eckart DCTAdamW": lambda p, r: optim.DCTAdamW(p, lr=1e-3, rank=r),
        "eckart Fira": lambda p, r: optim.Fira(p, lr=1e-3, rank=r),
        "eckart Apollo": lambda p, r: optim.Apollo(p, lr=1e-3, rank=r),
        "eckart Frugal": lambda p, r: optim.Frugal(p, lr=1e-3, rank=r),
        "eckart Trion": lambda p, r: optim.Trion(p, lr=1e-3, rank=r),
        "eckart Dion": lambda p, r: optim.Dion(p, lr=1e-3, rank=r),
        "eckart Muon": lambda p, r: optim.Muon(p, lr=1e-3),
        "eckart AuON": lambda p, r: optim.AuON(p, lr=1e-3),
        "eckart AdamP": lambda p, r: optim.AdamP(p, lr=1e-3),
        "eckart DiffGrad": lambda p, r: optim.DiffGrad(p, lr=1e-3),
    }


def peers() -> dict[str, Make]:
    found: dict[str, Make] = {"torch AdamW": lambda p, r: torch.optim.AdamW(p, lr=1e-3)}
    if HALVES:
        found["torch Muon"] = lambda p, r: torch.optim.Muon(p, lr=1e-3)
    try:
        other: Any = importlib.import_module("pytorch_optimizer")
    except ImportError:
        print("pytorch_optimizer is not installed: its GaLore, Fira, APOLLO, AdamP and Muon are left out")
        return found

    def low_rank(p: list[Tensor], r: int, kind: str) -> list[dict[str, Any]]:
        return [{"params": p, "rank": r, "update_proj_gap": 200, "scale": 0.25, "projection_type": kind}]

    found["kozistr GaLore"] = lambda p, r: other.GaLore(low_rank(p, r, "std"), lr=1e-3)
    found["kozistr Fira"] = lambda p, r: other.Fira(low_rank(p, r, "std"), lr=1e-3)
    found["kozistr APOLLO"] = lambda p, r: other.APOLLO(low_rank(p, r, "random"), lr=1e-3, scale_type="channel")
    found["kozistr AdamP"] = lambda p, r: other.AdamP(p, lr=1e-3)
    if HALVES:
        found["kozistr Muon"] = lambda p, r: other.Muon([{"params": p, "use_muon": True}], lr=1e-3)
    return found


def parameter(shape: tuple[int, int]) -> Tensor:
    """With a gradient whose spectrum falls, as those of networks do."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator))
    left, right = torch.randn(shape[0], 64, generator=generator), torch.randn(64, shape[1], generator=generator)
    weight.grad = 1e-3 * (left @ right + torch.randn(shape, generator=generator))
    return weight


def timed(optimizer: torch.optim.Optimizer) -> float:
    begin = time.thread_time()
    optimizer.step()
    return time.thread_time() - begin


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(size(v) for v in value.values())
        if isinstance(value, (list, tuple)):
            return sum(size(v) for v in value)
        held = getattr(value, "__dict__", None)  # projectors of pytorch_optimizer
        return size(held) if held else 0

    return sum(size(dict(state)) for state in optimizer.state.values())


def interleaved(shape: tuple[int, int], rank: int, ways: dict[str, Make]) -> dict[str, dict[str, float]]:
    made = {"torch AdamW fused": torch.optim.AdamW([parameter(shape)], lr=1e-3, fused=True)}
    made |= {name: make([parameter(shape)], rank) for name, make in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    first = {name: timed(optimizer) for name, optimizer in made.items()}
    rounds = {name: (QUICK_ROUNDS if taken < QUICK else ROUNDS) if taken < 5 else 0 for name, taken in first.items()}
    for name, taken in first.items():
        times[name] = [taken] if taken >= 5 else []
    for done in range(QUICK_ROUNDS):
        for name, optimizer in made.items():
            if done < rounds[name]:
                times[name].append(timed(optimizer))
    unit = min(times["torch AdamW fused"])
    return {
        name: {
            "ms": 1e3 * min(taken),
            "ratio": min(taken) / unit,
            "first_ratio": first[name] / unit,
            "state_bytes_per_parameter": state_bytes(made[name]) / (shape[0] * shape[1]),
        }
        for name, taken in times.items()
    }


def long_run(shape: tuple[int, int], rank: int, make: Make, seconds: float) -> dict[str, float]:
    """Worst and median step, the first one included."""
    runs, other = [], torch.zeros(2**24)
    for _ in range(2):
        optimizer, taken = make([parameter(shape)], rank), []
        while len(taken) < LONG and (len(taken) < LEAST or sum(taken) < seconds):
            other.add_(1)
            taken.append(timed(optimizer))
        runs.append(taken)
    lesser = [min(pair) for pair in zip(*runs, strict=False)]
    middle = statistics.median(lesser)
    return {"steps": float(len(lesser)), "median_ms": 1e3 * middle, "worst_over_median": max(lesser) / middle}


def newton_schulz_at(shape: tuple[int, int]) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(shape, generator=generator)
    U, _, Vh = torch.linalg.svd(torch.randn(256, 1024, generator=generator), full_matrices=False)
    small = (U / torch.arange(1, 257)) @ Vh
    coefficients = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
    exact = newton_schulz(small.double(), gram=False)

    def plain_float32(X: Tensor) -> Tensor:
        Y = X / X.norm()
        for _ in range(5):
            R = Y @ Y.T
            Y = torch.addmm(Y, torch.addmm(R, R, R, beta=DEFAULT_B, alpha=DEFAULT_C), Y, beta=DEFAULT_A)
        return Y

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "torch, bfloat16": lambda X: _zeropower_via_newtonschulz(X, coefficients, 5, 1e-7),
        "torch's iteration, float32": plain_float32,
        "eckart Gram, float32": lambda X: newton_schulz(X, gram=True),
        "eckart Gram, bfloat16": lambda X: newton_schulz(X, gram=True, dtype=torch.bfloat16),
    }
    found: dict[str, float] = {}
    for name, way in ways.items():
        found[f"{name}: error"] = float((way(small).double() - exact).norm() / exact.norm())
    if not HALVES:
        del ways["torch, bfloat16"]  # about a minute a step
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            if times[name] and times[name][0] > 2:
                continue
            begin = time.thread_time()
            way(X)
            times[name].append(time.thread_time() - begin)
    for name, taken in times.items():
        found[f"{name}: ms"] = 1e3 * min(taken)
    return found


def bars(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each figure to reach: what was wanted, what came, whether it holds."""
    steps, long = result["shapes"]["1024x4096"], result["long"]
    ns = result["newton_schulz"]
    worst = {name: run["worst_over_median"] for name, run in long.items() if name in RISING}
    error = ns["eckart Gram, float32: error"], ns["torch, bfloat16: error"], ns["torch's iteration, float32: error"]
    adamw = 8.0
    rows = {
        "AdamW over torch fused": (steps["eckart AdamW"]["ratio"], BARS["adamw"], "at most"),
        "rows over AdamW": (steps["eckart rows"]["ratio"], BARS["rows"], "at most"),
        "power over AdamW": (steps["eckart power"]["ratio"], BARS["power"], "at most"),
        "DCT over AdamW": (steps["eckart DCT"]["ratio"], BARS["dct"], "at most"),
        "worst over median step, the worst of ours": (max(worst.values()), BARS["worst"], "at most"),
        "Newton-Schulz: torch's iteration in float32 over Gram form": (
            ns["torch's iteration, float32: ms"] / ns["eckart Gram, float32: ms"],
            BARS["muon"],
            "at least",
        ),
        "Newton-Schulz: error of ours over torch's own": (error[0] / error[1], 1.0, "at most"),
        "state, DCT rank 1/4 with int8 feedback, share of AdamW's": (
            result["state_at_a_quarter"]["DCT, int8 feedback"] / adamw,
            0.5,
            "at most",
        ),
        "state, DCT rank 1/4, share of AdamW's": (result["state_at_a_quarter"]["DCT"] / adamw, 1 / 3, "at most"),
    }
    if "torch Muon" in steps:
        rows["Muon: torch over ours"] = (
            steps["torch Muon"]["ms"] / steps["eckart Muon"]["ms"],
            BARS["muon"],
            "at least",
        )
    return {
        name: {
            "found": found,
            "wanted": f"{kind} {bar:.3g}",
            "holds": found <= bar if kind == "at most" else found >= bar,
        }
        for name, (found, bar, kind) in rows.items()
    }


RISING = ("eckart rows", "eckart power", "eckart DCT", "eckart DCT, int8 feedback")
"""Those that the bar on the worst step is about."""
LONG_RUN = (*RISING, "eckart GaLore", "kozistr GaLore", "kozistr Fira")


def main() -> None:
    torch.set_num_threads(1)
    ways = ours() | peers()
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_products": HALVES,
        "rounds": [ROUNDS, QUICK_ROUNDS],
        "shapes": {},
    }
    if not result["bfloat16_products"]:
        print(
            "this CPU has no products of bfloat16: torch's and pytorch_optimizer's Muon fall back to plain loops here"
        )
    for label, (shape, rank) in SHAPES.items():
        steps = interleaved(shape, rank, ways)
        result["shapes"][label] = steps
        print(f"\n{label}, rank {rank}, float32, one thread, best of {ROUNDS} to {QUICK_ROUNDS} (thread CPU)")
        print(f"{'':<28}{'ms':>9}{'x AdamW':>9}{'first':>9}{'B/param':>9}")
        for name, row in steps.items():
            print(
                f"{name:<28}{row['ms']:9.2f}{row['ratio']:9.2f}{row['first_ratio']:9.1f}"
                f"{row['state_bytes_per_parameter']:9.2f}"
            )
    shape, rank = SHAPES["1024x4096"]
    quick = {name: make for name, make in ways.items() if result["shapes"]["1024x4096"][name]["ms"] < 5000}
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else BUDGET
    result["long_run_seconds"] = seconds
    long = {name: long_run(shape, rank, make, seconds) for name, make in quick.items() if name in LONG_RUN}
    result["long"] = long
    print(f"\nsteps in a row at {shape[0]} x {shape[1]}")
    print(f"{'':<28}{'steps':>7}{'median ms':>11}{'worst/median':>14}")
    for name, run in long.items():
        print(f"{name:<28}{run['steps']:7.0f}{run['median_ms']:11.2f}{run['worst_over_median']:14.1f}")
    quarter = shape[0] // 4
    made = ours()
    result["state_at_a_quarter"] = {}
    for name in ("rows", "power", "DCT", "DCT, int8 feedback"):
        optimizer = made[f"eckart {name}"]([parameter(shape)], quarter)
        optimizer.step()
        result["state_at_a_quarter"][name] = state_bytes(optimizer) / (shape[0] * shape[1])
    print("\nstate at rank 1/4, bytes per parameter: " + json.dumps(result["state_at_a_quarter"]))
    result["newton_schulz"] = newton_schulz_at(shape)
    print(f"\nNewton-Schulz, 5 steps at {shape[0]} x {shape[1]}; error on a spectrum of 1/i at 256 x 1024")
    for name, value in result["newton_schulz"].items():
        print(f"  {name:<36}{value:12.3g}")
    result["bars"] = bars(result)
    print("\nfigures to reach")
    for name, bar in result["bars"].items():
        print(f"  {'holds' if bar['holds'] else 'FAILS':<6}{name:<62}{bar['found']:9.3g}  ({bar['wanted']})")
    target = Path(__file__).parent / "results" / "optim_step.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
