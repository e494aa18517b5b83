"""From forms to layers, and from what a checkpoint says to empty layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import InputError, unknown
from eckart.forms import Form, LowRank, Pivoted
from eckart.layers.conv import FactoredConv, PivotedConv, StructuredConv
from eckart.layers.embedding import (
    FactoredEmbedding,
    PivotedEmbedding,
    StructuredEmbedding,
    Table,
    TiedEmbedding,
    TiedHead,
    TiedLayer,
)
from eckart.layers.experts import FactoredExperts, expert_parameters, unsupported_experts
from eckart.layers.group_sparse import GroupSparseInt4
from eckart.layers.linear import FactoredLinear, PivotedLinear, StructuredLinear, is_conv1d, is_narrowed, keep_mark
from eckart.layers.narrow import NarrowColumns, NarrowLinear, NarrowRows, narrow_entry, smaller
from eckart.layers.quantised import Quantised, QuantisedLinear, quantised_skeleton
from eckart.layers.random_features import SNNKLinear
from eckart.layers.sparse import SparseLinear, sparse_skeleton
from eckart.layers.vector_coded import LR2VQConv2d, LR2VQLinear, VectorCoded
from eckart.records import FormKind, Site

FACTORED = (
    StructuredLinear,
    StructuredConv,
    Table,
    TiedLayer,
    FactoredExperts,
    QuantisedLinear,
    NarrowLinear,
    GroupSparseInt4,
    SparseLinear,
    VectorCoded,
    SNNKLinear,
)
"""Bases of all layers of this room, for ``isinstance``."""

_LINEARS: dict[str, type[FactoredLinear] | type[PivotedLinear] | type[NarrowLinear]] = {
    "lowrank": FactoredLinear,
    "pivoted": PivotedLinear,
    "rows": NarrowRows,
    "columns": NarrowColumns,
}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_factored(module: nn.Module) -> bool:
    """Whether the module is one of Eckart's layers."""
    return isinstance(module, FACTORED)


def unsupported(module: nn.Module) -> str | None:
    """None, or the reason why no factored layer can take the place of this module."""
    kind = type(module)
    if isinstance(module, Quantised):
        return f"{kind.__name__} is quantised already"
    if isinstance(module, FACTORED):
        return None if isinstance(module, FactoredExperts) else f"{kind.__name__} is factored already"
    if isinstance(module, nn.Linear):
        if kind.__name__ == "NonDynamicallyQuantizableLinear":
            return "nn.MultiheadAttention reads its weights itself and would never call a factored layer"
        if kind.forward is not nn.Linear.forward:
            return f"{kind.__name__} computes something else than nn.Linear"
        return None
    if is_conv1d(module):
        return None
    if isinstance(module, _CONVS):
        return None if kind in _CONVS else f"{kind.__name__} computes something else than {kind.__base__}"
    if isinstance(module, nn.Embedding):
        if kind is not nn.Embedding:
            return f"{kind.__name__} computes something else than nn.Embedding"
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            return "embeddings with max_norm, sparse or scale_grad_by_freq cannot be factored"
        return None
    if expert_parameters(module):
        return unsupported_experts(module)
    return f"{kind.__name__} is no linear map that Eckart knows"


def supported_forms(site: Site) -> tuple[FormKind, ...]:
    """Forms that a layer of this site can have: pivoted rows need one output space, so no groups."""
    if site.kind == "conv" and site.slices > 1:
        return ("dense", "lowrank")
    return ("dense", "lowrank", "pivoted")


def layer_from_forms(site: Site, original: nn.Module, forms: Sequence[Form]) -> nn.Module:
    """The layer that computes what ``forms`` say, in the place of ``original``.

    One form per slice of the site, equal in kind and rank; dense forms give back ``original`` itself. Factors
    get the dtype, device, training mode and ``requires_grad`` of the original weight. A site of kind
    ``experts`` has the name of a parameter: there ``original`` and the result are the module that owns it;
    call it once per parameter, with the previous result. Raises InputError where the parts do not fit.
    """
    if len(forms) != site.slices:
        raise InputError(f"{site.name}: expected {site.slices} forms, one per slice; got {len(forms)}.")
    kinds = {(form.kind, form.rank) for form in forms}
    if len(kinds) != 1:
        raise InputError(f"{site.name}: all slices need one kind and rank; got {sorted(kinds)}.")
    if any(form.shape != (site.out_features, site.in_features) for form in forms):
        shape = (site.out_features, site.in_features)
        raise InputError(f"{site.name}: expected matrices {shape}; got {forms[0].shape}.")
    kind, rank = kinds.pop()
    if kind == "dense":
        return original
    if reason := unsupported(original):
        raise InputError(f"{site.name} has to stay dense: {reason}. Exclude it.")
    if kind not in supported_forms(site):
        raise InputError(f"{site.name} cannot be {kind}; possible: {', '.join(supported_forms(site))}.")
    bias = any(form.bias is not None for form in forms)
    if site.kind == "experts":
        if bias:
            raise InputError(f"{site.name}: experts have no bias, so no method may add one.")
        return _experts_from_forms(site, original, forms, kind, rank)
    layer = _skeleton(site.kind, kind, rank, bias, original)
    _fill(layer, site, forms)
    weight = original.get_parameter("weight")
    for parameter in layer.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return layer.train(original.training)


def _copy(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value.reshape(target.shape))


def _pivoted_bias(form: Pivoted, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The bias of the kept rows, and that of the others less what reaches them through ``b``."""
    stored = bias[form.index.long().argsort()].double()
    kept, rest = stored[: form.rank], stored[form.rank :]
    return kept, rest - form.b.double() @ kept


def _fill(layer: nn.Module, site: Site, forms: Sequence[Form]) -> None:
    """Write the factors into an allocated layer of the same kind and rank."""
    embedding = site.kind == "embedding"
    a, b = layer.get_submodule("a"), layer.get_submodule("b")
    if isinstance(forms[0], LowRank):
        narrow = torch.cat([f.a for f in forms if isinstance(f, LowRank)])
        _copy(a.get_parameter("weight"), narrow.T if embedding else narrow)
        _copy(b.get_parameter("weight"), torch.cat([f.b for f in forms if isinstance(f, LowRank)]))
        if forms[0].bias is not None:
            _copy(b.get_parameter("bias"), torch.cat([f.bias for f in forms if f.bias is not None]))
        return
    form = forms[0]
    if not isinstance(form, Pivoted):
        raise InputError(f"{site.name}: there is no layer for forms of kind {form.kind!r}.")
    _copy(b.get_parameter("weight"), form.b)
    layer.get_buffer("index").copy_(form.index)
    narrow = form.a
    if form.bias is not None:
        kept, rest = _pivoted_bias(form, form.bias)
        _copy(b.get_parameter("bias"), rest)
        if embedding:  # a table has no bias: its columns take it up
            narrow = narrow + kept.to(narrow.dtype).unsqueeze(-1)
        else:
            _copy(a.get_parameter("bias"), kept)
    _copy(a.get_parameter("weight"), narrow.T if embedding else narrow)


def _experts_from_forms(
    site: Site, original: nn.Module, forms: Sequence[Form], kind: FormKind, rank: int
) -> FactoredExperts:
    name = site.name.rpartition(".")[2]
    names = original.names if isinstance(original, FactoredExperts) else expert_parameters(original)
    if name not in names:
        raise InputError(f"{site.name}: " + unknown("expert weight", name, names))
    learns = next(original.parameters()).requires_grad
    layer = FactoredExperts(original, {name: (kind, rank)})
    stem = layer.stem(name)
    a, b = layer.get_parameter(f"{stem}_a"), layer.get_parameter(f"{stem}_b")
    for parameter in (a, b):
        parameter.requires_grad_(learns)
    for e, form in enumerate(forms):
        if not isinstance(form, (LowRank, Pivoted)):
            raise InputError(f"{site.name}: there is no layer for forms of kind {form.kind!r}.")
        _copy(a[e], form.a)
        _copy(b[e], form.b)
        if isinstance(form, Pivoted):
            layer.get_buffer(f"{stem}_index")[e].copy_(form.index)
    return layer.train(original.training)


def tie_to(table: nn.Module, table_name: str, original: nn.Module) -> nn.Module:
    """The layer that replaces ``original``, a head or second embedding that shared the weight of the table.

    Raises InputError where ``table`` is no factored or quantised embedding of the same shape.
    """
    if not isinstance(table, Table):
        raise InputError(f"{table_name} is no embedding of Eckart's, so nothing can be tied to it.")
    if isinstance(original, nn.Linear) and isinstance(table, StructuredEmbedding) and table.b.bias is not None:
        raise InputError(f"{table_name} got a bias from its method; a head cannot share that. Exclude it.")
    if (reason := unsupported(original)) is not None:
        raise InputError(f"a layer tied to {table_name} has to stay dense: {reason}. Exclude the table.")
    expected = (table.num_embeddings, table.embedding_dim)
    if tuple(original.get_parameter("weight").shape) != expected:
        raise InputError(f"expected a layer with a weight of shape {expected}, as {table_name} has.")
    layer: TiedHead | TiedEmbedding
    if isinstance(original, nn.Linear):
        layer = TiedHead(table, table_name, original.bias)
    else:
        layer = TiedEmbedding(table, table_name)
    return layer.train(original.training)


def _skeleton(kind: str, form: str, rank: int, bias: bool, original: nn.Module) -> nn.Module:
    weight = original.get_parameter("weight")
    if kind in ("linear", "conv1d"):
        transposed = is_conv1d(original)
        out_features, in_features = weight.T.shape if transposed else weight.shape
        return _LINEARS[form](
            in_features,
            out_features,
            rank,
            bias=bias,
            original=type(original) if transposed else nn.Linear,
            device=weight.device,
            dtype=weight.dtype,
        )
    if kind == "conv" and isinstance(original, _CONVS):
        return (FactoredConv if form == "lowrank" else PivotedConv)(original, rank, bias=bias)
    if kind == "embedding" and isinstance(original, nn.Embedding):
        return (FactoredEmbedding if form == "lowrank" else PivotedEmbedding)(original, rank, bias=bias)
    raise InputError(f"a {type(original).__name__} cannot become a factored layer of kind {kind!r}.")


def layer_skeleton(entry: Mapping[str, Any], original: nn.Module, table: nn.Module | None = None) -> nn.Module:
    """The empty layer that ``entry`` speaks of (see :func:`describe`), on the device of ``original``.

    ``table`` is the embedding of Eckart's for entries with a key ``table``. Raises InputError where the entry
    asks for what this version does not know, or does not fit ``original``.
    """
    kind = entry.get("kind")
    if kind in ("tied-head", "tied-embedding"):
        if table is None:
            raise InputError(f"a {kind} needs the table {entry.get('table')!r}, which is not there.")
        return tie_to(table, str(entry["table"]), original)
    if kind == "random-features":
        return _random_features(entry, original)
    if reason := unsupported(original):
        raise InputError(reason)
    narrow = entry if kind == "narrow" else entry.get("narrow")
    if narrow is not None:
        size = int(narrow["out"]), int(narrow["in"])
        original = smaller(original, *size, bool(narrow["bias"]), int(narrow.get("blocks", 1)))
    if kind == "narrow":
        return original
    if kind == "quantised":
        quantised = quantised_skeleton(entry, original)
        keep_mark(original, quantised)
        return quantised.train(original.training)
    if kind == "sparse":
        return sparse_skeleton(entry, original).train(original.training)
    if kind in ("group-sparse", "vector-coded"):
        return _coded(entry, original).train(original.training)
    if kind == "experts":
        weights = {name: (spec["form"], int(spec["rank"])) for name, spec in entry["weights"].items()}
        layer: nn.Module = FactoredExperts(original, weights)
        return layer.train(original.training)
    form, rank = entry.get("form"), entry.get("rank")
    if form not in _LINEARS:
        raise InputError(unknown("form", str(form), _LINEARS) + " Update eckart.")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"a rank is an int of at least 1; got {rank!r}.")
    bias = entry.get("bias", getattr(original, "bias", None) is not None)
    return _skeleton(str(kind), form, rank, bool(bias), original).train(original.training)


def _coded(entry: Mapping[str, Any], original: nn.Module) -> nn.Module:
    """The layer of zeros with a decoded weight."""
    sizes = {
        name: value for name, value in entry.items() if name in ("kept", "group", "subvector", "dimension", "codes")
    }
    if entry["kind"] == "vector-coded" and isinstance(original, nn.Conv2d):
        return LR2VQConv2d(original, **sizes)
    transposed = is_conv1d(original)
    if not (transposed or isinstance(original, nn.Linear)):
        raise InputError(f"a {type(original).__name__} cannot become a layer of kind {entry['kind']!r}.")
    weight = original.get_parameter("weight")
    out_features, in_features = weight.T.shape if transposed else weight.shape
    return (GroupSparseInt4 if entry["kind"] == "group-sparse" else LR2VQLinear)(
        in_features,
        out_features,
        bias=bool(entry["bias"]),
        original=type(original) if transposed else nn.Linear,
        device=weight.device,
        dtype=weight.dtype,
        **sizes,
    )


def _random_features(entry: Mapping[str, Any], original: nn.Module) -> nn.Module:
    """The layer of zeros in the place of a whole block, whose tensors the entry names."""
    inside = original.state_dict()
    if strange := [name for name in entry["replaces"] if name not in inside]:
        raise InputError(f"it takes the place of a block with {strange[0]}, and {type(original).__name__} has none.")
    like = next(original.parameters())
    return SNNKLinear(
        int(entry["in"]),
        int(entry["out"]),
        int(entry["features"]),
        kind=entry["function"],
        bias=bool(entry["bias"]),
        replaces=entry["replaces"],
        device=like.device,
        dtype=like.dtype,
    ).train(original.training)


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Entry of every layer of Eckart's by its name, tables before what is tied to them. JSON values only.

    A child of a factored layer that is quantised has an entry of its own, after that of its parent.
    """
    found = {name: layer.entry() for name, layer in model.named_modules() if isinstance(layer, FACTORED)}
    for name, layer in model.named_modules():
        if is_narrowed(layer):
            found[name] = {**found[name], "narrow": narrow_entry(layer)} if name in found else narrow_entry(layer)
    return dict(sorted(found.items(), key=lambda item: "table" in item[1]))


def dense_keys(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """State-dict keys of the dense weights that are not there because the layer ``name`` is factored."""
    if entry.get("kind") == "experts":
        return tuple(f"{name}.{weight}" for weight in entry["weights"])
    if entry.get("kind") == "random-features":
        return tuple(f"{name}.{key}" for key in entry["replaces"])
    if entry.get("kind") == "narrow":  # there, in another shape, which stops whoever expects the old one
        return ()
    return (f"{name}.weight",)
