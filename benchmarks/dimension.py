"""Errors of the estimators of dimension on manifolds whose dimension is known, with and without noise.

    python benchmarks/dimension.py

2000 points in 100 features, `REPEATS` samples each: mean reading − true dimension, and the spread of readings beside
the standard error that a single reading states. Beside them scikit-dimension, where it can be imported (pip install
scikit-dimension). Also how much TwoNN rises from 125 to 2000 points of a cube, which `dimension_curve` must not take
for noise. Writes benchmarks/results/dimension.json.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eckart.geometry import dimension_curve, local_pca, mle_dimension, pca_dimension, two_nn
from eckart.geometry.manifolds import cube, gaussian, noisy, sphere, swiss_roll
from eckart.records import Finding

try:
    import skdim
except ImportError:
    skdim = None

POINTS, FEATURES, REPEATS = 2000, 100, 5

Make = Callable[[int], Tensor]


def cubes(d: int, std: float = 0.0) -> Make:
    return lambda seed: noisy(cube(POINTS, d, FEATURES, seed=seed), std, seed=seed + 2)


MANIFOLDS: dict[str, tuple[int, Make]] = {
    "cube 1": (1, cubes(1)),
    "cube 2": (2, cubes(2)),
    "cube 5": (5, cubes(5)),
    "cube 10": (10, cubes(10)),
    "cube 15": (15, cubes(15)),
    "cube 20": (20, cubes(20)),
    "cube 50": (50, cubes(50)),
    "Gaussian 5": (5, lambda seed: gaussian(POINTS, 5, FEATURES, seed=seed)),
    "Gaussian 10": (10, lambda seed: gaussian(POINTS, 10, FEATURES, seed=seed)),
    "sphere 2": (2, lambda seed: sphere(POINTS, 2, FEATURES, seed=seed)),
    "sphere 10": (10, lambda seed: sphere(POINTS, 10, FEATURES, seed=seed)),
    "swiss roll": (2, lambda seed: swiss_roll(POINTS, FEATURES, seed=seed)),
    "cube 5 + noise 0.001": (5, cubes(5, 0.001)),
    "cube 5 + noise 0.01": (5, cubes(5, 0.01)),
    "cube 5 + noise 0.05": (5, cubes(5, 0.05)),
}
OURS: dict[str, Callable[[Tensor], Finding]] = {
    "TwoNN": two_nn,
    "TwoNN, slope": lambda X: two_nn(X, fit="slope"),
    "MLE": mle_dimension,
    "local PCA": local_pca,
    "participation ratio": lambda X: pca_dimension(X)[0],
    "energy 95 %": lambda X: pca_dimension(X)[1],
}


def peers() -> dict[str, Callable[[Tensor], float]]:
    if skdim is None:
        return {}
    return {
        "skdim TwoNN": lambda X: float(skdim.id.TwoNN().fit(X.numpy()).dimension_),
        "skdim MLE": lambda X: float(skdim.id.MLE().fit(X.numpy(), n_neighbors=20).dimension_),
        "skdim lPCA": lambda X: float(skdim.id.lPCA().fit(X.numpy()).dimension_),
    }


def row(d: int, make: Make) -> dict[str, dict[str, float]]:
    samples = [make(10 * repeat) for repeat in range(REPEATS)]
    found: dict[str, dict[str, float]] = {}
    for name, measure in OURS.items():
        start = time.process_time()
        findings = [measure(X) for X in samples]
        values = [float(finding) for finding in findings]
        found[name] = {
            "mean": statistics.fmean(values),
            "bias": statistics.fmean(values) - d,
            "sd": statistics.stdev(values),
            "stated": statistics.fmean(float(f.uncertainty or 0.0) for f in findings) / 1.959964,
            "at_least": sum(f.at_least for f in findings) / REPEATS,
            "cpu_seconds": (time.process_time() - start) / REPEATS,
        }
    for name, peer in peers().items():
        start = time.process_time()
        values = [peer(X) for X in samples]
        found[name] = {
            "mean": statistics.fmean(values),
            "bias": statistics.fmean(values) - d,
            "sd": statistics.stdev(values),
            "cpu_seconds": (time.process_time() - start) / REPEATS,
        }
    return found


def rises() -> dict[str, dict[str, float]]:
    """TwoNN at 2000 points over 125 points, for cubes."""
    found = {}
    for d in (1, 2, 5, 10, 20, 50):
        ratios = []
        for repeat in range(REPEATS):
            steps = dimension_curve(cube(POINTS, d, FEATURES, seed=10 * repeat)).curves["two_nn"]
            ratios.append(float(steps[0]) / float(steps[-1]))
        found[f"cube {d}"] = {"mean": statistics.fmean(ratios), "sd": statistics.stdev(ratios), "largest": max(ratios)}
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="skdim")
    rows = {name: row(d, make) for name, (d, make) in MANIFOLDS.items()}
    names = list(next(iter(rows.values())))
    print(f"{'bias ± sd':22s}" + "".join(f"{name:>22s}" for name in names))
    for manifold, cells in rows.items():
        shown = "".join(f"{cells[n]['bias']:+12.2f} ± {cells[n]['sd']:<7.2f}" for n in names)
        print(f"{manifold:22s}{shown}")
    stated = [
        cell["sd"] / cell["stated"] for cells in rows.values() for n, cell in cells.items() if cell.get("stated", 0) > 0
    ]
    rise = rises()
    print(f"sd over stated error, median {statistics.median(stated):.2f}; TwoNN, 2000 over 125 points: {rise}")
    result = {
        "what": f"{POINTS} points in {FEATURES} features, {REPEATS} samples; bias = mean reading − true dimension",
        "rows": rows,
        "two_nn_2000_over_125_points": rise,
        "sd_over_stated_error_median": statistics.median(stated),
        "peer": f"scikit-dimension {importlib.metadata.version('scikit-dimension')}" if skdim is not None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    path = Path(__file__).parent / "results" / "dimension.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    assert all(math.isfinite(cell["mean"]) for cells in rows.values() for cell in cells.values())


if __name__ == "__main__":
    main()
