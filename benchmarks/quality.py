"""How much of a model survives compression, by method: the figures of the README.

    python benchmarks/quality.py minilm
    python benchmarks/quality.py causal [--testbed FOLDER]

MiniLM: mean cosine of sentence embeddings to the original. Causal LM: rise of the held-out loss in nats per token.
Both on text that calibration has not seen, at 20, 40 and 60 % of the maps' parameters removed, for three
calibration samples; the intervals are over those samples (mean ± half-range). Without a testbed folder
``causal`` trains a small Llama on the standard library's source first.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import eckart
from eckart.apply import apply_plan, prepare_sites
from eckart.apply.decide import decide
from eckart.apply.probe import ROUNDS
from eckart.arch import find_sites
from eckart.hf.distance import distance_from_now
from eckart.records import Budget
from eckart.verbs.compress import PROBE_ROWS, PROBE_SAMPLES
from eckart.verbs.demo import minilm_folder
from eckart.verbs.models import as_batches, as_loaded
from eckart.verbs.plan import any_method
from small_llama import trained_llama

RESULTS = Path(__file__).parent / "results"
REMOVED = (0.2, 0.4, 0.6)
LOWRANK = ("dense", "lowrank")
PIVOTED = ("dense", "lowrank", "pivoted")
ALL = (*PIVOTED, "narrow")
ROWS = {
    "svd, uniform": ("svd", "uniform", LOWRANK),
    "fwsvd (rows), uniform": ("fwsvd", "uniform", LOWRANK),
    "asvd, uniform": ("asvd", "uniform", LOWRANK),
    "afm, uniform": ("afm", "uniform", LOWRANK),
    "whitened, uniform": ("whitened", "uniform", LOWRANK),
    "whitened, type-wise": ("whitened", "typewise", LOWRANK),
    "kfac, uniform": ("kfac", "uniform", LOWRANK),
    "kfac, global": ("kfac", "global", LOWRANK),
    "kfac, global, pivoted": ("kfac", "global", PIVOTED),
    "modules, global": ("modules", "global", ALL),
    "kfac, global, pivoted, narrower modules (default)": ("kfac", "global", ALL),
}


def measure(kind: str, model: Any, base: Any, data: Any) -> float:
    """The headline figure of one compressed model."""
    found = eckart.evaluate(model, base, data, latency=False, samples=300 if kind == "minilm" else 150)
    return found.metrics["cosine" if kind == "minilm" else "loss_rise"].mean


def run(kind: str, folder: Path, seeds: tuple[int, ...], rows: list[str]) -> dict[str, Any]:
    base = as_loaded(folder)
    testbed = (folder / "valid.txt").exists()
    calib = "stdlib:docstrings" if kind == "minilm" else "stdlib:source"
    held_out: Any = calib
    if testbed:
        calib, held_out = str(folder / "calib.txt"), str(folder / "valid.txt")
    figures: dict[str, dict[str, list[float]]] = {row: {str(r): [] for r in REMOVED} for row in rows}
    for seed in seeds:
        data: Any = calib
        if testbed:
            # Another sample of the same file: start reading at another line.
            lines = Path(calib).read_text().splitlines(keepends=True)
            start = seed * len(lines) // max(len(seeds), 1)
            data = ["".join(lines[start:] + lines[:start])]
        moments = eckart.calibrate(base, data, seed=seed)
        sites = find_sites(base.model)
        prepared: dict[str, Any] = {}
        for row in rows:
            name, allocation, forms = ROWS[row]
            method = any_method(name)
            options = method.options()
            narrow = "narrow" in forms
            if name not in prepared and name != "modules":
                prepared = {name: prepare_sites(base.model, sites, moments, method, options)}
            distance = None
            if narrow:
                samples = PROBE_SAMPLES[base.task]
                batches, _ = as_batches(base, data, part="calibration", field=None, samples=samples, length=None,
                                        batch_size=PROBE_ROWS, seed=seed)  # fmt: skip
                distance = distance_from_now(base, batches, seed=seed)
            for removed in REMOVED:
                start_time = time.process_time()
                made = decide(
                    base.model,
                    sites,
                    moments,
                    method=method,
                    options=options,
                    budget=Budget(keep=round(1 - removed, 3)),
                    allocation=allocation,
                    forms=forms,
                    prepared=prepared.get(name),
                    distance=distance,
                    rounds=ROUNDS if narrow else 0,
                )
                model = copy.deepcopy(base.model)
                outcome = apply_plan(
                    model, made.plan, sites, moments, prepared=made.prepared, units=made.units, certify=False
                )
                kept = outcome.sites_after.parameters / outcome.sites_before.parameters
                smaller = type(base)(**{**base.__dict__, "model": model, "path": None})
                value = measure(kind, smaller, base, held_out)
                figures[row][str(removed)].append(value)
                print(
                    f"seed {seed}  {row:34s} {removed:.0%} removed (kept {kept:.4f}): {value:.4f}"
                    f"   [{time.process_time() - start_time:.1f} s CPU]",
                    flush=True,
                )
    return {
        "model": kind,
        "testbed": testbed,
        "unit": "mean cosine to the original" if kind == "minilm" else "rise of the loss, nats per token",
        "seeds": list(seeds),
        "rows": {
            row: {
                r: {
                    "mean": statistics.fmean(values),
                    "low": min(values),
                    "high": max(values),
                }
                for r, values in by.items()
            }
            for row, by in figures.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| " + result["unit"] + " | 20 % | 40 % | 60 % |", "|---|---|---|---|"]
    for row, by in result["rows"].items():
        cells = [f"{v['mean']:.3f} ({v['low']:.3f}–{v['high']:.3f})" for v in by.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["minilm", "causal"])
    parser.add_argument("--testbed", type=Path, help="folder of a causal LM with calib.txt and valid.txt")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", help="beginnings of the rows to run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [r for r in ROWS if not args.rows or r.startswith(tuple(args.rows))]
    folder = minilm_folder() if args.kind == "minilm" else (args.testbed or trained_llama())
    result = run(args.kind, folder, tuple(range(args.seeds)), rows)
    print(table(result))
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"quality_{args.kind}.json"
    if len(rows) < len(ROWS) and file.exists():  # rows that were not run again stay as they were measured
        old = json.loads(file.read_text())
        if old["seeds"] == result["seeds"] and old["testbed"] == result["testbed"]:
            found = {**old["rows"], **result["rows"]}
            result["rows"] = {row: found[row] for row in ROWS if row in found}
            file.write_text(json.dumps(result, indent=2) + "\n")
    elif len(rows) == len(ROWS):
        file.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
