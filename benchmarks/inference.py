"""MiniLM at half the parameters of its maps against the dense model: seconds of a forward pass, interleaved.

    python benchmarks/inference.py

One thread, batch 8 × 64 tokens; prints the ratio of the medians and writes results/inference.json.
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


def main() -> None:
    torch.set_num_threads(1)
    base = as_loaded(minilm_folder())
    moments = eckart.calibrate(base, "stdlib:docstrings", samples=256)
    small = eckart.compress(base, moments=moments, keep=0.5, certify=False)
    ids = torch.randint(1000, 20000, (8, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    times: dict[str, list[float]] = {"dense": [], "compressed": []}
    with torch.inference_mode():
        for _ in range(RUNS + 5):
            for name, model in (("dense", base.model), ("compressed", small.model)):
                start = time.perf_counter()
                model(**batch)
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[5:]) for name, values in times.items()}
    ratio = medians["dense"] / medians["compressed"]
    forms = [layer.form for layer in small.outcome.layers]
    result = {
        "milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "speedup": round(ratio, 3),
        "forms": {form: forms.count(form) for form in sorted(set(forms))},
        "kept": small.outcome.sites_after.parameters / small.outcome.sites_before.parameters,
        "target": 1.5,
    }
    print(json.dumps(result, indent=2))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "inference.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
