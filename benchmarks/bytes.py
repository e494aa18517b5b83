"""A quarter of the bf16 bytes: rank, width and bits under one budget against plain int4.

    python benchmarks/bytes.py [--testbed FOLDER]

The 28 maps of the causal LM in bfloat16. Plain int4 rounds every map to the nearest, one scale and zero per row or per
128 columns, which takes a little more than a quarter. Ours gets a quarter of the maps' bytes, index and scales
included. KL to the original in nats per token on text that calibration has not seen.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import eckart
from eckart.arch import find_sites, model_size
from eckart.layers import quantise_layer
from eckart.verbs.models import as_loaded
from small_llama import trained_llama

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", type=Path, help="folder of a causal LM with calib.txt and valid.txt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.testbed or trained_llama()
    calib: str | Path = folder / "calib.txt" if args.testbed else "stdlib:source"
    valid: str | Path = folder / "valid.txt" if args.testbed else "stdlib:source"
    base = as_loaded(folder, dtype="bfloat16")
    sites = find_sites(base.model)
    maps = sum(site.weight_parameters for site in sites) * 2
    rest = model_size(base.model).bytes - maps
    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str, model: Any, forms: dict[str, int] | None = None) -> None:
        loaded = dataclasses.replace(base, model=model, path=None)
        found = eckart.evaluate(loaded, base, str(valid), latency=False, samples=150)
        share = (model_size(model).bytes - rest) / maps
        rows[name] = {
            "share_of_bf16": round(share, 4),
            "kl": found.metrics["kl"].mean,
            "loss_rise": found.metrics["loss_rise"].mean,
        } | ({"forms": forms} if forms else {})
        print(f"{name:44s} {share:.4f} of bf16  KL {found.metrics['kl'].mean:.4f}", flush=True)

    for name, group in (("int4, nearest, per row", None), ("int4, nearest, groups of 128", 128)):
        model = copy.deepcopy(base.model)
        for site in sites:
            quantise_layer(model, site.name, bits=4, group=group, clip=False)
        measure(name, model)
    small = eckart.compress(base, data=str(calib), budget=eckart.Budget(bytes=rest + maps // 4))
    forms = Counter(f"{step.form}, {step.bits or 16} bits" for step in small.plan.steps)
    measure("Eckart, one budget", small.model, dict(forms))
    best = min(row["kl"] for name, row in rows.items() if name.startswith("int4"))
    ratio = rows["Eckart, one budget"]["kl"] / best
    print(f"KL against the better int4: {ratio:.2f} (asked: at most 0.5)")
    RESULTS.mkdir(exist_ok=True)
    result = {"testbed": bool(args.testbed), "rows": rows, "ratio": ratio}
    (RESULTS / "bytes.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
