"""How much of what quantising and pruning lost a low-rank repair gives back.

    python benchmarks/compensate.py [--testbed FOLDER] [--ranks 8,32]

All maps inside of the blocks of a small trained causal LM are damaged, without any calibration: rounded to the nearest
at 4 and 8 bits, one scale per row (the width, 128, is the usual group), or pruned by magnitude, half of each
map or 2 of 4. Then repaired with every method. Figures: bits per byte lost on held-out text, before and after, and the
share of them that came back. The intervals of the bootstrap are those of ``eckart evaluate``. Without a testbed
folder a small Llama is trained on the standard library's source first.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eckart
from eckart.arch import find_sites, get_module
from eckart.hf.models import LoadedModel
from eckart.linalg import round_groups
from eckart.verbs.models import as_loaded
from small_llama import trained_llama

RESULTS = Path(__file__).parent / "results"
SAMPLES = 100


def half(W: Tensor) -> Tensor:
    """The larger half of the entries of a map."""
    return W * (W.abs() > W.abs().flatten().kthvalue(W.numel() // 2).values)


def two_of_four(W: Tensor) -> Tensor:
    """The two larger ones of every four neighbours in a row."""
    fours = W.reshape(W.shape[0], -1, 4)
    kept = fours.abs().topk(2, dim=-1).indices
    return torch.zeros_like(fours).scatter(-1, kept, fours.gather(-1, kept)).reshape(W.shape)


DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "4 bits": lambda W: round_groups(W, bits=4, clip=False).dense(),
    "8 bits": lambda W: round_groups(W, bits=8, clip=False).dense(),
    "50 % pruned": half,
    "2:4 pruned": two_of_four,
}
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "qera, diagonal": {"method": "qera", "options": {"diagonal": True}},
    "eora = qera": {"method": "eora"},
    "kfac": {"method": "kfac"},
}


def damaged(base: LoadedModel, damage: Callable[[Tensor], Tensor]) -> LoadedModel:
    model = copy.deepcopy(base.model)
    for site in find_sites(model):
        weight = get_module(model, site.name).weight.data
        weight.copy_(damage(weight))
    return dataclasses.replace(base, model=model, path=None)


def repairs(ranks: tuple[int, ...], base: LoadedModel) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """(label, on the damaged model's own inputs?, what is asked of ``eckart.compensate``)."""
    for rank in ranks:
        for label, asked in METHODS.items():
            yield f"{label}, rank {rank}", False, {"rank": rank, **asked}
    for method in ("eora", "kfac"):
        yield (
            f"{method}, damaged inputs, rank {ranks[-1]}",
            True,
            {
                "rank": ranks[-1],
                "method": method,
                "inputs": "damaged",
            },
        )
    sites = find_sites(base.model)
    size = ranks[0] * sum(site.out_features + site.in_features for site in sites)
    share = size / sum(site.weight_parameters for site in sites)
    yield f"kfac, one budget of rank {ranks[0]}'s size", False, {"share": share, "rank": max(ranks)}


def run(folder: Path, ranks: tuple[int, ...], damages: list[str]) -> dict[str, Any]:
    base = as_loaded(folder)
    testbed = (folder / "valid.txt").exists()
    calib = str(folder / "calib.txt") if testbed else "stdlib:source"
    held_out = str(folder / "valid.txt") if testbed else "stdlib:source"
    moments = eckart.calibrate(base, calib)

    def lost(model: LoadedModel) -> float:
        found = eckart.evaluate(model, base, held_out, latency=False, samples=SAMPLES).metrics
        return found["bits_per_byte"].mean - found["bits_per_byte_base"].mean

    def repair(bad: LoadedModel, before: float, source: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
        found = eckart.compensate(bad, base, **source, **asked)
        after, outcome = lost(found.repaired()), found.outcome
        return {
            "lost": after,
            "won_back": 1 - after / before,
            "parameters": outcome.parameters,
            "stored": outcome.stored,
            "repaired": outcome.repaired,
            "predicted_before": outcome.loss_before,
            "predicted_after": outcome.loss_after,
        }

    rows: dict[str, Any] = {}
    for name in damages:
        bad = damaged(base, DAMAGES[name])
        before = lost(bad)
        print(f"{name}: lost {before:.5f} bits per byte", flush=True)
        after: dict[str, Any] = {}
        for label, own, asked in repairs(ranks, base):
            after[label] = repair(bad, before, {"data": calib} if own else {"moments": moments}, asked)
            print(f"  {label:36s} {after[label]['lost']:.5f}   won back {after[label]['won_back']:.0%}", flush=True)
        rows[name] = {"before": before, "after": after}
    return {"testbed": testbed, "unit": "bits per byte lost on held-out source", "samples": SAMPLES, "rows": rows}


def table(result: dict[str, Any], rank: int) -> str:
    """The result as Markdown."""
    labels = [f"{label}, rank {rank}" for label in METHODS]
    lines = ["| lost bits per byte | damaged | " + " | ".join(labels) + " |", "|---" * (len(labels) + 2) + "|"]
    for name, row in result["rows"].items():
        cells = [f"{row['after'][label]['lost']:.4f} ({row['after'][label]['won_back']:.0%})" for label in labels]
        lines.append(f"| {name} | {row['before']:.4f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, help="folder of a causal LM with calib.txt and valid.txt")
    parser.add_argument("--ranks", default="8,32")
    parser.add_argument("--damages", help="comma-separated; all by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ranks = tuple(int(rank) for rank in args.ranks.split(","))
    damages = args.damages.split(",") if args.damages else list(DAMAGES)
    result = run(args.testbed or trained_llama(), ranks, damages)
    print(table(result, ranks[-1]))
    if damages == list(DAMAGES):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "compensate.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
