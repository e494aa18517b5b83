"""What calibrating MiniLM holds in memory, against the moments and one batch.

    python benchmarks/memory.py

Runs in a process of its own: peak resident memory during the calibration of ``eckart compress``, less what the loaded
model takes (measured after one forward pass), beside the bytes of the moments and of one batch with its activations.
``eckart calibrate`` also collects the sums of the Fisher information, for which it keeps the inputs of a batch.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path

import torch

from eckart.arch import find_sites
from eckart.data import read_texts
from eckart.hf.batches import text_batches
from eckart.hf.tasks import loss_for
from eckart.verbs.calibrate import calibrate_sites
from eckart.verbs.demo import minilm_folder
from eckart.verbs.models import as_loaded

SAMPLES, BATCH = 512, 16


def peak() -> float:
    """Peak resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    torch.set_num_threads(1)
    loaded = as_loaded(minilm_folder())
    texts = read_texts("stdlib:docstrings", limit=SAMPLES).texts
    batches = text_batches(loaded, texts, batch_size=BATCH).batches
    with torch.inference_mode():
        loaded.model(**{name: value[:1] for name, value in batches[0].items()})
    start = peak()
    widest = batches[-1]
    outputs = loaded.model(**widest)
    loss, _ = loss_for(loaded)(outputs, widest, torch.Generator().manual_seed(0))
    loss.backward()
    loaded.model.zero_grad(set_to_none=True)
    del outputs, loss
    one_batch = peak() - start
    moments = calibrate_sites(loaded, find_sites(loaded.model), batches, fisher=False)
    reached = peak() - start
    path = Path("moments-of-the-memory-benchmark.safetensors")
    moments.save(path)
    # The file packs symmetric matrices; in memory they are square.
    size = 2 * path.stat().st_size / 1e6
    path.unlink()
    result = {
        "peak_mb": round(reached, 1),
        "moments_mb": round(size, 1),
        "batch_mb": round(one_batch, 1),
    }
    print(json.dumps(result, indent=2))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "memory.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
