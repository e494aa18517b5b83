"""MiniLM at half the parameters of its maps against the dense model: seconds of a forward pass, interleaved.

    python benchmarks/inference.py

One thread, batch 8 × 64 tokens; prints the ratios of the medians and writes results/inference.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch

import eckart
from eckart.verbs.demo import minilm_folder
from eckart.verbs.models import as_loaded

RUNS = 40
VARIANTS: dict[str, dict[str, object]] = {
    "default": {},
    "default, ranks in steps of 16": {"rank_multiple": 16},
    "two factors only": {"forms": ("dense", "lowrank")},
    "two factors only, ranks in steps of 16": {"forms": ("dense", "lowrank"), "rank_multiple": 16},
}


def main() -> None:
    torch.set_num_threads(1)
    base = as_loaded(minilm_folder())
    moments = eckart.calibrate(base, "stdlib:docstrings", samples=256)
    made = {
        name: eckart.compress(base, moments=moments, keep=0.5, certify=False, **options)
        for name, options in VARIANTS.items()
    }
    ids = torch.randint(1000, 20000, (8, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models = {"dense": base.model} | {name: one.model for name, one in made.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(RUNS + 5):
            for name, model in models.items():
                start = time.perf_counter()
                model(**batch)
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[5:]) for name, values in times.items()}
    result = {
        "milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "speedup": {name: round(medians["dense"] / medians[name], 3) for name in made},
        "target": 1.5,
    }
    print(json.dumps(result, indent=2))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "inference.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
