"""One-shot pruning: what is left of a model by method and share kept, nothing trained.

    python benchmarks/prune_oneshot.py minilm [--rows BEGINNING …] [--groups 0.5 …] [--missing]
    python benchmarks/prune_oneshot.py causal [--testbed FOLDER]

MiniLM: mean cosine of embeddings to the original, 36 encoder maps, calibrated on 256 texts of two docstrings each,
measured on 200 texts of other modules. Causal LM: bits per byte on held-out text, 28 maps, calibrated on 200 windows.
All methods see the same moments of the original model. "Σ" rows refit under the inputs alone, the others under the
gradients too. Seconds are those of one thread (``time.thread_time``) for masks and refits, calibration left out.
Without a testbed folder ``causal`` trains a small Llama on the standard library's source first.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

import eckart
from eckart.arch import find_sites, get_module, site_matrices
from eckart.compression import kfac
from eckart.hf.models import LoadedModel
from eckart.hf.tasks import embed
from eckart.moments import Moments
from eckart.prune import one_shot, refit, wanda_mask
from eckart.verbs.demo import minilm_folder
from eckart.verbs.models import as_batches, as_loaded, as_texts
from small_llama import trained_llama

FILE = Path(__file__).parent / "results" / "prune_oneshot.json"
KEEPS = (0.7, 0.5, 0.3)
FREE: dict[str, dict[str, Any]] = {
    "magnitude, global": {"method": "magnitude", "allocation": "global", "refit": False},
    "wanda": {"method": "wanda", "pattern": "row", "refit": False},
    "wanda, owl": {"method": "wanda", "pattern": "row", "refit": False, "allocation": "owl"},
    "wanda, farms": {"method": "wanda", "pattern": "row", "refit": False, "allocation": "farms"},
    "sparsegpt": {"method": "sparsegpt", "refit": False},
    "wanda + refit, Σ": {"method": "wanda", "pattern": "row", "gradients": False},
    "sparsegpt + refit, Σ": {"method": "sparsegpt", "gradients": False},
    "wanda + refit": {"method": "wanda", "pattern": "row"},
    "sparsegpt + refit": {"method": "sparsegpt"},
    "wanda, shares by loss + refit": {"method": "wanda", "allocation": "loss"},
    "kfac, equal shares": {"allocation": "uniform"},
    "alps, shares by loss": {"method": "alps", "allocation": "loss"},
    "kfac (default)": {},
}
TIGHT: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "refit": False},
    "sparsegpt": {"method": "sparsegpt", "refit": False},
    "wanda + refit, Σ": {"method": "wanda", "gradients": False},
    "sparsegpt + refit, Σ": {"method": "sparsegpt", "gradients": False},
    "alps, Σ": {"method": "alps", "gradients": False},
    "sparsegpt + refit": {"method": "sparsegpt"},
    "kfac": {"method": "kfac"},
    "alps (default)": {},
    "sparsegpt + refit, Σ, + rank 16": {"method": "sparsegpt", "gradients": False, "rank": 16},
    "sparsegpt + refit, + rank 16": {"method": "sparsegpt", "rank": 16},
    "alps (default), + rank 16": {"rank": 16},
}
NEURONS: dict[str, dict[str, Any]] = {
    "brain surgery, not refitted": {"refit": False},
    "brain surgery + refit (default)": {},
    "the same, calibrated on 1,024 texts": {"texts": 1024},
}
"""Half of the MLP neurons of every layer; attention stays dense. The causal LM has one calibration."""


def docstring_pairs(part: str, texts: int) -> list[str]:
    """Texts of two docstrings each."""
    found = as_texts("stdlib:docstrings", part=part, field=None, limit=2 * texts, seed=0).texts
    return [f"{a} {b}" for a, b in zip(found[::2], found[1::2], strict=True)]


class Trial:
    """One model with its calibration and its measure."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.base = kind, as_loaded(folder)
        if kind == "minilm":
            data: Any = docstring_pairs("calibration", 256)
            self.held_out: Any = docstring_pairs("evaluation", 200)
            self.samples, calibrated, self.unit = 200, 256, "mean cosine to the original"
        else:
            testbed = (folder / "valid.txt").exists()
            data = str(folder / "calib.txt") if testbed else "stdlib:source"
            self.held_out = str(folder / "valid.txt") if testbed else "stdlib:source"
            self.samples, calibrated, self.unit = 100, 200, "bits per byte"
        self.moments = eckart.calibrate(self.base, data, samples=calibrated)
        if kind == "minilm":
            self.batches, _ = as_batches(self.base, self.held_out, part="evaluation", field=None, samples=200,
                                         length=None, batch_size=20, seed=0)  # fmt: skip
            self.embeddings = [normalize(embed(self.base, batch), dim=1) for batch in self.batches]
        m = self.moments
        self.blind = Moments(m.fingerprint, m.inputs, {}, m.input_of, m.tokens, m.units, m.meta)
        self.dense = 1.0 if kind == "minilm" else self.figure(self.base.model)

    def figure(self, model: nn.Module) -> float:
        ours = LoadedModel(**{**self.base.__dict__, "model": model, "path": None})
        if self.kind == "minilm":
            pairs = zip(self.batches, self.embeddings, strict=True)
            cosines = [(normalize(embed(ours, batch), dim=1) * one).sum(1) for batch, one in pairs]
            return float(torch.cat(cosines).mean())
        found = eckart.evaluate(ours, self.base, self.held_out, latency=False, samples=self.samples)
        return found.metrics["bits_per_byte"].mean

    def prune(self, options: dict[str, Any]) -> dict[str, Any]:
        """What was found and done, as plain data."""
        options = dict(options)
        moments = self.moments if options.pop("gradients", True) else self.blind
        model = copy.deepcopy(self.base.model)
        start = time.thread_time()
        masks, outcome = one_shot(model, moments, **options)
        seconds = time.thread_time() - start
        if leaks := masks.leaks(model):
            raise RuntimeError(f"weights that should be zero are not: {leaks}")
        with torch.no_grad():
            for name, product in outcome.factors.items():
                get_module(model, name).weight.add_(product.dense())
        return {
            "value": self.figure(model),
            "kept": outcome.keep,
            "seconds": seconds,
            "predicted_loss": outcome.loss,
            "stored_bytes": outcome.stored_bytes,
            "loadable_bytes": outcome.loadable_bytes,
        }

    def narrow(self, options: dict[str, Any]) -> dict[str, Any]:
        """The same for a share of the MLP neurons; kept and bytes are those of the MLPs' maps."""
        options = dict(options)
        moments, texts = self.moments, options.pop("texts", None)
        if texts:
            moments = eckart.calibrate(self.base, docstring_pairs("calibration", texts), samples=texts)
        start = time.thread_time()
        pruned = eckart.prune_model(self.base, moments=moments, pattern="neurons", **options)
        seconds = time.thread_time() - start
        before, after = pruned.outcome.sites_before, pruned.outcome.sites_after
        return {
            "value": self.figure(pruned.model),
            "kept": after.parameters / before.parameters,
            "seconds": seconds,
            "predicted_loss": pruned.outcome.predicted_loss,
            "stored_bytes": after.bytes,
            "loadable_bytes": after.bytes,
        }

    def refit_seconds(self) -> float:
        """One refit of every map, half kept by Wanda."""
        seconds = 0.0
        for site in find_sites(self.base.model):
            matrix, moments = site_matrices(self.base.model, site)[0], self.moments.site(site.name)
            second, _, _ = kfac.metrics(matrix, moments, kfac.Options())
            mask = wanda_mask(matrix["weight"], second, 0.5)
            start = time.thread_time()
            refit(matrix["weight"], mask, second)
            seconds += time.thread_time() - start
        return seconds


def run(kind: str, folder: Path, rows: list[str], groups: list[str], missing: bool) -> dict[str, Any]:
    """All rows, or those asked for; each is written as soon as it is there."""
    trial = Trial(kind, folder)
    result = read().get(kind, {"rows": {}})
    result |= {
        "unit": trial.unit,
        "dense": trial.dense,
        "calibration_tokens": trial.moments.tokens,
        "dense_bytes": sum(site.weight_parameters for site in find_sites(trial.base.model)) * 4,
        "refit_seconds": trial.refit_seconds(),
    }
    wanted = [(f"{keep:g}", row, {"keep": keep, **options}) for keep in KEEPS for row, options in FREE.items()]
    wanted += [("2:4", row, {"pattern": "2:4", **options}) for row, options in TIGHT.items()]
    wanted += [
        ("neurons", row, {"keep": 0.5, **options})
        for row, options in NEURONS.items()
        if kind == "minilm" or "texts" not in options
    ]
    for group, row, options in wanted:
        if (rows and not row.startswith(tuple(rows))) or (groups and group not in groups):
            continue
        if missing and row in result["rows"].get(group, {}):
            continue
        found = trial.narrow(options) if group == "neurons" else trial.prune(options)
        result["rows"].setdefault(group, {})[row] = found
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps({**read(), kind: result}, indent=2) + "\n")
        line = f"{kind} {group:7s} {row:34s} {found['value']:.4f}   kept {found['kept']:.4f}"
        print(f"{line}   [{found['seconds']:.1f} s CPU]", flush=True)
    return result


def read() -> dict[str, Any]:
    """What was measured before."""
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    groups = result["rows"]
    lines = ["| " + result["unit"] + " | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for row in dict.fromkeys(row for rows in groups.values() for row in rows):
        cells = [f"{rows[row]['value']:.3f}" if row in rows else "" for rows in groups.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["minilm", "causal"])
    parser.add_argument("--testbed", type=Path, help="folder of a causal LM with calib.txt and valid.txt")
    parser.add_argument("--rows", nargs="+", default=[], help="beginnings of the rows to run; others stay as they were")
    parser.add_argument("--groups", nargs="+", default=[], help="some of 0.7, 0.5, 0.3, 2:4, neurons")
    parser.add_argument("--missing", action="store_true", help="only rows that the file does not have yet")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = minilm_folder() if args.kind == "minilm" else (args.testbed or trained_llama())
    result = run(args.kind, folder, args.rows, args.groups, args.missing)
    print(table(result))
    print(f"dense {result['dense']:.4f}; one refit of all maps: {result['refit_seconds']:.1f} s of CPU")


if __name__ == "__main__":
    main()
