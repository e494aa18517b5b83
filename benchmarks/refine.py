"""What closed-form refinements are worth, in the domain of the calibration and outside of it.

    python benchmarks/refine.py [--testbed FOLDER]

A small causal LM, calibrated on source code: on few tokens (8 windows, mean of 2 samples) and on many (60 windows, one
sample; the usual 200 would take too long). Figures: rise of the loss in nats per token on held-out source (in the
domain) and on English sentences out of docstrings (outside), 16 windows of 256 tokens each, at 20, 40 and 60 % of the
maps' parameters removed. First the metric of the inputs at equal ranks: the full Σ, its diagonal, and kfac's ρ. Then
the default plan (without probes), its last factors refitted or not. Without a testbed folder a small Llama is trained
on the standard library's source first.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import eckart
from eckart.apply import apply_plan, prepare_sites
from eckart.apply.decide import decide
from eckart.apply.refit import refit
from eckart.arch import find_sites
from eckart.compression import get_method, options_for
from eckart.data import read_texts
from eckart.errors import EckartWarning
from eckart.records import Budget
from eckart.verbs.models import as_batches, as_loaded
from small_llama import trained_llama

RESULTS = Path(__file__).parent / "results"
REMOVED = (0.2, 0.4, 0.6)
METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "asvd (diagonal, half power)": ("asvd", {}),
    "whitened (full Σ)": ("whitened", {}),
    "kfac, ρ = 1 (diagonal)": ("kfac", {"input_shrinkage": 1.0}),
    "kfac, ρ = 0 (full Σ)": ("kfac", {"input_shrinkage": 0.0}),
    "kfac, ρ by tokens (default)": ("kfac", {}),
    "kfac, ρ auto": ("kfac", {"input_shrinkage": "auto"}),
}
BLENDS = {"plan": None, "plan, refit β = 0": 0.0, "plan, refit β = 0.1": 0.1, "plan, refit β = 0.25": 0.25}
TOKENS = {"few": (8, 2), "many": (60, 1)}
"""Windows and samples."""


def loss(model: nn.Module, batches: Any) -> float:
    """Nats per token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            ids = batch["input_ids"]
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            total += float(nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return total / count


def models(base: Any, data: Any, windows: int, seed: int) -> Iterator[tuple[str, float, nn.Module]]:
    """Every row at every share removed."""
    moments = eckart.calibrate(base, data, samples=windows, seed=seed)
    batches, _ = as_batches(
        base, data, part="calibration", field=None, samples=windows, length=None, batch_size=16, seed=seed
    )
    sites = find_sites(base.model)
    for row, (name, given) in METRICS.items():
        method = get_method(name)
        options = options_for(method, given)
        prepared = prepare_sites(base.model, sites, moments, method, options)
        for removed in REMOVED:
            made = decide(base.model, sites, moments, method=method, options=options, allocation="uniform",
                          budget=Budget(keep=round(1 - removed, 3)), forms=("dense", "lowrank"),
                          prepared=prepared)  # fmt: skip
            model = copy.deepcopy(base.model)
            apply_plan(model, made.plan, sites, moments, prepared=prepared, certify=False)
            yield row, removed, model
    method = get_method("kfac")
    for removed in REMOVED:
        made = decide(base.model, sites, moments, method=method, options=options_for(method),
                      budget=Budget(keep=round(1 - removed, 3)))  # fmt: skip
        for row, blend in BLENDS.items():
            model = copy.deepcopy(base.model)
            apply_plan(model, made.plan, sites, moments, prepared=made.prepared, units=made.units, certify=False)
            if blend is not None:
                refit(model, base.model, batches, sites, blend=blend)
            yield row, removed, model


def run(folder: Path) -> dict[str, Any]:
    base = as_loaded(folder)
    testbed = (folder / "valid.txt").exists()
    source: Any = read_texts(str(folder / "calib.txt") if testbed else "stdlib:source").joined.splitlines(True)
    held_out: Any = str(folder / "valid.txt") if testbed else "stdlib:source"
    tests = {}
    for domain, text in (("in domain", held_out), ("outside", "stdlib:docstrings")):
        tests[domain], _ = as_batches(base, text, part="evaluation", field=None, samples=16, length=None,
                                      batch_size=8, seed=0)  # fmt: skip
    dense = {domain: loss(base.model, batches) for domain, batches in tests.items()}
    found: dict[str, dict[str, dict[str, dict[str, list[float]]]]] = {}
    for tokens, (windows, samples) in TOKENS.items():
        for seed in range(samples):
            start = seed * len(source) // samples
            data = ["".join(source[start:] + source[:start])]
            for row, removed, model in models(base, data, windows, seed):
                cells = found.setdefault(tokens, {}).setdefault(row, {}).setdefault(str(removed), {})
                for domain, batches in tests.items():
                    cells.setdefault(domain, []).append(loss(model, batches) - dense[domain])
                shown = ", ".join(f"{domain} {values[-1]:.4f}" for domain, values in cells.items())
                print(f"{tokens} {seed}  {row:28s} {removed:.0%} removed: {shown}", flush=True)
    return {
        "testbed": testbed,
        "unit": "rise of the loss, nats per token",
        "dense": dense,
        "windows": {tokens: windows for tokens, (windows, _) in TOKENS.items()},
        "samples": {tokens: samples for tokens, (_, samples) in TOKENS.items()},
        "rows": {
            tokens: {
                row: {
                    removed: {domain: statistics.fmean(values) for domain, values in cells.items()}
                    for removed, cells in by.items()
                }
                for row, by in rows.items()
            }
            for tokens, rows in found.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, one table for few tokens and one for many."""
    lines = []
    for tokens, rows in result["rows"].items():
        lines += [f"| {tokens} tokens: in domain / outside | 20 % | 40 % | 60 % |", "|---|---|---|---|"]
        for row, by in rows.items():
            cells = [f"{cell['in domain']:.3f} / {cell['outside']:.3f}" for cell in by.values()]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, help="folder of a causal LM with calib.txt and valid.txt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", EckartWarning)
    start = time.process_time()
    result = run(args.testbed or trained_llama())
    result["cpu_seconds"] = round(time.process_time() - start)
    print(table(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "refine.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
