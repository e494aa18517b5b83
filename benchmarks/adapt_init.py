"""PiSSA's start at rank 16: CPU seconds and accuracy, ours against PEFT's exact SVD and its 16 power iterations.

On the 36 encoder maps of MiniLM-L6 and on square matrices of 2048, one flat (normal entries) and one whose singular
values fall as 1/√i, through ``get_peft_model`` in one process and on one thread. Accuracy is measured on the factors
that each ended up with: the largest relative error of a singular value of B A, and how much ‖W − B A‖ is above the
least possible, against a float64 SVD that is not timed.

    python benchmarks/adapt_init.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel

import eckart
from eckart.verbs.demo import minilm_folder

RANK = 16
SIZE = 2048
RESULTS = Path(__file__).parent / "results" / "adapt_init.json"


class Layers(nn.Module):
    """Linear layers with given weights."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.clone())
            self.layers[name] = layer


def minilm() -> nn.Module:
    return AutoModel.from_pretrained(minilm_folder()).encoder


def square(kind: str) -> Callable[[], nn.Module]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(SIZE, SIZE, generator=generator)
    if kind == "falling":
        Q = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
        W = (W / torch.arange(1, SIZE + 1).sqrt()) @ Q
    return lambda: Layers({"up": W})


def peft_start(kind: str) -> Callable[[nn.Module], dict[str, tuple[Tensor, Tensor]]]:
    def start(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names(model), init_lora_weights=kind)
        tuned: Any = get_peft_model(model, config)
        layers = {n: m for n, m in tuned.base_model.model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
        return {
            n: (m.lora_B["default"].weight.detach(), m.lora_A["default"].weight.detach()) for n, m in layers.items()
        }

    return start


def our_start(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    config = eckart.AdapterConfig(method="pissa", r=RANK, target_modules=names(model))
    tuned: Any = get_peft_model(model, config)
    layers = {n: m for n, m in tuned.base_model.model.named_modules() if hasattr(m, "eckart_delta")}
    deltas = {n: m.eckart_delta["default"] for n, m in layers.items()}
    return {n: (delta.B.detach()[0], delta.A.detach()[0]) for n, delta in deltas.items()}


def names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


STARTS: dict[str, Callable[[nn.Module], dict[str, tuple[Tensor, Tensor]]]] = {
    "Eckart": our_start,
    "PEFT pissa (exact)": peft_start("pissa"),
    "PEFT pissa_niter_16": peft_start("pissa_niter_16"),
}


def accuracy(weights: Mapping[str, Tensor], found: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """(largest relative error of a singular value, largest relative excess of ‖W − B A‖)."""
    worst, excess = 0.0, 0.0
    for name, W in weights.items():
        B, A = (part.double() for part in found[name])
        S = torch.linalg.svdvals(W.double())
        mine = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T)
        worst = max(worst, float(((mine - S[:RANK]) / S[:RANK]).abs().max()))
        least = float(S[RANK:].square().sum().sqrt())
        excess = max(excess, float((W.double() - B @ A).norm()) / least - 1)
    return worst, excess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    report: dict[str, Any] = {"rank": RANK, "rounds": rounds, "torch": torch.__version__}
    for title, build in {
        "MiniLM-L6, 36 maps": minilm,
        f"{SIZE}², flat": square("flat"),
        f"{SIZE}², falling": square("falling"),
    }.items():
        weights = {name: build_.weight.detach().clone() for name, build_ in linears(build()).items()}
        seconds: dict[str, list[float]] = {name: [] for name in STARTS}
        found = {}
        for _ in range(rounds):
            for name, start in STARTS.items():
                torch.manual_seed(0)
                model = build()
                begun = time.process_time()
                found[name] = start(model)
                seconds[name].append(time.process_time() - begun)
        rows = {}
        print(f"\n{title}: PiSSA at rank {RANK}, median of {rounds} rounds")
        exact = statistics.median(seconds["PEFT pissa (exact)"])
        for name in STARTS:
            worst, excess = accuracy(weights, found[name])
            spent = statistics.median(seconds[name])
            rows[name] = {"cpu_seconds": spent, "worst_singular_value": worst, "excess_error": excess}
            print(
                f"  {name:22} {spent:8.3f} s CPU ({exact / spent:5.1f}×)   σ off by {worst:.1e}   error +{excess:.1e}"
            )
        report[title] = rows
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


if __name__ == "__main__":
    main()
