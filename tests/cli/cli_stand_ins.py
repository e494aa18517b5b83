"""What the tests of the command line share: the result of a run, and records and verbs that stand in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eckart.records import (
    Claim,
    Evaluation,
    Interval,
    Latency,
    LayerOutcome,
    Outcome,
    Paper,
    Site,
    Size,
    Verdict,
)


@dataclass
class Ran:
    code: int
    out: str
    err: str


SITE = Site(name="layers.0.q", kind="linear", out_features=4, in_features=6, role="q", depth=0)
SMALL, LARGE = Size(parameters=20, bytes=80, macs=20), Size(parameters=24, bytes=96, macs=24)
LAYER = LayerOutcome(
    site=SITE, form="lowrank", rank=2, before=LARGE, after=SMALL, predicted=0.1, held_out=0.12, loss=0.01
)
OUTCOME = Outcome(
    layers=(LAYER,),
    sites_before=LARGE,
    sites_after=SMALL,
    model_before=LARGE,
    model_after=SMALL,
    predicted_loss=0.01,
    method="kfac",
    budget="keep 0.6 (share of the parameters of the compressed sites)",
    seconds=1.5,
)
EVALUATION = Evaluation(
    task="embedding",
    metrics={"cosine": Interval(mean=0.93, low=0.92, high=float("nan"), n=300)},
    protocol={"data": "stdlib:docstrings", "sha256": "ab"},
    model_size=SMALL,
    base_size=LARGE,
    latency=(Latency(batch=1, length=32, model=0.01, base=0.02),),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    rho: float = 0.1


def method(name: str, *needs: str) -> SimpleNamespace:
    claim = Claim(statement=f"{name} wins.", source="Table 1", run=lambda: Verdict(True, {"gap": 0.1}))
    paper = Paper(authors="A", title="T", year=2020)
    return SimpleNamespace(
        name=name,
        summary=f"what {name} does",
        paper=paper,
        needs=frozenset(needs),
        options=Options,
        loss_units=False,
        claim=claim,
    )


METHODS = (method("svd"), method("kfac", "second", "gradient"))


PREVIEW = {
    "steps": ({"site": "layers.0.q", "form": "lowrank", "rank": 2},),
    **{name: asdict(LARGE) for name in ("sites_before", "sites_after", "model_before", "model_after")},
    "moments_bytes": 10_000,
    "peak_memory_bytes": 2_000_000,
    "disk_bytes": 3_000,
    "notes": ("a note",),
}


@dataclass
class Verbs:
    """What the verbs were called with, and what they do instead of working."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    trouble: BaseException | None = None
    verdicts: tuple[bool, ...] = (True, True)
    whole: bool = True

    def call(self, verb: str, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        print("a library that chatters on stdout")
        keywords["progress"]("stage", 1, 2) if "progress" in keywords else None
        self.calls.append((verb, args, {k: v for k, v in keywords.items() if k != "progress"}))
        if self.trouble is not None:
            raise self.trouble

    def asked(self, verb: str) -> dict[str, Any]:
        return next(keywords for name, _, keywords in self.calls if name == verb)


class SavedText:
    def __init__(self, text: str) -> None:
        self.text = text

    def save(self, path: Path) -> None:
        Path(path).write_text(self.text)


class FakeMoments(SavedText):
    fingerprint = "f00d"

    @property
    def meta(self) -> dict[str, Any]:
        return {"tokens": 128}

    def names(self) -> list[str]:
        return ["layers.0.q"]


class FakePlan(SavedText):
    steps = (SimpleNamespace(site="layers.0.q", form="lowrank", rank=2, method="kfac"),)

    def to_json(self) -> dict[str, Any]:
        return {"steps": [{"site": "layers.0.q", "form": "lowrank", "rank": 2}]}
