"""Inspections that never happened but look like real ones: MiniLM, and a model of 7 B parameters."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from eckart.inspection.record import Inspection, MatrixFacts, Observation, Panel, Tier
from eckart.records import Finding

MINILM = (
    ("attention.self.query", 384, 384),
    ("attention.self.key", 384, 384),
    ("attention.self.value", 384, 384),
    ("attention.output.dense", 384, 384),
    ("intermediate.dense", 1536, 384),
    ("output.dense", 384, 1536),
)
SEVEN_BILLION = (
    *((f"self_attn.{letter}_proj", 4096, 4096) for letter in "qkvo"),
    *((f"mlp.{name}_proj", 11008, 4096) for name in ("gate", "up")),
    ("mlp.down_proj", 4096, 11008),
)


def spectrum(m: int, n: int, spikes: int, strength: float) -> tuple[list[int], list[float], list[float], list[float]]:
    """Places, σ, σ of noise and energy: noise of (m, n), the first ``spikes`` of its values raised."""
    p = min(m, n)
    noise = [(math.sqrt(max(m, n)) + math.sqrt(p) * math.cos(math.pi * (i + 0.5) / p)) * 0.02 for i in range(p)]
    if m == n:
        noise = [0.04 * math.sqrt(p) * math.cos(math.pi * (i + 0.5) / (2 * p)) for i in range(p)]
    sigma = [v * (1 + strength * (i + 1) ** -0.6) if i < spikes else v for i, v in enumerate(noise)]
    total, held, energy = sum(v * v for v in sigma), 0.0, []
    for v in sigma:
        held += v * v
        energy.append(held / total)
    places = sorted({*range(min(p, 40)), *(round(i * (p - 1) / 159) for i in range(160))})
    return places, sigma, noise, energy


def matrix(name: str, role: str, depth: int | None, m: int, n: int, seed: int, tier: Tier = "standard") -> MatrixFacts:
    draw = random.Random(seed)
    strength, spikes = draw.uniform(0.5, 6), draw.randrange(2, min(m, n) // 3)
    places, sigma, noise, energy = spectrum(m, n, spikes, strength)

    def exact(name: str, value: float, **more) -> Finding:
        return Finding(name=name, value=value, uncertainty=0, n=min(m, n), **more)

    squares = [v * v for v in sigma]
    found = [
        exact("frobenius", math.sqrt(sum(squares))),
        exact("spectral_norm", sigma[0]),
        exact("stable_rank", sum(squares) / squares[0]),
        exact("participation_ratio", sum(squares) ** 2 / sum(v * v for v in squares)),
        *(exact(f"rank_{k}", 1 + next(i for i, e in enumerate(energy) if e >= k / 100)) for k in (90, 95, 99)),
        exact("break_even_rank", m * n / (m + n)),
        Finding(name="spikes", value=spikes, n=min(m, n)),
        Finding(name="bulk_fit", value=draw.random(), n=min(m, n)),
        Finding(
            name="distance_from_noise",
            value=draw.gauss(-0.2, 0.3),
            uncertainty=0.12,
            n=min(m, n) // 2,
            notes=("the tail starts at the median",),
        ),
        exact("condition_number", sigma[0] / sigma[-1], at_least=True, notes=("below the resolution",)),
    ]
    if tier == "quick":
        found = [f for f in found if f.name in ("frobenius", "spectral_norm", "stable_rank", "distance_from_noise")]
    return MatrixFacts(
        name=name,
        shape=(m, n),
        out_features=m,
        in_features=n,
        dtype="float32",
        parameters=m * n,
        bytes=4 * m * n,
        role=role,
        depth=depth,
        findings={f.name: f for f in found},
        singular_values=() if tier == "quick" else tuple(sigma[i] for i in places),
        places=() if tier == "quick" else tuple(places),
        noise=() if tier == "quick" else tuple(noise[i] for i in places),
        energy=() if tier == "quick" else tuple(energy[i] for i in places),
        seconds=0.1,
    )


def vector(name: str, n: int) -> MatrixFacts:
    return MatrixFacts(name=name, shape=(n,), dtype="float32", parameters=n, bytes=4 * n, skipped="1-D: no spectrum")


def inspection(
    roles: Sequence[tuple[str, int, int]],
    prefix: str,
    blocks: int,
    *,
    table: tuple[str, int, int] | None = None,
    tier: Tier = "standard",
    title: str = "all-MiniLM-L6-v2",
    hostile: str = "",
    panels: tuple[Panel, ...] = (),
) -> Inspection:
    """``blocks`` blocks of the roles, an embedding table, and a vector in each block."""
    found = [matrix(table[0], "", None, *table[1:], 0, tier)] if table else []
    for depth in range(blocks):
        for i, (role, m, n) in enumerate(roles):
            name = f"{prefix}.{depth}.{role}{hostile}.weight"
            found.append(matrix(name, role + hostile, depth, m, n, 7 * depth + i, tier))
        found.append(vector(f"{prefix}.{depth}.norm{hostile}.weight", roles[0][2]))
    names = [facts.name for facts in found if not facts.skipped]
    return Inspection(
        title=title,
        source=f"/models/{title}",
        tier=tier,
        matrices=tuple(found),
        observations=observations(names),
        panels=panels,
        meta={
            "file": f"{title}/model.safetensors",
            "dtype": "float32",
            "hash": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "date": "2026-11-27",
            "version": "0.1.0",
            "seconds": 12.4,
            "command": f"eckart inspect {title} -o report.html",
        },
    )


def observations(names: Sequence[str]) -> tuple[Observation, ...]:
    kinds = ("broken", "warning", "warning", "advice", "advice", "advice", "advice", "good", "good")
    return tuple(
        Observation(
            severity=kind,  # type: ignore[arg-type]
            claim=f"`{names[(5 * i) % len(names)]}`: 98 % of the bulk fits noise.",
            number="noise edge 3.1, 4 spikes",
            why="Rank 4 keeps 12 % of the energy; what is left cannot be told from noise of the same shape.",
            command="" if kind == "good" else f"eckart compress MODEL --include '*.{5 * i}.*' --keep 0.6 -o OUT",
            matrices=(names[(5 * i) % len(names)],) if i else tuple(names[:3]),
        )
        for i, kind in enumerate(kinds)
    )


PANELS = (
    Panel(
        title="Rank of the activations",
        words="How many directions the inputs of each block use, over 4,096 tokens of `stdlib:docstrings`.",
        findings=(Finding(name="effective_rank", value=123.4, uncertainty=2.1, n=4096),),
        curves={
            "attention.self.query": tuple((i, 40 + 12 * i) for i in range(6)),
            "intermediate.dense": tuple((i, 60 + 10 * i - i * i) for i in range(6)),
            "output.dense": tuple((i, 200 - 9 * i) for i in range(6)),
        },
        x="block",
        y="effective rank",
    ),
    Panel(
        title="Dimension over scale",
        words="Intrinsic dimension of the points, by subsamples.",
        findings=(Finding(name="two_nn", value=15.2, at_least=True, n=2000, notes=("3 duplicates dropped",)),),
        curves={"TwoNN": ((125, 9.0), (250, 10.0), (500, 11.5), (1000, 13.0), (2000, 15.2))},
        x="points",
        y="dimension",
    ),
)


def minilm(**changes) -> Inspection:
    return inspection(
        MINILM, "encoder.layer", 6, **{"table": ("embeddings.word_embeddings.weight", 30522, 384), **changes}
    )


def seven_billion(blocks: int = 32, **changes) -> Inspection:
    """The shapes of a model of 7 B parameters, with made-up spectra."""
    return inspection(SEVEN_BILLION, "model.layers", blocks, **{"title": "a model of 7 B", **changes})
