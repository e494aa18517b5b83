"""Which parameter is trained by which rule: parameter groups of a model, by module type."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from eckart.arch import find_blocks, name_matches
from eckart.arch.kinds import is_experts, is_transformers_conv1d
from eckart.arch.modules import is_below
from eckart.errors import InputError, problems, unknown
from eckart.optim.scaling import SCALING_RULES, width_ratio

Role = Literal["linear", "conv", "experts", "embedding", "head", "norm", "bias", "other"]

_ORDER = {role: place for place, role in enumerate(get_args(Role))}
_MATRICES: tuple[Role, ...] = ("linear", "conv", "experts")
_DECAYED: tuple[Role, ...] = (*_MATRICES, "head")
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_FUSED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "qkv", "qkv_linear", "in_proj_weight")
"""What maps are called whose rows are queries, keys and values."""
_BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "falcon", "gpt_bigcode", "persimmon", "minimax")
"""Families whose queries, keys and values take turns by head of keys; in all others each of the three is one block."""
_UNKNOWN_ORDER = ("codegen",)
"""Families whose fused map is left whole."""
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_head_kv")


class ParamGroups(list[dict[str, Any]]):
    """Parameter groups that print as a table. Every torch optimizer takes them, as it takes any list of dicts."""

    def __str__(self) -> str:
        titles = ("role", "rule", "tensors", "numbers", "decay", "lr", "rows split into", "first")
        rows = [titles, *(_row(group) for group in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    other_lr: float | None = None,
    weight_decay: float | None = None,
    scale: Literal["mup", "layerwise"] | None = None,
    base_width: int | None = None,
    width: int | None = None,
    base_model: nn.Module | None = None,
    split: bool = True,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> ParamGroups:
    """The trainable parameters of ``model`` in groups, each for the rule that suits it; print them to see which.

    Each group is a plain dict for ``torch.optim``: ``params``, ``param_names``, and

    - ``role``: ``linear`` (nn.Linear, transformers' ``Conv1D``, any other 2-d ``weight``), ``conv`` (flattened to
      out × rest), ``experts`` (a stack of matrices), ``embedding`` (also where the head shares its weight), ``head``,
      ``norm``, ``bias``, ``other`` (1-d, depthwise convolutions, what no rule knows);
    - ``matrix``: True where a low-rank or orthogonal rule fits (the first three roles), False for the side of AdamW;
    - ``split``: sizes of the blocks that are matrices of their own, for maps that fuse queries, keys and values; None
      otherwise. The sizes follow from the number of heads in ``config``, shared heads of keys and values included.
      Where they take turns by head (GPT-NeoX, BLOOM, Falcon) there is one block per head and kind;
    - ``transposed``: the weight is stored (in, out), as ``Conv1D`` does; ``split`` then counts columns;
    - ``weight_decay``: 0 for embeddings, norms, biases and others; ``weight_decay`` for the rest, or no entry, so that
      the optimizer's own holds, where it is None;
    - ``lr``: only where ``lr`` (matrices) or ``other_lr`` (by default ``lr``) is given.

    The head is what ``get_output_embeddings`` gives; without that, the last nn.Linear that lies in no repeated block.
    Tied weights come once, under their first name. Frozen parameters are left out, so a PEFT model gives its adapters.

    ``scale`` turns values that were tuned at ``base_width`` (of ``width``, by default that of ``config``) into those of
    this width, with :data:`eckart.optim.SCALING_RULES`; it needs ``lr`` and ``weight_decay``. A ``base_model`` (on the
    meta device, if you like) in place of ``base_width`` is more exact: a matrix counts as such only where both of its
    sides grew, and by the growth of its inputs.

    ``overrides`` maps patterns on names of parameters, read as :func:`eckart.arch.find_sites` reads them, to entries of
    their groups: ``{"router.weight": {"matrix": False}, "h.0.*": {"rank": 8}}``. They come last, are not scaled, and of
    several that match the later wins.

    Raises InputError, with all faults at once, for a model without trainable parameters, patterns that match nothing,
    entries that groups own (``params``, ``param_names``), splits that do not add up and options that cannot be
    honoured. Costs one walk over the modules; no weight is read.
    """
    owners = _owners(model)
    changes = overrides or {}
    ratio = _ratio(model, base_width, width, base_model)
    faults = _faults(owners, {"lr": lr, "other_lr": other_lr, "weight_decay": weight_decay}, changes)
    faults += _scale_faults(scale, lr, weight_decay, ratio, owners, (base_width, width, base_model))
    if faults:
        raise InputError(problems("param_groups", faults))
    heads = _head_modules(model)
    groups: dict[str, dict[str, Any]] = {}
    for held in owners.values():
        name, module, parameter = held[0]
        role = _role(held, heads)
        matrix = role in _MATRICES
        rate = lr if matrix or other_lr is None else other_lr
        decay = weight_decay if role in _DECAYED else 0.0
        if scale is not None and rate is not None and decay is not None:
            w = ratio(name, module, parameter) if matrix and ratio else None
            rate, decay = SCALING_RULES[scale].scaled(rate, decay, w)
        entries: dict[str, Any] = {
            "role": role,
            "matrix": matrix,
            "split": _split(model, name, module, parameter) if split and matrix else None,
            "transposed": matrix and _transposed(module),
            **({} if decay is None else {"weight_decay": decay}),
            **({} if rate is None else {"lr": rate}),
        }
        for pattern, change in changes.items():
            if name_matches(pattern, [other for other, _, _ in held]):
                entries |= change
        if entries["split"] is not None:
            entries["split"] = _checked_split(entries, name, parameter)
        group = groups.setdefault(repr(sorted(entries.items())), {"params": [], "param_names": [], **entries})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return ParamGroups(sorted(groups.values(), key=lambda group: _ORDER.get(group["role"], len(_ORDER))))


_Held = list[tuple[str, nn.Module, Tensor]]
"""Every (name, module, parameter) under which one trainable parameter hangs in a model."""


def _owners(model: nn.Module) -> dict[int, _Held]:
    owners: dict[int, _Held] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                owners.setdefault(id(parameter), []).append((f"{path}.{leaf}" if path else leaf, module, parameter))
    return owners


def _role(held: _Held, heads: tuple[nn.Module, ...]) -> Role:
    if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for _, module, _ in held):
        return "embedding"
    name, module, parameter = held[0]
    leaf = name.rpartition(".")[2]
    if "norm" in type(module).__name__.lower():
        return "norm"
    if leaf.endswith("bias"):
        return "bias"
    if parameter.ndim >= 2 and any(module is head for _, module, _ in held for head in heads):
        return "head"
    if parameter.ndim == 3 and is_experts(module):
        return "experts"
    if isinstance(module, _CONVOLUTIONS):
        return "other" if min(_sides(module, parameter)) == 1 else "conv"
    if parameter.ndim == 2 and leaf.endswith("weight"):
        return "linear"
    return "other"


def _sides(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Rows and columns of one group of a convolution; one row per group is a depthwise one."""
    groups = getattr(module, "groups", 1)
    return weight.shape[0] // groups, weight[0].numel()


def _transposed(module: nn.Module) -> bool:
    return is_transformers_conv1d(module) or (is_experts(module) and bool(getattr(module, "is_transposed", False)))


def _head_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """The map onto the outputs, with what adapters put below it."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    if not isinstance(head, nn.Module):
        blocks = [block.name for block in find_blocks(model)]
        found = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_below(n, blocks)]
        head = found[-1] if found else None
    return () if head is None else tuple(head.modules())


def _ratio(
    model: nn.Module, base_width: int | None, width: int | None, base_model: nn.Module | None
) -> Callable[[str, nn.Module, Tensor], float | None] | None:
    """By how much a matrix grew, None for one that counts as a vector; None where neither base is known."""
    if base_model is not None:
        shapes = {name: p.shape for name, p in base_model.named_parameters(remove_duplicate=False)}
        return lambda name, module, p: width_ratio(p.shape, shapes[name], transposed=_transposed(module))
    now = width if width is not None else _number(_text_config(model), _WIDTHS)
    if not base_width or not now:
        return None
    return lambda name, module, p: now / base_width


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "text_config", config)


def _number(config: Any, names: Iterable[str]) -> int | None:
    """The first of the attributes that is a positive int."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _split(model: nn.Module, name: str, module: nn.Module, weight: Tensor) -> tuple[int, ...] | None:
    """Sizes of the blocks of a fused map of queries, keys and values; None for other maps and unknown orders."""
    path, _, leaf = name.rpartition(".")
    owner, _, called = path.rpartition(".")
    if called in ("base_layer", "default"):  # as PEFT wraps a map
        owner, _, called = owner.rpartition(".")
    if weight.ndim != 2 or not (leaf in _FUSED or (leaf == "weight" and called in _FUSED)):
        return None
    rows, columns = (weight.shape[1], weight.shape[0]) if _transposed(module) else weight.shape
    if hasattr(model.get_submodule(owner), "q_attn") and rows % 2 == 0:  # queries have a map of their own
        return (rows // 2, rows // 2)
    thirds = (rows // 3,) * 3 if rows == 3 * columns else None
    if leaf == "in_proj_weight":
        return thirds
    config = _config(model, owner)
    heads = _number(config, _HEADS)
    if heads is None:
        return thirds
    if getattr(config, "model_type", "") in _UNKNOWN_ORDER:
        return None
    kv_heads = _kv_heads(config, heads)
    if heads % kv_heads or rows % (heads + 2 * kv_heads):
        return thirds
    size = rows // (heads + 2 * kv_heads)
    if getattr(config, "model_type", "") in _BY_HEAD:
        return (heads // kv_heads * size, size, size) * kv_heads
    return (heads * size, kv_heads * size, kv_heads * size)


def _kv_heads(config: Any, heads: int) -> int:
    if hasattr(config, "multi_query") and not getattr(config, "new_decoder_architecture", False):
        return 1 if config.multi_query else heads
    return _number(config, _KV_HEADS) or _number(getattr(config, "attn_config", None), _KV_HEADS) or heads


def _config(model: nn.Module, path: str) -> Any:
    """The config of the nearest module around a dotted path that has one."""
    while True:
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None or not path:
            return config
        path = path.rpartition(".")[0]


def _checked_split(entries: Mapping[str, Any], name: str, parameter: Tensor) -> tuple[int, ...]:
    sizes = tuple(entries["split"])
    rows = parameter.shape[1] if entries["transposed"] else parameter.shape[0]
    if parameter.ndim != 2 or sum(sizes) != rows or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise InputError(
            f"param_groups: {name} is {tuple(parameter.shape)} with {rows} rows to split; got blocks of {list(sizes)}. "
            "Give positive sizes that add up, or split=None."
        )
    return sizes


def _faults(
    owners: Mapping[int, _Held], numbers: Mapping[str, float | None], overrides: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    faults = []
    if not owners:
        faults.append("nothing is trainable: no parameter has requires_grad. Unfreeze some, or add an adapter.")
    names = [name for held in owners.values() for name, _, _ in held]
    for pattern, changes in overrides.items():
        try:
            found = name_matches(pattern, names)
        except re.error as error:
            faults.append(f"{pattern!r} is not a regular expression: {error}.")
            continue
        if owners and not found:
            faults.append(unknown("parameter pattern", pattern, names))
        if taken := sorted({"params", "param_names"} & set(changes)):
            faults.append(f"overrides[{pattern!r}] sets {' and '.join(taken)}, which the groups own.")
    faults += [
        f"{what} is a number of at least 0; got {value!r}."
        for what, value in numbers.items()
        if value is not None and not 0 <= value < math.inf
    ]
    return faults


def _scale_faults(
    scale: str | None,
    lr: float | None,
    weight_decay: float | None,
    ratio: object,
    owners: Mapping[int, _Held],
    base: tuple[int | None, int | None, nn.Module | None],
) -> list[str]:
    base_width, width, base_model = base
    if scale is None:
        given = [n for n, v in zip(("base_width", "width", "base_model"), base, strict=True) if v is not None]
        return (
            [f"{' and '.join(given)} without scale changes nothing; add scale='mup' or 'layerwise'."] if given else []
        )
    if scale not in SCALING_RULES:
        return [unknown("scale", scale, SCALING_RULES)]
    faults = []
    if lr is None or weight_decay is None:
        faults.append("scale multiplies numbers tuned at the base: give lr and weight_decay.")
    if (base_width is None) == (base_model is None):
        faults.append("scale needs either base_width, the width that lr and weight_decay were tuned at, or base_model.")
    faults += [
        f"{what} is an int of at least 1; got {value!r}."
        for what, value in (("base_width", base_width), ("width", width))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1)
    ]
    if base_model is not None:
        if width is not None:
            faults.append("base_model holds the widths; drop width.")
        known = {name: p.ndim for name, p in base_model.named_parameters(remove_duplicate=False)}
        strange = [n for n, _, p in (held[0] for held in owners.values()) if known.get(n) != p.ndim]
        if strange:
            faults.append(f"base_model has no parameters of the same name and dimensions for {', '.join(strange[:5])}.")
    elif base_width is not None and ratio is None and not faults:
        faults.append("the model has no config that gives its width; give width, or base_model.")
    return faults


def _row(group: Mapping[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    names = group["param_names"]
    split = group["split"]
    return (
        str(group["role"]),
        "matrix" if group["matrix"] else "AdamW",
        str(len(names)),
        f"{sum(p.numel() for p in group['params']):,}",
        f"{group['weight_decay']:g}" if "weight_decay" in group else "default",
        f"{group['lr']:.3g}" if "lr" in group else "default",
        "" if split is None else (f"{len(split)} blocks" if len(split) > 4 else "+".join(str(size) for size in split)),
        names[0] + (", …" if len(names) > 1 else ""),
    )
