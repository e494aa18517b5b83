"""``eckart.convert``: an adapter as plain LoRA, or merged into its base."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from eckart.checkpoint import MANIFEST, atomic_folder
from eckart.errors import EckartError, FileError, InputError, problems, unknown
from eckart.hf.adapter_files import WEIGHTS
from eckart.hf.adapters.config import AdapterConfig
from eckart.hf.adapters.convert import Nearest, attach, exact_factors, lost, outputs, read_config
from eckart.hf.adapters.export import LoraFactors, other_tensors, write_factors
from eckart.hf.batches import text_batches
from eckart.hf.classifier import load_classifier
from eckart.hf.models import LoadedModel, first_parameter
from eckart.records import Progress, silent
from eckart.verbs.models import ModelLike, as_loaded, as_texts, pieces

ConvertTo = Literal["lora", "merged"]
MAX_RANK = 64
"""Highest rank of an approximation. vLLM's own limit is 16 unless it is started with --max-lora-rank."""
RANKS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Those that are tried, as servers know them."""
ROUNDING = 1e-4
"""Relative error of the outputs that float32 alone makes; above it an exact export is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written."""

    folder: Path
    to: ConvertTo
    exact: bool
    """Whether the method is that form; else it is the nearest one by truncated SVD."""
    rank: int | None
    """Of all layers, filled up with zeros where one needs less; None for a merged model."""
    error: float
    """Measured on outputs: ‖converted − adapted‖ / ‖adapted − base‖."""
    weight_errors: Mapping[str, float]
    """‖ΔW − BA‖_F / ‖ΔW‖_F of every layer, where it is approximated."""
    tried: Mapping[int, float]
    """Errors by rank."""
    measured_on: str
    bytes: int


def convert(
    adapter: str | os.PathLike[str],
    to: ConvertTo,
    output: str | os.PathLike[str],
    *,
    base: ModelLike | None = None,
    tokenizer: Any = None,
    max_error: float = 0.05,
    rank: int | None = None,
    data: str | os.PathLike[str] | Sequence[str] | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: Progress = silent,
) -> Converted:
    """Write an adapter of Eckart as a plain LoRA (one rank, α = r, for stock PEFT and vLLM), or merged into its base.

    Args:
        adapter: folder that ``save_pretrained`` or ``eckart adapt`` wrote.
        to: ``lora``, or ``merged`` for the whole model with the change in its weights.
        base: the base model, where the adapter's config does not say it, or says it wrongly.
        max_error: of the outputs, as a share of what the adapter changes in them. Where the method has no exact LoRA,
            the least of the ranks 4, 8, 16 … 64 that meets it is taken.
        rank: this one and no other, for such methods.
        data: texts to measure on (see :func:`eckart.calibrate`); else 256 random tokens.

    What was written is loaded again with stock PEFT beside a copy of the base, and its outputs are compared.

    Raises EckartError where ``max_error`` is not met, naming the errors of the ranks that were tried, or where an
    adapter is no change of weights; nothing is written then. InputError and FileError for what cannot be used.
    """
    path, target = Path(adapter), Path(output)
    _check(to, max_error, rank)
    config = read_config(path)
    loaded = _base(base, config, path, tokenizer, device)
    batches, words = _batches(loaded, data)
    plain = outputs(loaded.model, batches)
    fresh = copy.deepcopy(loaded.model)
    progress("load the adapter", 0, 1)
    model = attach(loaded.model, path)
    adapted = outputs(model, batches)
    if not bool(adapted.isfinite().all()):
        raise EckartError("the outputs of the adapted model are not finite; there is nothing to compare with.")
    if to == "merged":
        return _merge(model, loaded, target, batches, adapted, plain, words, max_error, overwrite)
    others = other_tensors(path / WEIGHTS)
    inner = model.get_base_model()
    found = exact_factors(inner)
    nearest = None if found is not None else Nearest(inner, rank or MAX_RANK)
    candidates = [0] if nearest is None else [rank] if rank is not None else [r for r in RANKS if r <= MAX_RANK]
    tried: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as passing:
        for done, one in enumerate(candidates):
            progress("convert", done, len(candidates))
            folder = Path(passing) / "lora"
            factors = found if nearest is None else nearest.factors(one)
            write_factors(factors or {}, folder, config, others)
            tried[one] = _measured(folder, fresh, batches, adapted, plain)
            if tried[one] <= (ROUNDING if nearest is None else max_error):
                return _written(folder, target, tried, one, nearest, factors or {}, words, overwrite)
    if nearest is None:
        raise EckartError(
            f"the exported LoRA gives other outputs (relative error {tried[0]:.2g}); nothing was written."
        )
    shown = ", ".join(f"{r}: {error:.1%}" for r, error in tried.items())
    raise EckartError(
        f"no LoRA of rank {max(candidates)} or less is near enough: of what {config.method!r} changes in the outputs "
        f"({words}) it would get wrong, by rank, {shown}; allowed are {max_error:.1%}. Allow more (max_error, "
        "--max-error), give a rank (--rank), or merge it (--to merged). Nothing was written."
    )


def _check(to: str, max_error: float, rank: int | None) -> None:
    found = []
    if to not in get_args(ConvertTo):
        found.append(unknown("form of an adapter", str(to), get_args(ConvertTo)))
    if not 0 < max_error < math.inf:
        found.append(f"max_error is a share above 0, such as 0.05; got {max_error!r}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        found.append(f"rank is an int of at least 1; got {rank!r}")
    if found:
        raise InputError(problems("this cannot be converted", found))


def _base(base: ModelLike | None, config: AdapterConfig, path: Path, tokenizer: Any, device: str | None) -> LoadedModel:
    """The base model, with a head for classes where the adapter has one."""
    given = base if base is not None else config.base_model_name_or_path
    if given is None:
        raise InputError(f"{path} does not say its base model; give base=… (--base).")
    labels = _labels(path)
    if config.task_type == "SEQ_CLS" and isinstance(given, (str, os.PathLike)) and labels:
        loaded, _ = load_classifier(str(given), labels, device=device)
    else:
        loaded = as_loaded(given, tokenizer, device=device)
    if any(hasattr(module, "eckart_delta") for module in loaded.model.modules()):
        raise InputError("the base has an adapter already; give it without.")
    return replace(loaded, model=loaded.model.eval())


def _labels(path: Path) -> list[str]:
    """The classes that ``eckart adapt`` noted; empty where there are none."""
    file = path / MANIFEST
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["outcome"]["adaptation"]["labels"]
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{file} is damaged: {error!r}.") from error
    return [str(label) for label in found]


def _batches(
    loaded: LoadedModel, data: str | os.PathLike[str] | Sequence[str] | None
) -> tuple[Sequence[Mapping[str, Tensor]], str]:
    if data is not None:
        texts = as_texts(data, part="evaluation", field=None, limit=64, seed=0)
        found = text_batches(loaded, pieces(loaded, texts), samples=32, length=min(64, loaded.max_length or 64))
        return found.batches, f"{found.tokens} tokens of {texts.name}"
    entries = getattr(getattr(loaded.model, "config", None), "vocab_size", None)
    if not isinstance(entries, int):
        raise InputError(f"{loaded.name} is no language model, so errors cannot be measured on random tokens.")
    ids = torch.randint(0, entries, (8, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return [{k: v.to(first_parameter(loaded.model).device) for k, v in batch.items()}], "256 random tokens"


def _measured(
    folder: Path, fresh: Any, batches: Sequence[Mapping[str, Tensor]], adapted: Tensor, plain: Tensor
) -> float:
    """The error of the LoRA in ``folder``, as stock PEFT loads it."""
    return lost(outputs(attach(copy.deepcopy(fresh), folder), batches), adapted, plain)


def _written(
    folder: Path,
    target: Path,
    tried: Mapping[int, float],
    rank: int,
    nearest: Nearest | None,
    factors: Mapping[str, LoraFactors],
    words: str,
    overwrite: bool,
) -> Converted:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with atomic_folder(target, overwrite=overwrite, needed=(folder / WEIGHTS).stat().st_size) as new:
        for file in folder.iterdir():
            (new / file.name).write_bytes(file.read_bytes())
        (new / MANIFEST).write_text(
            json.dumps({"converted": {"exact": nearest is None, "error": tried[rank], "measured_on": words}}, indent=2)
            + "\n",
            encoding="utf-8",
        )
    return Converted(
        folder=target,
        to="lora",
        exact=nearest is None,
        rank=int(config["r"]),
        error=tried[rank],
        weight_errors={} if nearest is None else nearest.weight_errors(rank),
        tried={} if nearest is None else dict(tried),
        measured_on=words,
        bytes=(target / WEIGHTS).stat().st_size,
    )


def _merge(
    model: Any,
    loaded: LoadedModel,
    target: Path,
    batches: Sequence[Mapping[str, Tensor]],
    adapted: Tensor,
    plain: Tensor,
    words: str,
    max_error: float,
    overwrite: bool,
) -> Converted:
    merged = model.merge_and_unload(safe_merge=True)
    error = lost(outputs(merged, batches), adapted, plain)
    if error > max_error:
        raise EckartError(
            f"merging gets {error:.1%} of what the adapter changes wrong ({words}), as the weights are rounded to "
            f"{loaded.dtype}; allowed are {max_error:.1%}. Load the base in float32, or keep the adapter beside it."
        )
    size = sum(p.numel() * p.element_size() for p in merged.parameters())
    with atomic_folder(target, overwrite=overwrite, needed=size) as new:
        merged.save_pretrained(new)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(new)
    return Converted(
        folder=target,
        to="merged",
        exact=True,
        rank=None,
        error=error,
        weight_errors={},
        tried={},
        measured_on=words,
        bytes=sum(file.stat().st_size for file in target.glob("*.safetensors")),
    )
