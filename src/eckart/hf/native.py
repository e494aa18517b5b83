"""Models whose layers are plain and evenly narrower, as plain checkpoints of their family: a smaller config."""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from eckart.checkpoint import atomic_folder
from eckart.errors import EckartError, InputError, problems
from eckart.hf.exported import copy_rest, finish, require_eckart
from eckart.hf.probes import input_names, probe
from eckart.hf.quantizer import align
from eckart.hf.registry import load_pretrained
from eckart.layers import describe, forget_mark


@dataclass(frozen=True)
class Field:
    """A width in a config, and the linear layers whose output features it counts."""

    name: str
    sites: str
    """Regular expression that the end of a module's name matches."""
    unit: str | int = 1
    """Output features per count: a number, or the config field that says it."""


_GLU = Field("intermediate_size", r"mlp\.(gate|up)_proj")
_HEADS = (
    Field("num_attention_heads", r"self_attn\.q_proj", "head_dim"),
    Field("num_key_value_heads", r"self_attn\.[kv]_proj", "head_dim"),
)
_BERT = (Field("intermediate_size", r"intermediate\.dense"),)
_VIT = (Field("intermediate_size", r"mlp\.fc1"),)
_DECODER = (_GLU, *_HEADS)
_BART = (Field("encoder_ffn_dim", r"encoder\.layers\.\d+\.fc1"), Field("decoder_ffn_dim", r"decoder\.layers\.\d+\.fc1"))

FIELDS: Mapping[str, tuple[Field, ...]] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "gemma3_text": _DECODER,
    "phi": (Field("intermediate_size", r"mlp\.fc1"),),
    "phi3": (Field("intermediate_size", r"mlp\.gate_up_proj", 2),),
    "gpt2": (Field("n_inner", r"mlp\.c_fc"),),
    "gpt_neo": (Field("intermediate_size", r"mlp\.c_fc"),),
    "gpt_neox": (Field("intermediate_size", r"mlp\.dense_h_to_4h"),),
    "gptj": (Field("n_inner", r"mlp\.fc_in"),),
    "opt": (Field("ffn_dim", r"layers\.\d+\.fc1"),),
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "mpnet": _BERT,
    "deberta-v2": _BERT,
    "distilbert": (Field("hidden_dim", r"ffn\.lin1"),),
    "vit": _VIT,
    "deit": _VIT,
    "bart": _BART,
    "t5": (
        Field("d_ff", r"DenseReluDense\.(wi|wi_0|wi_1)"),
        Field("d_kv", r"(SelfAttention|EncDecAttention)\.[qkv]", "num_heads"),
    ),
}
"""By ``model_type``: which fields of a config say the width of which layers. A rotary embedding fixes the size of a
head, so such models can lose whole heads; in T5 they can become narrower."""


def native_config(model: nn.Module) -> tuple[PretrainedConfig, None] | tuple[None, tuple[str, ...]]:
    """The config of the same family from which this very model can be built, or every reason why there is none.

    Widths are read off the layers, however they came to be, and put into the fields of :data:`FIELDS`. The config
    counts where the class built from it (on the meta device, without weights) has exactly the names, shapes and
    module classes of ``model``. Reasons name a site, its shape and what would be needed. Whether the two compute
    the same is not checked here; :func:`export_native` does. ``model`` is left as it is.

    Raises InputError for a model that is no PreTrainedModel.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"expected a transformers PreTrainedModel; got {type(model).__name__}.")
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    strange = {name: entry for name, entry in describe(model).items() if entry["kind"] != "narrow"}
    reasons = {name: f"{name} is {_words(entry)}, which no config can say" for name, entry in strange.items()}
    for field in FIELDS.get(config.model_type, ()):
        reasons |= _set(config, field, model, set(reasons))
    try:
        skeleton = _build(model, config)
    except (ValueError, RuntimeError, AssertionError, TypeError) as error:
        reasons[""] = f"{type(model).__name__} cannot be built with these widths: {error}"
    else:
        reasons |= _classes(model, skeleton, set(reasons))
        reasons |= _shapes(model, skeleton, set(reasons))
    return (None, tuple(reasons.values())) if reasons else (config, None)


def settle_native(model: nn.Module) -> bool:
    """Where every layer of Eckart's is plain and evenly narrower, make this a plain model of its family, in place.

    It then has a smaller config and no mark of Eckart's, and loads anywhere. False, and nothing changed, for others.
    """
    entries = describe(model)
    if not entries or any(entry["kind"] != "narrow" for entry in entries.values()):
        return False
    config, _ = native_config(model)
    if config is None:
        return False
    for name in entries:
        forget_mark(model.get_submodule(name))
    model.config = config
    return True


def export_native(directory: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write the model in ``directory`` as a plain checkpoint with a smaller config, which needs no Eckart.

    It is as small and as fast as the narrower layers make it. Before it counts, the new folder is loaded by
    transformers and compared: every output of a probe input must be the same bit for bit.

    When it does not help: factored, pivoted and quantised layers, and widths that differ from layer to layer, have
    no place in a config; ``export_dense`` writes those at the original size. Cost: the model twice in memory.

    Raises InputError with every reason where no config of the family says these widths, EckartError where the
    new folder computes something else, FileError for folders that cannot be read or written.
    """
    state = require_eckart(directory)
    source = Path(directory)
    model: Any = load_pretrained(source, dtype="auto").eval()
    config, reasons = native_config(model)
    if config is None:
        raise InputError(
            problems(f"{source} has no native form", reasons or ()) + "\nExport with --to dense, which every model has."
        )
    with atomic_folder(output, overwrite=overwrite) as folder:
        copy_rest(source, folder, skip=set(state.weight_files))
        write_native(model, config, folder)
        _require_equal(model, folder)
        finish(source, folder, "native", "plain transformers, at its smaller size")
    return Path(output)


def write_native(model: PreTrainedModel, config: PretrainedConfig, folder: str | Path) -> None:
    """``save_pretrained`` of ``model`` as a plain model of ``config``, which :func:`native_config` gave for it."""
    plain = _build(model, config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = model.generation_config
    plain.save_pretrained(folder)


def _words(entry: Mapping[str, Any]) -> str:
    """``linear in form lowrank, rank 5`` out of the entry of a layer."""
    parts = [f"{key} {entry[key]}" for key in ("form", "rank", "bits") if entry.get(key)]
    return f"of kind {entry['kind']}" + (f" ({', '.join(parts)})" if parts else "")


def _outputs(module: nn.Module) -> int:
    """Output features of an nn.Linear or Conv1D."""
    return int(module.nf if hasattr(module, "nf") else module.out_features)  # type: ignore[arg-type]


def _shape(module: nn.Module) -> str:
    weight = module.get_parameter("weight")
    return f"out {_outputs(module)}, in {weight.numel() // _outputs(module)}"


def _unit(config: PretrainedConfig, unit: str | int) -> int:
    """Output features per count of a field."""
    if isinstance(unit, int):
        return unit
    value = getattr(config, unit, None)
    return int(value if value is not None else config.hidden_size // config.num_attention_heads)


def _set(config: PretrainedConfig, field: Field, model: nn.Module, skip: set[str]) -> dict[str, str]:
    """Write the width that the sites of a field have, or most of them, into ``config``; why others do not fit."""
    pattern = re.compile(rf"(?:.*\.)?(?:{field.sites})")
    sites = {name: module for name, module in model.named_modules() if pattern.fullmatch(name) and name not in skip}
    widths = Counter(_outputs(module) for module in sites.values())
    unit = _unit(config, field.unit)
    whole = [width for width, _ in widths.most_common() if width % unit == 0]
    if whole and whole[0] // unit != getattr(config, field.name):
        if isinstance(field.unit, str):
            setattr(config, field.unit, unit)  # Qwen2 would divide hidden_size by the new number of heads
        setattr(config, field.name, whole[0] // unit)
    found = " and ".join(f"{width} ({count}×)" for width, count in sorted(widths.items()))
    needed = f"a multiple of {unit}" if unit > 1 else "one width for all"
    return {
        name: f"{name} has {_shape(module)}: {field.name} needs {needed}, the same in every layer; they have {found}"
        for name, module in sites.items()
        if not whole or _outputs(module) != whole[0]
    }


def _build(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class on the meta device, with a pooling layer only where ``model`` has one."""
    takes = inspect.signature(type(model).__init__).parameters
    extra = (
        {"add_pooling_layer": False} if "add_pooling_layer" in takes and getattr(model, "pooler", None) is None else {}
    )
    with torch.device("meta"):
        plain: PreTrainedModel = type(model)(config, **extra)
    return plain.eval()


def _classes(model: nn.Module, skeleton: nn.Module, known: set[str]) -> dict[str, str]:
    """Modules of another class than the config builds, outside of those in ``known``."""
    theirs = dict(skeleton.named_modules())
    return {
        name: f"{name} is a {type(module).__name__}; {type(model).__name__} needs a {type(theirs[name]).__name__}"
        for name, module in model.named_modules()
        if name in theirs and type(module) is not type(theirs[name]) and not _inside(name, known)
    }


def _shapes(model: nn.Module, skeleton: nn.Module, known: set[str]) -> dict[str, str]:
    """Weights of another name or shape than the config builds, outside of the modules in ``known``."""
    cls = type(model).__name__
    ours = {key: tuple(weight.shape) for key, weight in model.state_dict().items()}
    theirs = {key: tuple(weight.shape) for key, weight in skeleton.state_dict().items()}
    found = {}
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) == theirs.get(key) or _inside(key, known):
            continue
        if key not in ours:
            found[key] = f"{cls} needs {key} of shape {theirs[key]}, and the model has none"
        elif key not in theirs:
            found[key] = f"{key} of shape {ours[key]} has no place in {cls}"
        else:
            found[key] = f"{key} has shape {ours[key]}; {cls} with the widths of the other layers needs {theirs[key]}"
    return found


def _inside(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _require_equal(model: Any, folder: Path) -> None:
    """Raises EckartError unless transformers loads ``folder`` as a model with the very outputs of ``model``."""
    plain = type(model).from_pretrained(folder, dtype="auto").eval()
    align(model)
    align(plain)
    batch = probe(model, input_names(model), 2, 8)
    batch = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in batch.items()}
    with torch.no_grad():
        ours, theirs = model(**batch), plain(**batch)
    unequal = [name for name, x in ours.items() if isinstance(x, Tensor) and not torch.equal(x, theirs[name])]
    if unequal:
        raise EckartError(
            f"the plain model computes other {', '.join(unequal)} than the compressed one, though all shapes are the "
            "same: a layer computes with a number that no config says. Nothing was written; export with --to dense."
        )
