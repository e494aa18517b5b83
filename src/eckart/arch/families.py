"""Facts about known families: where their MLPs and attentions are, as data.

A family is known by the class names of its modules. A fact becomes a unit only where the module has the
parts and shapes that it names and no parameters beyond; otherwise the unit is skipped, with the reason.
A new family is an entry in ``_FAMILIES`` and a model in ``tests/arch/test_families.py``, which proves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn

from eckart.arch.modules import find_blocks, is_below
from eckart.arch.sites import find_sites, skipped_sites
from eckart.arch.units import MLP, Attention, Rows, Units
from eckart.records import Site

_NO_FACTS = "no facts about this family; factors only"
_MIXTURE = "a mixture of experts is not one MLP; factors only"
_CROSS = ("crossattention", "EncDecAttention", "encoder_attn")
"""What attentions to another sequence are called."""


@dataclass(frozen=True)
class _Maps:
    """The sites of a model by name."""

    sites: Mapping[str, Site]
    left_alone: Mapping[str, str]
    """Why other maps are no sites."""

    def fault(self, names: Iterable[str]) -> str | None:
        """Why the maps cannot be those of a unit."""
        for name in names:
            site = self.sites.get(name)
            if site is None:
                return f"{name} cannot be taken: {self.left_alone.get(name, 'it is not among the sites')}"
            if site.kind not in ("linear", "conv1d"):
                return f"{name} is of kind {site.kind!r}; expected a linear map"
            if site.tied:
                return f"{name} shares its weight with {', '.join(sorted({site.name, *site.tied} - {name}))}"
        return None


@dataclass(frozen=True, kw_only=True)
class _MLPFacts:
    """Where the maps of an MLP are, as paths inside of the module of that class."""

    module: str
    """Class name."""
    inputs: tuple[str, ...]
    """Gate and up, or up alone. One name where it is gated: both are in one map, the gate first."""
    down: str
    gated: bool = False
    block: bool = False
    """The module is the block itself and holds more than the MLP."""

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.inputs, self.down)

    def unit(self, name: str, module: nn.Module, maps: _Maps) -> MLP | str:
        """The MLP of the module under that name, or why there is none."""
        fault = _missing(module, self.parts) or ("" if self.block else _strange(module, self.parts))
        if fault := fault or maps.fault(_join(name, part) for part in self.parts):
            return fault
        down = maps.sites[_join(name, self.down)]
        width = down.in_features
        inputs = [maps.sites[_join(name, part)] for part in self.inputs]
        rows = [Rows(site=site.name, stop=width) for site in inputs]
        if self.gated and len(inputs) == 1:
            rows.append(Rows(site=inputs[0].name, start=width, stop=2 * width))
        if fault := _uneven(rows, inputs):
            return fault
        return MLP(
            name=_join(name, "mlp") if self.block else name,
            inputs=tuple(rows),
            down=down.name,
            width=width,
            depth=down.depth,
            gated=self.gated,
        )


@dataclass(frozen=True, kw_only=True)
class _AttentionFacts:
    """Where the parts of an attention are, as paths inside of the module of that class."""

    module: str
    """Class name."""
    query: str
    key: str
    value: str
    """A name that comes twice is one map that holds both, in this order, whole head after whole head."""
    output: str
    head_dim: str = "head_dim"
    """The attribute that the forward pass reads."""
    heads: str = ""
    """The attribute that holds the number of heads, if the forward pass reads it."""
    rotary: bool = False
    rotary_dim: str = ""
    """The attribute that says how many features turn; empty: all of the head."""
    rotary_share: bool = False
    """Part of the head turns, the ``partial_rotary_factor`` of the config."""
    norms: tuple[str, str] | None = None
    """Norms of each head of queries and keys; modules without both have none."""
    others: tuple[str, ...] = ()
    """Parts with parameters that do not touch what is said of the maps."""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.query, self.key, self.value, self.output)))

    def unit(self, name: str, module: nn.Module, maps: _Maps) -> Attention | str:
        """The attention of the module under that name, or why there is none."""
        norms = self.norms if self.norms and not _missing(module, self.norms) else ()
        fault = _missing(module, self.parts) or _strange(module, (*self.parts, *norms, *self.others))
        if fault := fault or maps.fault(_join(name, part) for part in self.parts):
            return fault
        query, key, value, output = (
            maps.sites[_join(name, part)] for part in (self.query, self.key, self.value, self.output)
        )
        wide = output.in_features
        before = wide if key is query else 0
        narrow = (key.out_features - before) // (2 if value is key else 1)
        rows = (
            Rows(site=query.name, stop=wide),
            Rows(site=key.name, start=before, stop=before + narrow),
            Rows(site=value.name, start=before + narrow, stop=before + 2 * narrow)
            if value is key
            else Rows(site=value.name, stop=narrow),
        )
        try:
            head_dim = attrgetter(self.head_dim)(module)
            rotary_dim = self._rotary_dim(module, head_dim)
            stated = attrgetter(self.heads)(module) if self.heads else wide // head_dim
        except AttributeError as error:
            return f"a layout that is not known: {error}"
        if fault := _uneven(rows, (query, key, value)) or self._fault(module, wide, narrow, head_dim, rotary_dim):
            return fault
        if stated != wide // head_dim:
            return f"{self.heads} says {stated} heads, but the maps have {wide // head_dim} of {head_dim} features"
        return Attention(
            name=name,
            query=rows[0],
            key=rows[1],
            value=rows[2],
            output=output.name,
            heads=wide // head_dim,
            kv_heads=narrow // head_dim,
            head_dim=head_dim,
            rotary=self.rotary,
            rotary_dim=rotary_dim,
            query_norm=_join(name, norms[0]) if norms else None,
            key_norm=_join(name, norms[1]) if norms else None,
            cross=name.rpartition(".")[2] in _CROSS,
            depth=output.depth,
            resizable=not self.heads,
        )

    def _rotary_dim(self, module: nn.Module, head_dim: int) -> int:
        if not self.rotary:
            return 0
        if self.rotary_share:
            parameters: Mapping[str, float] = attrgetter("config.rope_parameters")(module)
            return int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        return int(attrgetter(self.rotary_dim)(module)) if self.rotary_dim else head_dim

    def _fault(self, module: nn.Module, wide: int, narrow: int, head_dim: int, rotary_dim: int) -> str | None:
        """What is wrong with wide = heads × head_dim rows of queries and narrow ones of keys and of values."""
        if wide % head_dim or narrow % head_dim or not narrow:
            return f"expected whole heads of {head_dim} features; got {wide} of queries, {narrow} of keys and values"
        heads, kv_heads = wide // head_dim, narrow // head_dim
        if heads % kv_heads:
            return f"{heads} heads of queries cannot share {kv_heads} heads of keys and values evenly"
        group = getattr(module, "num_key_value_groups", heads // kv_heads)
        if group * kv_heads != heads:
            return f"num_key_value_groups is {group}, but {heads} heads of queries share {kv_heads} of keys"
        if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
            return f"{rotary_dim} of {head_dim} features of a head turn; expected an even number of them"
        for norm in self.norms or ():
            sizes = {p.numel() for part in _part(module, norm) for p in part.parameters()}
            if sizes - {head_dim}:
                return f"{norm} has {sorted(sizes)} weights; expected the {head_dim} of one head"
        return None


@dataclass(frozen=True, kw_only=True)
class _Family:
    attentions: tuple[_AttentionFacts, ...] = ()
    mlps: tuple[_MLPFacts, ...] = ()
    without: Mapping[str, str] = field(default_factory=dict)
    """Class names that cannot be described, and why."""


def _llama(prefix: str, *, norms: bool = False, mixture: bool = False) -> _Family:
    """A gated MLP; separate maps of queries, keys and values; a rotary embedding of whole heads."""
    attention = _AttentionFacts(
        module=f"{prefix}Attention",
        query="q_proj",
        key="k_proj",
        value="v_proj",
        output="o_proj",
        rotary=True,
        norms=("q_norm", "k_norm") if norms else None,
    )
    without = {f"{prefix}SparseMoeBlock": _MIXTURE} if mixture else {}
    return _Family(attentions=(attention,), mlps=(_gated_mlp(f"{prefix}MLP"),), without=without)


def _gated_mlp(module: str) -> _MLPFacts:
    return _MLPFacts(module=module, inputs=("gate_proj", "up_proj"), down="down_proj", gated=True)


def _bert(prefix: str) -> _Family:
    attention = _AttentionFacts(
        module=f"{prefix}Attention",
        query="self.query",
        key="self.key",
        value="self.value",
        output="output.dense",
        head_dim="self.attention_head_size",
        others=("output.LayerNorm",),
    )
    return _Family(attentions=(attention,), mlps=(_bert_mlp(f"{prefix}Layer"),))


def _bert_mlp(module: str) -> _MLPFacts:
    return _MLPFacts(module=module, inputs=("intermediate.dense",), down="output.dense", block=True)


def _vit(prefix: str) -> _Family:
    attention = _AttentionFacts(
        module=f"{prefix}Attention", query="q_proj", key="k_proj", value="v_proj", output="o_proj"
    )
    mlp = _MLPFacts(module=f"{prefix}MLP", inputs=("fc1",), down="fc2")
    return _Family(attentions=(attention,), mlps=(mlp, _gated_mlp(f"{prefix}SwiGLUFFN")))


def _bart_attention(module: str, heads: str = "") -> _AttentionFacts:
    return _AttentionFacts(module=module, query="q_proj", key="k_proj", value="v_proj", output="out_proj", heads=heads)


def _bart_mlp(module: str) -> _MLPFacts:
    return _MLPFacts(module=module, inputs=("fc1",), down="fc2", block=True)


_FAMILIES: dict[str, _Family] = {
    "llama": _llama("Llama"),
    "mistral": _llama("Mistral"),
    "qwen2": _llama("Qwen2"),
    "qwen3": _llama("Qwen3", norms=True),
    "gemma": _llama("Gemma"),
    "gemma2": _llama("Gemma2"),
    "gemma3": _llama("Gemma3", norms=True),
    "mixtral": _llama("Mixtral", mixture=True),
    "qwen3_moe": _llama("Qwen3Moe", norms=True, mixture=True),
    "olmo2": _Family(
        mlps=(_gated_mlp("Olmo2MLP"),),
        without={"Olmo2Attention": "its norms of queries and keys run over all heads at once; factors only"},
    ),
    "phi": _Family(
        attentions=(
            _AttentionFacts(
                module="PhiAttention",
                query="q_proj",
                key="k_proj",
                value="v_proj",
                output="dense",
                rotary=True,
                rotary_dim="rotary_ndims",
                norms=("q_layernorm", "k_layernorm"),
            ),
        ),
        mlps=(_MLPFacts(module="PhiMLP", inputs=("fc1",), down="fc2"),),
    ),
    "phi3": _Family(
        attentions=(
            _AttentionFacts(
                module="Phi3Attention",
                query="qkv_proj",
                key="qkv_proj",
                value="qkv_proj",
                output="o_proj",
                heads="config.num_attention_heads",
                rotary=True,
                rotary_share=True,
            ),
        ),
        mlps=(_MLPFacts(module="Phi3MLP", inputs=("gate_up_proj",), down="down_proj", gated=True),),
    ),
    "gpt_neox": _Family(
        mlps=(_MLPFacts(module="GPTNeoXMLP", inputs=("dense_h_to_4h",), down="dense_4h_to_h"),),
        without={"GPTNeoXAttention": "queries, keys and values take turns by head in one map; factors only"},
    ),
    "gpt2": _Family(
        attentions=(
            _AttentionFacts(
                module="GPT2Attention", query="q_attn", key="c_attn", value="c_attn", output="c_proj", heads="num_heads"
            ),
            _AttentionFacts(
                module="GPT2Attention", query="c_attn", key="c_attn", value="c_attn", output="c_proj", heads="num_heads"
            ),
        ),
        mlps=(_MLPFacts(module="GPT2MLP", inputs=("c_fc",), down="c_proj"),),
    ),
    "opt": _Family(
        attentions=(_bart_attention("OPTAttention", heads="num_heads"),), mlps=(_bart_mlp("OPTDecoderLayer"),)
    ),
    "bart": _Family(
        attentions=(_bart_attention("BartAttention"),),
        mlps=(_bart_mlp("BartEncoderLayer"), _bart_mlp("BartDecoderLayer")),
    ),
    "bert": _bert("Bert"),
    "roberta": _bert("Roberta"),
    "electra": _bert("Electra"),
    "mpnet": _Family(
        attentions=(
            _AttentionFacts(
                module="MPNetSelfAttention",
                query="q",
                key="k",
                value="v",
                output="o",
                head_dim="attention_head_size",
                heads="num_attention_heads",
            ),
        ),
        mlps=(_bert_mlp("MPNetLayer"),),
    ),
    "distilbert": _Family(
        attentions=(
            _AttentionFacts(
                module="DistilBertSelfAttention",
                query="q_lin",
                key="k_lin",
                value="v_lin",
                output="out_lin",
                head_dim="attention_head_size",
            ),
        ),
        mlps=(_MLPFacts(module="FFN", inputs=("lin1",), down="lin2"),),
    ),
    "vit": _vit("ViT"),
    "deit": _vit("DeiT"),
    "dinov2": _vit("Dinov2"),
    "t5": _Family(
        attentions=(
            _AttentionFacts(
                module="T5Attention",
                query="q",
                key="k",
                value="v",
                output="o",
                head_dim="key_value_proj_dim",
                heads="n_heads",
                others=("relative_attention_bias",),
            ),
        ),
        mlps=(
            _MLPFacts(module="T5DenseActDense", inputs=("wi",), down="wo"),
            _MLPFacts(module="T5DenseGatedActDense", inputs=("wi_0", "wi_1"), down="wo", gated=True),
        ),
    ),
}


def family_of(model: nn.Module) -> str | None:
    """The family whose attention comes first in a model, as in ``config.model_type``; None if none is known."""
    return next(iter(_families(model)), None)


def find_units(model: nn.Module, sites: Iterable[Site] | None = None) -> Units:
    """The MLPs and attentions of a model whose family is known, in its order.

    ``sites`` are some of those of :func:`eckart.arch.find_sites`, by default all: a unit with a map that is
    not among them is skipped. So is one with shapes, parts or parameters other than those of the family,
    or with a map that is compressed or quantised already, or that shares its weight with another map.
    Sites inside of the blocks that no fact speaks of are listed under the name of their block. Weights
    are not read: a model on the meta device will do.
    """
    families = _families(model)
    if not families:
        return Units(skipped=(("", _NO_FACTS),))
    known = tuple(find_sites(model) if sites is None else sites)
    maps = _Maps({name: site for site in known for name in (site.name, *site.tied)}, dict(skipped_sites(model)))
    without = {module: reason for family in families.values() for module, reason in family.without.items()}
    units: list[MLP | Attention] = []
    skipped: list[tuple[str, str]] = []
    closed: list[str] = []
    covered: set[str] = set()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if is_below(name, closed):
            continue
        if kind in without:
            closed.append(name)
            skipped.append((name, without[kind]))
        elif facts := _facts(module, families):
            covered |= {_join(name, part) for part in facts.parts}
            unit = facts.unit(name, module, maps)
            if isinstance(unit, str):
                skipped.append((name, unit))
            else:
                units.append(unit)
    for block in find_blocks(model):
        left = [s.name for s in known if is_below(s.name, [block.name]) and not is_below(s.name, closed)]
        if rest := [name.removeprefix(f"{block.name}.") for name in left if name not in covered]:
            skipped.append((block.name, f"no facts about {', '.join(rest)}; factors only"))
    return Units(
        mlps=tuple(unit for unit in units if isinstance(unit, MLP)),
        attentions=tuple(unit for unit in units if isinstance(unit, Attention)),
        family=next(iter(families)),
        skipped=tuple(skipped),
    )


def _families(model: nn.Module) -> dict[str, _Family]:
    """The families whose attentions or mixtures are in a model, in its order."""
    names = {
        kind: name
        for name, family in _FAMILIES.items()
        for kind in (*(facts.module for facts in family.attentions), *family.without)
    }
    found = (names.get(type(module).__name__) for module in model.modules())
    return {name: _FAMILIES[name] for name in found if name is not None}


def _facts(module: nn.Module, families: Mapping[str, _Family]) -> _MLPFacts | _AttentionFacts | None:
    """The facts about a module; of several, the first whose parts are all there, or else the last."""
    kind = type(module).__name__
    known: list[_MLPFacts | _AttentionFacts] = []
    for family in families.values():
        known += [facts for facts in family.attentions if facts.module == kind]
        known += [facts for facts in family.mlps if facts.module == kind]
    return next((facts for facts in known if not _missing(module, facts.parts)), known[-1] if known else None)


def _missing(module: nn.Module, parts: Iterable[str]) -> str | None:
    """Says which of the parts a module lacks."""
    lacks = [part for part in parts if not _part(module, part)]
    return f"this {type(module).__name__} has no {' and no '.join(lacks)}" if lacks else None


def _strange(module: nn.Module, parts: Iterable[str]) -> str | None:
    """Says which parameters a module has outside of the parts."""
    strangers = [name for name, _ in module.named_parameters() if not is_below(name, parts)]
    return f"this {type(module).__name__} has further parameters: {', '.join(strangers)}" if strangers else None


def _part(module: nn.Module, path: str) -> list[nn.Module]:
    """The module under a dotted path, if it is there."""
    part = module
    for step in path.split("."):
        if step not in part._modules or part._modules[step] is None:
            return []
        part = part.get_submodule(step)
    return [part]


def _uneven(rows: Iterable[Rows], sites: Iterable[Site]) -> str | None:
    """Says which site has other rows than those that are accounted for."""
    for site in sites:
        accounted = sum(len(part) for part in rows if part.site == site.name)
        if accounted != site.out_features:
            return f"{site.name} has {site.out_features} rows; expected {accounted}"
    return None


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
