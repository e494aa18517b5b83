"""CPU time of FedSVD's server step, against the SVD of the dense product.

    python benchmarks/fedsvd.py

One thread. B (1024 × 8) and A (8 × 1024) in float32, as clients send them. The dense way forms B A and decomposes it,
as the paper's released code does; ours decomposes an 8 × 8 matrix between two thin QR, in float64. They take turns; the
least CPU time of the rounds counts, ours over many calls. Writes benchmarks/results/fedsvd.json.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eckart.adaptation.fedsvd import reorthogonalised

SIDE, RANK = 1024, 8
ROUNDS, CALLS = 5, 200
TARGETS = {"speedup": 100.0, "error": 1e-6}


def dense(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    return U[:, :RANK] * S[:RANK], Vh[:RANK]


def seconds(run: Callable[[Tensor, Tensor], object], B: Tensor, A: Tensor, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run(B, A)
    return (time.process_time() - start) / calls


def error(run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], B: Tensor, A: Tensor) -> float:
    """‖B' A' − B A‖ / ‖B A‖, and the distance of A' from orthonormal rows, the larger of the two."""
    new_B, new_A = run(B, A)
    product = B.double() @ A.double()
    off = float((new_B.double() @ new_A.double() - product).norm() / product.norm())
    gram = new_A.double() @ new_A.double().T
    return max(off, float((gram - torch.eye(RANK, dtype=torch.float64)).abs().max()))


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(SIDE, RANK, generator=generator)
    A = torch.randn(RANK, SIDE, generator=generator) / SIDE**0.5
    reorthogonalised(B, A)
    times: dict[str, list[float]] = {"dense": [], "ours": []}
    for _ in range(ROUNDS):
        times["dense"].append(seconds(dense, B, A, 1))
        times["ours"].append(seconds(reorthogonalised, B, A, CALLS))
    best = {name: min(taken) for name, taken in times.items()}
    errors = {"dense": error(dense, B, A), "ours": error(reorthogonalised, B, A)}
    result = {
        "shape": [SIDE, SIDE],
        "rank": RANK,
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_seconds": best,
        "cpu_seconds_all": times,
        "speedup": best["dense"] / best["ours"],
        "error": errors,
        "targets": TARGETS,
    }
    print(f"server step of FedSVD, {SIDE} × {SIDE}, rank {RANK}, one thread, best of {ROUNDS}")
    for name, taken in best.items():
        print(f"  {name:<6} {1e3 * taken:9.3f} ms of CPU   error {errors[name]:.1e}")
    print(f"dense / ours  {result['speedup']:8.0f}  (at least {TARGETS['speedup']:.0f})")
    target = Path(__file__).parent / "results" / "fedsvd.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
