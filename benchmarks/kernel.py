"""CPU time of the shared kernel against its own products, and against Cholesky + inverse + SVD.

    python benchmarks/kernel.py

One thread, float64. In each round the three run one after the other; the least CPU time of the rounds counts.
Writes benchmarks/results/kernel.json.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eckart.linalg import weighted_factors

OUT, IN = 512, 1376
ROUNDS = 9
TARGETS = {"own_work": 1.3, "speedup": 4.0, "difference": 1e-12}


def problem(seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of 4 · in tokens with correlated features of unequal scale."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(OUT, IN, dtype=torch.float64, generator=generator)
    mixing = torch.randn(IN, IN, dtype=torch.float64, generator=generator) / IN**0.5
    mixing = mixing + torch.eye(IN, dtype=torch.float64)
    X = torch.randn(4 * IN, IN, dtype=torch.float64, generator=generator) @ mixing
    X = X * torch.logspace(-1, 1, IN, dtype=torch.float64)
    return W, X.T @ X / X.shape[0]


def kernel(W: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    found = weighted_factors(W, S)
    return found.left, found.right


def own_work(W: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The products of the kernel and one eigh of the smaller side, and nothing else."""
    _, U = torch.linalg.eigh(W @ S @ W.T)
    return U, U.T @ W


def whitening(W: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Truncation-aware whitening: W L = U D Vᵀ with S = L Lᵀ, factors U D and Vᵀ L⁻¹."""
    L = torch.linalg.cholesky(S)
    inverse = torch.linalg.inv(L)
    U, D, Vh = torch.linalg.svd(W @ L, full_matrices=False)
    return U * D, Vh @ inverse


def seconds(run: Callable[[Tensor, Tensor], object], W: Tensor, S: Tensor) -> float:
    start = time.process_time()
    run(W, S)
    return time.process_time() - start


def difference(W: Tensor, S: Tensor) -> float:
    """Largest ‖Ŵ − Ŵ′‖_F / ‖W‖_F over eight ranks from 1 to full."""
    left, right = kernel(W, S)
    other_left, other_right = whitening(W, S)
    ranks = torch.linspace(1, min(W.shape), 8).long().tolist()
    return max(float((left[:, :k] @ right[:k] - other_left[:, :k] @ other_right[:k]).norm() / W.norm()) for k in ranks)


def main() -> None:
    torch.set_num_threads(1)
    W, S = problem(seed=0)
    ways = {"kernel": kernel, "own_work": own_work, "whitening": whitening}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, run in ways.items():
            times[name].append(seconds(run, W, S))
    best = {name: min(taken) for name, taken in times.items()}
    result = {
        "shape": [OUT, IN],
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_seconds": best,
        "cpu_seconds_median": {name: sorted(taken)[ROUNDS // 2] for name, taken in times.items()},
        "own_work": best["kernel"] / best["own_work"],
        "speedup": best["whitening"] / best["kernel"],
        "difference": difference(W, S),
        "targets": TARGETS,
    }
    print(f"W {OUT} × {IN}, Σ full, float64, one thread, best of {ROUNDS} (CPU seconds)")
    for name, taken in best.items():
        print(f"  {name:<10} {taken:8.4f}")
    print(f"kernel / own products and eigh   {result['own_work']:8.2f}  (at most {TARGETS['own_work']})")
    print(f"whitening / kernel               {result['speedup']:8.2f}  (at least {TARGETS['speedup']})")
    print(f"largest relative difference      {result['difference']:8.1e}  (at most {TARGETS['difference']})")
    target = Path(__file__).parent / "results" / "kernel.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
