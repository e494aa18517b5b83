"""Every adaptation method against tuned LoRA at the same number of trained parameters, on the CPU.

    python benchmarks/adapt.py [--methods lora,soka] [--seeds 5] [--work DIR]

The question of each example: from which of ten packages is this docstring? Names of code are masked, and a file's
docstrings are either trained or tested on. MiniLM-L6 with the activations before its last two layers computed once;
those two layers (12 linear maps) are adapted, and a head of ten classes is trained beside the adapter, always at the
same learning rate. Every example is trained on once, so that the training loss of the last 20 batches is a loss on
unseen examples, though of files from which others were trained on: by it each method takes the best of four learning
rates, seed by seed, and of the next ones beyond as long as the best is the first or the last (at most three more). Then
the test loss of that one, on other files. Seeds set the order of the examples, the head and the adapter's start; they
are the same for all methods, so that losses are compared in pairs. Intervals are 95 %: of the test loss from a
bootstrap over documents and seeds, of the training loss from Student's t over seeds.

Ranks are uniform, the highest with at most 1 % more parameters than LoRA of rank 4, where a method has that many.
LoRA has α = r: under AdamW another α is nearly another learning rate (α = 4 r was tried on one seed, 1.3182 against
1.3161 of test loss).

Results go to benchmarks/results/adapt.json after every method and seed; what is there is not computed again. Losses by
document and the activations lie in a folder of their own (--work), about 350 MB.
"""

from __future__ import annotations

import argparse
import ast
import functools
import gc
import importlib.util
import inspect
import json
import math
import platform
import random
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import eckart
from eckart.adaptation import ADAPTATIONS, Layout, adapt_options, get_adaptation
from eckart.arch import find_sites
from eckart.data.sentences import sentences
from eckart.errors import EckartWarning
from eckart.evaluation.bootstrap import resample
from eckart.hf.adapters.tuner import adapter_layers, after_step, penalty
from eckart.hf.models import load_model
from eckart.moments import Moments, collect
from eckart.verbs.demo import minilm_folder

PACKAGES = (
    *("torch", "transformers", "numpy", "scipy", "sklearn"),
    *("sympy", "pandas", "networkx", "huggingface_hub", "pydantic"),
)
TRAIN, TEST = 192, 210
"""Documents of each package."""
LENGTH, BATCH, STEPS = 24, 16, 120
"""Tokens of a document at most; documents per step; steps, which use up the training documents once."""
LAYERS = 2
HEAD_RATE = 1e-2
LAST = 20
RATES, MORE = (1e-3, 3e-3, 1e-2, 3e-2), 3
LADDER = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3))
MAPS = r"layers\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
RESULTS = Path(__file__).parent / "results" / "adapt.json"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table."""

    method: str | None
    """None: no adapter."""
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: bool = False
    """Ranks by the method's own spread of a budget, instead of one for all maps."""
    full: bool = False
    """All weights of the layers are trained."""


VARIANTS: dict[str, Variant] = {
    "head only": Variant(method=None),
    "lora": Variant(method="lora"),
    **{name: Variant(method=name, budget=name == "eva") for name in ADAPTATIONS if name != "lora"},
    "all weights": Variant(method=None, full=True),
}


@dataclass(frozen=True, eq=False)
class Data:
    """Activations (n, LENGTH, width), their masks and labels."""

    hidden: Tensor
    mask: Tensor
    label: Tensor

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        mask = self.mask[rows]
        width = int(mask.sum(1).max())
        hidden = self.hidden[rows, :width].float()
        return {"hidden": hidden, "attention_mask": mask[:, :width].long()}, self.label[rows]


class Tail(nn.Module):
    """The last layers of MiniLM, the mean over tokens, and a head."""

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(width, len(PACKAGES))

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        blocked = torch.zeros(attention_mask.shape).masked_fill(attention_mask == 0, torch.finfo(torch.float32).min)
        for layer in self.layers:
            found = layer(hidden, blocked[:, None, None, :])
            hidden = found if isinstance(found, Tensor) else found[0]
        weights = attention_mask.float().unsqueeze(-1)
        return self.head((hidden * weights).sum(1) / weights.sum(1))  # type: ignore[no-any-return]


def masked(text: str) -> str:
    """The text without what looks like a name of code, and without names of packages."""
    text = re.sub(r"[`*]+", "", text)
    text = re.sub(r"\S*[_./\\<>=(){}\[\]@#:]\S+|\S*[a-z][A-Z]\S*|\S*\d\S*", "thing", text)
    return re.sub(
        r"(?i)\b(py)?(" + "|".join((*PACKAGES, "hugging face", "scikit-learn", "hub")) + r")\w*", "thing", text
    )


def documents(package: str) -> Iterator[tuple[str, str]]:
    """(file, text) of the docstrings of a package: their first two sentences, masked."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the benchmark reads the docstrings of {package}: pip install {package}")
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if {"tests", "test", "testing", "_vendor"} & set(inside.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node, clean=False) or ""
                found = " ".join(list(sentences(inspect.cleandoc(docstring)))[:2])
                if found:
                    yield f"{package}/{inside.as_posix()}", masked(found)


def examples() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Training and test examples (text, label), as many of every package, drawn with a fixed seed.

    Two files in five are tested on. A text that occurs twice, in whatever package, is used at its first place only.
    """
    seen: set[str] = set()
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for label, package in enumerate(PACKAGES):
        parts: tuple[list[str], list[str]] = ([], [])
        for file, text in documents(package):
            words = " ".join(re.findall(r"\w+", text.casefold()))
            if words not in seen:
                seen.add(words)
                parts[sha256(file.encode()).digest()[0] % 5 < 2].append(text)
        for part, wanted, into in ((parts[0], TRAIN, train), (parts[1], TEST, test)):
            if len(part) < wanted:
                raise SystemExit(f"{package} has {len(part)} documents for a part, {wanted} are needed")
            into += [(text, label) for text in random.Random(label).sample(part, wanted)]
    return train, test


@functools.cache
def base() -> Any:
    return load_model(minilm_folder()).model.eval()


def activations(work: Path) -> tuple[Data, Data]:
    """Of the training and the test documents before the last layers, from the work folder where they are there."""
    file = work / "activations.safetensors"
    if not file.is_file():
        tokenizer = load_model(minilm_folder()).tokenizer
        model, tensors = base(), {}
        for name, found in zip(("train", "test"), examples(), strict=True):
            texts = [text for text, _ in found]
            tokens = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
            parts = []
            with torch.inference_mode():
                for i in range(0, len(texts), 64):
                    batch = {k: tokens[k][i : i + 64] for k in ("input_ids", "attention_mask")}
                    states = model(**batch, output_hidden_states=True).hidden_states
                    parts.append(states[-1 - LAYERS].half())
            tensors |= {f"{name}.hidden": torch.cat(parts), f"{name}.mask": tokens["attention_mask"].bool()}
            tensors[f"{name}.label"] = torch.tensor([label for _, label in found])
        save_file(tensors, file)
    kept = load_file(file)
    train, test = (
        Data(*(kept[f"{name}.{part}"] for part in ("hidden", "mask", "label"))) for name in ("train", "test")
    )
    return train, test


def tail(seed: int) -> Tail:
    """A fresh copy of the last layers, frozen, with a head drawn with ``seed``."""
    torch.manual_seed(seed)
    encoder = base().encoder.layer
    layers = nn.ModuleList([type(encoder[0])(base().config, *_index(encoder[0], i)) for i in range(LAYERS)])
    model = Tail(layers, base().config.hidden_size).eval()
    layers.load_state_dict(nn.ModuleList(encoder[-LAYERS:]).state_dict())
    layers.requires_grad_(False)
    nn.init.normal_(model.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(model.head.bias)
    return model


def _index(layer: nn.Module, i: int) -> tuple[int, ...]:
    return (i,) if "layer_idx" in inspect.signature(type(layer).__init__).parameters else ()


@functools.cache
def moments_of(work: Path) -> Moments:
    """Of the inputs of the maps, on the training documents."""
    train, _ = activations(work)
    model = tail(0)
    batches = [train.batch(torch.arange(i, i + 64))[0] for i in range(0, 1024, 64)]
    return collect(model, batches, find_sites(model), gradients="none")


def layouts() -> list[Layout]:
    return [
        Layout(name=site.name, kind=site.kind, out_features=site.out_features, in_features=site.in_features)
        for site in find_sites(tail(0))
    ]


def cost(variant: Variant, rank: int) -> int:
    """Numbers to train at one rank for all maps, shared ones counted once; at most what each of them has."""
    method = get_adaptation(str(variant.method))
    options = adapt_options(method, variant.options)
    with torch.device("meta"):
        deltas = [method.delta(at, min(rank, method.delta.most(at, options)), options) for at in layouts()]
        if method.tie is not None:
            method.tie(deltas)
    return sum({id(p): p.numel() for delta in deltas for p in delta.parameters()}.values())


def rank_for(variant: Variant, allowed: int) -> int:
    """The highest uniform rank whose numbers are at most ``allowed``; the largest one that all maps can have."""
    method = get_adaptation(str(variant.method))
    options = adapt_options(method, variant.options)
    low, high = 1, min(method.delta.most(at, options) for at in layouts())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(variant, middle) <= allowed else (low, middle - 1)
    return low


def build(variant: Variant, seed: int, work: Path) -> tuple[nn.Module, Tail, float]:
    """The model to train, its tail, and the CPU seconds that the adapter's start took."""
    model = tail(seed)
    if variant.method is None:
        model.layers.requires_grad_(variant.full)
        return model, model, 0.0
    needs = get_adaptation(variant.method).needs
    moments = moments_of(work) if needs else None
    at = {"budget": eckart.Budget(parameters=ALLOWED)} if variant.budget else {"r": rank_for(variant, ALLOWED)}
    config = eckart.AdapterConfig(
        method=variant.method, target_modules=MAPS, options=dict(variant.options), seed=seed, moments=moments, **at
    )
    start = time.process_time()
    adapted = get_peft_model(model, config)
    seconds = time.process_time() - start
    model.head.requires_grad_(True)
    return adapted, model, seconds


ALLOWED = 55_296 + 552
"""LoRA of rank 4 on the 12 maps, and 1 %."""


def train_once(model: nn.Module, head: nn.Module, data: Data, rate: float, head_rate: float, seed: int) -> list[float]:
    """Losses of the steps; the last one may be NaN where training broke."""
    own = {id(p) for p in head.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [{"params": list(head.parameters()), "rate": head_rate}]
    groups += [{"params": rest, "rate": rate}] if rest else []
    optimizer = torch.optim.AdamW(groups, lr=head_rate, weight_decay=0.0)
    order = torch.randperm(len(data.label), generator=torch.Generator().manual_seed(seed))
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / 12) * (1 - step / STEPS)
        batch, label = data.batch(order[step * BATCH : (step + 1) * BATCH])
        loss = cross_entropy(model(**batch), label)
        losses.append(float(loss.detach()))
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        torch.autograd.backward(loss + penalty(model))
        optimizer.step()
        after_step(model, step + 1)
    return losses


@torch.inference_mode()
def test_losses(model: nn.Module, data: Data) -> tuple[Tensor, float]:
    """(n,) losses by document, and the accuracy."""
    order = data.mask.sum(1).argsort()
    losses, right = torch.empty(len(order)), 0
    for rows in order.split(64):
        batch, label = data.batch(rows)
        logits = model(**batch)
        losses[rows] = cross_entropy(logits, label, reduction="none")
        right += int((logits.argmax(1) == label).sum())
    return losses, right / len(order)


def run(name: str, seed: int, work: Path) -> dict[str, Any]:
    """One method and one seed: four learning rates, the best of them tested. Losses by document go to ``work``."""
    variant = VARIANTS[name]
    train, test = activations(work)
    model, inner, init = build(variant, seed, work)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    best: tuple[float, dict[str, Tensor]] | None = None
    tried: dict[float, float | None] = {}
    milliseconds = []
    while (rate := next_rate(rates_of(name), tried)) is not None:
        model.load_state_dict(start)
        before = time.process_time()
        losses = train_once(model, inner.head, train, rate, rate if name == "head only" else HEAD_RATE, seed)
        milliseconds.append(1000 * (time.process_time() - before) / len(losses))
        whole = len(losses) == STEPS and all(map(math.isfinite, losses))
        tried[rate] = found = statistics.fmean(losses[-LAST:]) if whole else None
        if found is not None and (best is None or found < best[0]):
            best = (found, {k: v.clone() for k, v in model.state_dict().items()})
    if best is None:
        raise SystemExit(f"{name}: the loss was never finite at {sorted(tried)}")
    model.load_state_dict(best[1])
    losses, accuracy = test_losses(model, test)
    save_file({"losses": losses}, work / f"{_file(name)}-{seed}.safetensors")
    head = {id(p) for p in inner.head.parameters()}
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad and id(p) not in head}
    chosen = best_rate(tried)
    ranks = sorted({delta.rank for _, layer in adapter_layers(model) for delta in layer.eckart_delta.values()})
    return {
        "test_loss": float(losses.double().mean()),
        "accuracy": accuracy,
        "train_loss": best[0],
        "rate": chosen,
        "rate_at_edge": chosen in (min(tried), max(tried)),
        "train_loss_by_rate": {f"{rate:g}": tried[rate] for rate in sorted(tried)},
        "parameters": sum(trained.values()),
        "ranks": ranks if len(ranks) < 5 else [ranks[0], ranks[-1]],
        "bytes": shipped(model) if variant.method is not None else 4 * sum(trained.values()),
        "ms_per_step": statistics.median(milliseconds),
        "init_seconds": init,
    }


def rates_of(name: str) -> tuple[float, ...]:
    """The four that are always tried."""
    if name == "head only":
        return (3e-3, 1e-2, 3e-2, 1e-1)
    return (1e-4, 3e-4, 1e-3, 3e-3) if name == "all weights" else RATES


def best_rate(tried: Mapping[float, float | None]) -> float:
    return min(tried, key=lambda rate: math.inf if (loss := tried[rate]) is None else loss)


def next_rate(first: Sequence[float], tried: Mapping[float, float | None]) -> float | None:
    """The next rate to try; None where the best one lies between others, or enough were tried."""
    for rate in first:
        if rate not in tried:
            return rate
    known = sorted(tried)
    step = {known[0]: -1, known[-1]: 1}.get(best_rate(tried))
    if step is None or len(tried) >= len(first) + MORE:
        return None
    place = LADDER.index(best_rate(tried)) + step
    return LADDER[place] if 0 <= place < len(LADDER) else None


def shipped(model: Any) -> int:
    """Bytes of the weights file of the saved adapter."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _file(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Mean of ours − theirs, both (seeds, documents), with a 95 % interval over resampled documents and seeds."""
    D = (ours - theirs).double()
    rows, columns = resample(D.shape[0], seed=0), resample(D.shape[1], seed=1)
    drawn = ((rows @ D) * columns).sum(1) / D.numel()
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(D.mean()), "low": low, "high": high, "by_seed": [round(v, 4) for v in D.mean(1).tolist()]}


T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % point of Student's t by the number of values."""


def compare_training(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mean of ours − theirs, by seed, with a 95 % interval."""
    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, half = statistics.fmean(d), T[len(d)] * statistics.stdev(d) / math.sqrt(len(d))
    return {"mean": mean, "low": mean - half, "high": mean + half, "by_seed": [round(v, 4) for v in d]}


def summary(runs: Mapping[str, Mapping[str, Any]], work: Path) -> dict[str, Any]:
    """Rows of means over the seeds that all of a row's comparison have, and differences to the better LoRA."""
    rows: dict[str, Any] = {}
    for name, by_seed in runs.items():
        found = list(by_seed.values())
        keys = ("test_loss", "accuracy", "train_loss", "parameters", "bytes", "ms_per_step", "init_seconds")
        rows[name] = {key: statistics.fmean(run[key] for run in found) for key in keys}
        rows[name] |= {"seeds": len(found), "rates": sorted({run["rate"] for run in found}), "ranks": found[0]["ranks"]}
    tuned = "lora"
    for name, row in rows.items():
        seeds = [seed for seed in runs[name] if seed in runs.get(tuned, ()) and name != tuned]
        files = [(work / f"{_file(n)}-{seed}.safetensors") for n in (name, tuned) for seed in seeds]
        if len(seeds) < 2 or not all(file.is_file() for file in files):
            continue
        losses = [load_file(file)["losses"] for file in files]
        own, other = ([runs[n][seed]["train_loss"] for seed in seeds] for n in (name, tuned))
        row["training_against_lora"] = compare_training(own, other)
        row["against_lora"] = compare(torch.stack(losses[: len(seeds)]), torch.stack(losses[len(seeds) :]))
    return {"rows": rows}


def table(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{'method':16s}{'trained':>9s}{'bytes':>10s}{'ms/step':>9s}{'init s':>8s}{'acc.':>7s}{'test':>8s}"
        f"{'− tuned LoRA (95 %)':>29s}{'train':>9s}{'− tuned LoRA (95 %)':>29s}"
    )
    for name, row in sorted(result["rows"].items(), key=lambda item: item[1]["test_loss"]):
        yield (
            f"{name:16s}{row['parameters']:9,.0f}{row['bytes']:10,.0f}{row['ms_per_step']:9.1f}"
            f"{row['init_seconds']:8.2f}{row['accuracy']:7.3f}{row['test_loss']:8.4f}"
            f"{_shown(row.get('against_lora'))}{row['train_loss']:9.4f}{_shown(row.get('training_against_lora'))}"
            f"   rates {', '.join(f'{rate:g}' for rate in row['rates'])}; seeds {row['seeds']}"
        )


def _shown(d: Mapping[str, float] | None) -> str:
    return " " * 29 if d is None else f"{d['mean']:+11.4f} ({d['low']:+.4f}, {d['high']:+.4f})"


def verdicts(result: Mapping[str, Any]) -> Iterator[str]:
    """What holds and what does not, at equal trained parameters or fewer."""
    rows = {
        name: row
        for name, row in result["rows"].items()
        if row.get("against_lora") and (variant := VARIANTS.get(name)) and variant.method not in (None, "lora")
    }
    for words, key in (("test loss", "against_lora"), ("loss of the last training batches", "training_against_lora")):
        better = [name for name, row in rows.items() if row[key]["high"] < 0]
        worse = [name for name, row in rows.items() if row[key]["low"] > 0]
        held = "holds" if better else "DOES NOT HOLD"
        yield f"{held}: a lower {words} than tuned LoRA's, outside of the interval: {', '.join(better) or 'none'}"
        yield f"  not told apart: {', '.join(n for n in rows if n not in better and n not in worse) or 'none'}"
        yield f"  higher, outside of the interval: {', '.join(worse) or 'none'}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="", help="rows, separated by semicolons or commas; all by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="100 for a pilot, which is not written")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "eckart-benchmark-adapt")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.work.mkdir(parents=True, exist_ok=True)
    names = [n for n in VARIANTS if not given.methods or n in re.split(r";\s*|,(?! )", given.methods)]
    pilot = given.first_seed != 0
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() and not pilot else {"runs": {}}
    settings = {
        "packages": list(PACKAGES),
        "train_documents": TRAIN * len(PACKAGES),
        "test_documents": TEST * len(PACKAGES),
        "tokens": LENGTH,
        "batch": BATCH,
        "steps": STEPS,
        "head_rate": HEAD_RATE,
        "allowed_parameters": ALLOWED,
    }
    if kept["runs"] and kept["settings"] != settings:
        raise SystemExit(f"{RESULTS} holds results of other settings; move it away first")
    runs: dict[str, dict[str, Any]] = kept["runs"]
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for name in names:
            there = runs.setdefault(name, {})
            if str(seed) in there and (given.work / f"{_file(name)}-{seed}.safetensors").is_file():
                continue
            there[str(seed)] = run(name, seed, given.work)
            shown = there[str(seed)]
            print(
                f"{name}, seed {seed}: test {shown['test_loss']:.4f}, train {shown['train_loss_by_rate']}, "
                f"{shown['parameters']:,} trained, ranks {shown['ranks']}, {shown['ms_per_step']:.0f} ms/step",
                flush=True,
            )
            gc.collect()
            if not pilot:
                result = {
                    "what": "ten-way classification of masked docstrings, last two layers of MiniLM-L6 adapted; test "
                    "loss in nats per document, differences paired by document and seed, 95 % bootstrap intervals "
                    "over documents and seeds",
                    "settings": settings,
                    **summary({n: runs[n] for n in VARIANTS if n in runs}, given.work),
                    "runs": runs,
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                }
                RESULTS.write_text(json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n", "utf-8")
    result = summary({n: runs[n] for n in VARIANTS if n in runs}, given.work)
    print("\n".join([*table(result), *verdicts(result)]))


if __name__ == "__main__":
    main()
