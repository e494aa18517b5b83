"""What a look at the weights of a model costs, beside WeightWatcher, and how exact it is on a large matrix.

    python benchmarks/inspect_weights.py [--rounds 3] [--reference svdvals|gram]

One process, one thread, CPU seconds. First all weights of MiniLM that have a spectrum: ``inspect_weights`` in the
tier ``standard`` on the folder (reading and hashing included, no cache) against ``WeightWatcher().analyze()`` at its
defaults on the loaded model (loading left out), by turns, the best of each. ``standard`` does more (noise, windows,
defects, verdicts, hashing), so two more pairs are given: the findings alone that both give at WeightWatcher's defaults,
and ``standard`` against WeightWatcher with its own comparison to noise (``mp_fit=True, randomize=True``, once).
WeightWatcher is no dependency; without it its figures are left out. Then one 4096 × 11008 float32 matrix, noise with
256 power-law directions on top: the seconds of its spectrum alone and of everything that ``standard`` measures, and
the largest relative error of its 256 largest singular values against a float64 decomposition that shares no code with
ours.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.checkpoint.weights import open_weights
from eckart.inspection import Inspection, inspect_weights
from eckart.spectra import power_law, singular_values, spectrum, unmeasurable
from eckart.verbs.demo import minilm_folder

RESULTS = Path(__file__).parent / "results" / "inspect_weights.json"
SHAPE = (4096, 11008)
SPIKES = 256
TARGETS = {"speedup over WeightWatcher": 2.0, "seconds of 4096 × 11008": 15.0, "error of the top 256": 1e-4}
TABLE = (60_000, 64)
"""A table of embeddings longer than what WeightWatcher takes."""


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def weightwatcher() -> Any:
    """The module, or None where it is not installed."""
    try:
        with quiet():
            import weightwatcher
    except ImportError:
        return None
    return weightwatcher


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what WeightWatcher prints and logs."""
    logging.disable(logging.CRITICAL)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def minilm(rounds: int, peer: Any) -> dict[str, Any]:
    folder = minilm_folder()
    ours: list[float] = []
    theirs: list[float] = []
    found: Inspection | None = None
    details = None
    watcher = None
    if peer is not None:
        from transformers import AutoModel

        watcher = peer.WeightWatcher(model=AutoModel.from_pretrained(folder).eval())
    same: list[float] = []
    for _ in range(rounds):
        taken, found = seconds(lambda: inspect_weights(folder))
        ours.append(taken)
        same.append(seconds(lambda: same_findings(folder))[0])
        if watcher is not None:
            with quiet():
                taken, details = seconds(watcher.analyze)
            theirs.append(taken)
    assert found is not None
    measured = [facts for facts in found.matrices if not facts.skipped]
    lost = [facts.name for facts in found.matrices if facts.skipped and len(facts.shape) > 1]
    result: dict[str, Any] = {
        "weights": len(measured),
        "parameters": sum(facts.parameters for facts in measured),
        "tensors of two dimensions left out by us": lost,
        "cpu_seconds": min(ours),
        "cpu_seconds_same_findings": min(same),
    }
    if details is not None and watcher is not None:
        with quiet():
            noise, _ = seconds(lambda: watcher.analyze(mp_fit=True, randomize=True, plot=False))
            small = peer.WeightWatcher(model=nn.Sequential(nn.Embedding(*TABLE), nn.Linear(64, 64))).analyze()
        result |= {
            "weightwatcher": importlib.metadata.version("weightwatcher"),
            "weightwatcher_cpu_seconds": min(theirs),
            "weightwatcher_layers": len(details),
            "speedup": min(theirs) / min(ours),
            "speedup_same_findings": min(theirs) / min(same),
            "weightwatcher_cpu_seconds_with_noise": noise,
            "speedup_with_noise": noise / min(ours),
            f"weightwatcher layers of a model with a table of {TABLE[0]} x {TABLE[1]} and a map": len(small),
        }
    return result


def same_findings(folder: Path) -> None:
    """What WeightWatcher gives at its defaults: norms, ranks, entropy and the best-fitting tail of every weight."""
    for tensor in open_weights(folder).values():
        if not unmeasurable(tensor):
            s = singular_values(tensor)
            spectrum(s)
            power_law(s)


def large(reference: str) -> dict[str, Any]:
    W = spiked(*SHAPE, SPIKES)
    alone, s = seconds(lambda: singular_values(W))
    everything, _ = seconds(lambda: inspect_weights({"weight": W}))
    exact = REFERENCES[reference](W)
    errors = (s.values[0] - exact).abs() / exact
    return {
        "shape": list(SHAPE),
        "cpu_seconds_spectrum": alone,
        "cpu_seconds_standard": everything,
        "reference": reference,
        "largest_relative_error_top_256": float(errors[:SPIKES].max()),
        "largest_relative_error_all": float(errors.max()),
    }


def spiked(m: int, n: int, k: int) -> Tensor:
    """(m, n) float32 noise of variance 1/n with k orthonormal directions of power-law strength on top."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(m, n, generator=generator) / math.sqrt(n)
    left, right = (torch.linalg.qr(torch.randn(side, k, generator=generator)).Q for side in (m, n))
    return W + left * (2 * torch.rand(k, generator=generator).pow(-1 / 3)) @ right.T


def by_gram(W: Tensor) -> Tensor:
    A = W.double()
    return torch.linalg.eigvalsh(A @ A.T).flip(0).clamp_min(0).sqrt()


REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "svdvals": lambda W: torch.linalg.svdvals(W.double()),
    "gram": by_gram,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", choices=list(REFERENCES), default="svdvals")
    options = parser.parse_args()
    torch.set_num_threads(1)
    peer = weightwatcher()
    small = minilm(options.rounds, peer)
    print(f"MiniLM, {small['weights']} weights, one thread, CPU seconds, best of {options.rounds}")
    print(f"  eckart standard       {small['cpu_seconds']:8.2f}")
    if peer is None:
        print("  WeightWatcher is not installed: pip install weightwatcher")
    else:
        print(f"  WeightWatcher {small['weightwatcher']:<7} {small['weightwatcher_cpu_seconds']:8.2f}", end="")
        print(f"   {small['weightwatcher_layers']} of {small['weights']} weights")
        print(f"  ratio                 {small['speedup']:8.1f}   (at least 2)")
        print(f"  eckart, the findings that WeightWatcher gives {small['cpu_seconds_same_findings']:.2f}", end="")
        print(f", ratio {small['speedup_same_findings']:.1f}")
        print(
            f"  WeightWatcher with its comparison to noise {small['weightwatcher_cpu_seconds_with_noise']:.2f}", end=""
        )
        print(f", ratio {small['speedup_with_noise']:.1f}")
    big = large(options.reference)
    print(f"{SHAPE[0]} × {SHAPE[1]}: spectrum {big['cpu_seconds_spectrum']:.1f} s, all of standard ", end="")
    print(f"{big['cpu_seconds_standard']:.1f} s (at most 15); top {SPIKES} right to ", end="")
    print(f"{big['largest_relative_error_top_256']:.1e} (at most 1e-4)")
    result = {
        "minilm": small,
        "large": big,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "targets": TARGETS,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
