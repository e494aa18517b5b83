"""Runs that never happened but look like real ones: 36 maps of MiniLM, n maps of a Llama."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

from eckart.records import Evaluation, Interval, Latency, LayerOutcome, Outcome, Site, Size

MINILM = (
    ("attention.self.query", 384, 384),
    ("attention.self.key", 384, 384),
    ("attention.self.value", 384, 384),
    ("attention.output.dense", 384, 384),
    ("intermediate.dense", 1536, 384),
    ("output.dense", 384, 1536),
)
LLAMA = (
    ("self_attn.q_proj", 512, 512),
    ("self_attn.k_proj", 128, 512),
    ("self_attn.v_proj", 128, 512),
    ("self_attn.o_proj", 512, 512),
    ("mlp.gate_proj", 1376, 512),
    ("mlp.up_proj", 1376, 512),
    ("mlp.down_proj", 512, 1376),
)
CERTIFICATE = SimpleNamespace(
    predicted=0.0516,
    measured=Interval(mean=0.0676, low=0.0643, high=0.0711, n=300),
    ratio=1.31,
    warning=None,
    quantity="1 − cosine, per sentence",
)


def curve(full: int, decay: float, points: int = 64) -> list[float]:
    """Relative error of a spectrum that falls like a power, rank 0 to full."""
    energies = [(i + 1) ** -decay for i in range(full)]
    total = sum(energies)
    left, tails = total, [1.0]
    for energy in energies:
        left -= energy
        tails.append(max(0.0, left / total))
    return [tails[round(i * full / (points - 1))] for i in range(points)]


def size(numbers: int, bias: int) -> Size:
    return Size(parameters=numbers + bias, bytes=4 * (numbers + bias), macs=numbers)


def run(roles, prefix: str, blocks: int, embedding: int, *, hostile: str = "", seed: int = 0):
    """(outcome, curves by site name)."""
    draw = random.Random(seed)
    layers, curves = [], {}
    for depth in range(blocks):
        for role, m, n in roles:
            site = Site(
                name=f"{prefix}.{depth}.{role}{hostile}",
                kind="linear",
                out_features=m,
                in_features=n,
                bias=True,
                role=role + hostile,
                depth=depth,
            )
            full = site.full_rank
            steep = 0.5 if role.endswith(("query", "key", "q_proj", "k_proj")) else 0.0
            decay = 1.1 + 0.9 * draw.random() + steep
            errors = curves[site.name] = curve(full, decay)
            form = draw.choices(["dense", "pivoted", "lowrank"], [9, 78, 13])[0]
            middle = 0.78 - 0.17 * decay + 0.25 * math.sin(depth / blocks * 3)
            share = min(0.95, max(0.12, draw.gauss(middle, 0.09)))
            gain = 1.25 if form == "pivoted" else 1.0
            rank = full if form == "dense" else min(full, max(1, int(share * m * n / (m + n) * gain)))
            numbers = {"dense": m * n, "lowrank": rank * (m + n), "pivoted": rank * (m + n - rank)}[form]
            error = 0.0 if form == "dense" else errors[round(rank / full * 63)]
            unlucky = 2.4 if draw.random() < 0.05 else 1.0
            layers.append(
                LayerOutcome(
                    site=site,
                    form=form,
                    rank=rank,
                    before=size(m * n, m),
                    after=size(numbers, m),
                    predicted=error,
                    held_out=None if form == "dense" else error * draw.uniform(1.02, 1.35) * unlucky,
                    loss=None if form == "dense" else error * draw.uniform(0.001, 0.03),
                )
            )
    nothing = Size(parameters=0, bytes=0, macs=0)
    before = sum((layer.before for layer in layers), nothing)
    after = sum((layer.after for layer in layers), nothing)
    rest = Size(parameters=embedding, bytes=4 * embedding, macs=0)
    asked = math.ceil(1000 * after.parameters / before.parameters + 0.2) / 1000
    outcome = Outcome(
        layers=tuple(layers),
        sites_before=before,
        sites_after=after,
        model_before=before + rest,
        model_after=after + rest,
        predicted_loss=sum(layer.loss or 0 for layer in layers),
        method="kfac",
        budget=f"keep {asked:g} (share of the parameters of the compressed sites)",
        seconds=41.3,
    )
    return outcome, curves


def minilm(**changes):
    return run(MINILM, "encoder.layer", 6, 11_900_000, **changes)


def llama(blocks: int = 4, **changes):
    return run(LLAMA, "model.layers", blocks, 4_100_000, **changes)


def sentence_evaluation(outcome: Outcome) -> Evaluation:
    return Evaluation(
        task="embedding",
        metrics={
            "cosine": Interval(mean=0.9324, low=0.9289, high=0.9357, n=300),
            "neighbours@10": Interval(mean=0.741, low=0.722, high=0.759, n=300),
            "rank_correlation": Interval(mean=0.921, low=0.913, high=0.928, n=300),
        },
        protocol={
            "data": "stdlib:docstrings, part evaluation",
            "sha256": "9f2c6a01d4e8b7735ac1",
            "window": 128,
            "unit": "sentence",
            "tokenizer": "BertTokenizerFast",
            "pooling": "mean, normalised",
        },
        model_size=outcome.model_after,
        base_size=outcome.model_before,
        disk_bytes={"model": outcome.model_after.bytes + 9000, "base": outcome.model_before.bytes + 8000},
        latency=(
            Latency(batch=1, length=64, model=0.0082, base=0.0091),
            Latency(batch=32, length=64, model=0.1604, base=0.2411),
        ),
    )


def language_evaluation(outcome: Outcome) -> Evaluation:
    return Evaluation(
        task="causal-lm",
        metrics={
            "bits_per_byte": Interval(mean=1.0812, low=1.0641, high=1.0987, n=240, unit="bits per byte"),
            "bits_per_byte_base": Interval(mean=1.0203, low=1.0038, high=1.0371, n=240, unit="bits per byte"),
            "loss_rise": Interval(mean=0.1631, low=0.1544, high=0.1718, n=240, unit="nats per token"),
            "kl": Interval(mean=0.1498, low=0.1421, high=0.1579, n=240, unit="nats per token"),
        },
        protocol={
            "data": "stdlib:source, part evaluation",
            "sha256": "51b0c2",
            "window": 256,
            "stride": 256,
            "unit": "window",
        },
        model_size=outcome.model_after,
        base_size=outcome.model_before,
        latency=(Latency(batch=1, length=128, model=0.0312, base=0.0305),),
        warnings=("Only 61,440 tokens were evaluated; the interval is wide.",),
    )
