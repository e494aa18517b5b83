"""The residual stream: which weights read or write each of its channels, as facts about families.

Every parameter of a model has to be accounted for, or nothing is said: a channel of which one reader is unknown
cannot be taken out. ``tests/arch/test_stream.py`` proves each family by letting channels change places.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from eckart.arch.families import find_units
from eckart.arch.kinds import is_transformers_conv1d
from eckart.arch.modules import is_below
from eckart.errors import InputError, problems


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The channels that the blocks of a model add to, ``width`` of them.

    Channels may change places in all ``parameters`` at once; one that is zero in all that write it carries nothing.
    Norms over channels see how many there are: cutting zero channels out leaves RMSNorm as it is once ε is times
    width / left and its weights are times √(width / left), LayerNorm only if the mean of the rest is zero.
    """

    width: int
    parameters: tuple[tuple[str, int], ...]
    """(parameter name, its dimension of the channels): tables, norms, maps that read and maps that write, with the
    biases of the latter. Of tied parameters the first."""


@dataclass(frozen=True, kw_only=True)
class _StreamFacts:
    """What lies along the stream beside MLPs and attentions, by the ends of module names."""

    along: tuple[str, ...]
    """Tables, norms, and maps that read it."""
    beside: tuple[str, ...] = ()
    """Maps that read something else."""


def _llama(*norms: str) -> _StreamFacts:
    return _StreamFacts(along=("embed_tokens", "norm", "input_layernorm", *norms, "lm_head", "score"))


_AFTER = ("post_attention_layernorm",)
_BERT = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm", "pooler.dense")
_STREAMS: dict[str, _StreamFacts] = {
    "llama": _llama(*_AFTER),
    "mistral": _llama(*_AFTER),
    "qwen2": _llama(*_AFTER),
    "qwen3": _llama(*_AFTER),
    "gemma": _llama(*_AFTER),
    "gemma2": _llama(*_AFTER, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3": _llama(*_AFTER, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "phi3": _llama(*_AFTER),
    "phi": _llama("final_layernorm"),
    "gpt2": _StreamFacts(along=("wte", "wpe", "ln_1", "ln_2", "ln_f", "lm_head", "score")),
    "opt": _StreamFacts(
        along=("embed_tokens", "embed_positions", "self_attn_layer_norm", "final_layer_norm", "lm_head", "score")
    ),
    "bert": _StreamFacts(along=_BERT, beside=("classifier",)),
    "roberta": _StreamFacts(along=(*_BERT, "classifier.dense"), beside=("classifier.out_proj",)),
    "distilbert": _StreamFacts(
        along=(*_BERT, "sa_layer_norm", "output_layer_norm", "pre_classifier"), beside=("classifier",)
    ),
}


def find_stream(model: nn.Module) -> Stream:
    """The residual stream of a model of a known family: decoders such as Llama and GPT-2, encoders such as BERT.

    Raises InputError with every reason why nothing can be said: an unknown family, blocks that
    :func:`eckart.arch.find_units` skips, attention to another sequence, modules that no fact speaks of (such as a head
    for masked tokens, whose table is that of the embedding, but which reads what its own map made of the stream).
    """
    units = find_units(model)
    facts = _STREAMS.get(units.family)
    if facts is None:
        known = ", ".join(_STREAMS)
        raise InputError(f"no facts about the residual stream of {units.family or type(model).__name__}; of {known}.")
    faults = [f"{name or 'the model'}: {reason}" for name, reason in units.skipped]
    faults += [f"{unit.name} reads another sequence" for unit in units.attentions if unit.cross]
    readers = {rows.site for mlp in units.mlps for rows in mlp.inputs}
    readers |= {rows.site for unit in units.attentions for rows in (unit.query, unit.key, unit.value)}
    writers = {mlp.down for mlp in units.mlps} | {unit.output for unit in units.attentions}
    inside = [name for unit in units.attentions for name in (unit.query_norm, unit.key_norm) if name]
    found: dict[str, int] = {}
    seen: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        if is_below(owner, inside) or _ends(owner, facts.beside):
            continue
        turned = is_transformers_conv1d(module)
        reads = owner in readers or (isinstance(module, nn.Linear) and _ends(owner, facts.along))
        if owner in writers:
            dim = int(turned) if kind == "weight" else 0
        elif reads and kind == "weight":
            dim = int(not turned)
        elif reads:
            continue  # the bias of what it computes
        elif _ends(owner, facts.along):
            dim = parameter.ndim - 1
        else:
            faults.append(f"{name} {tuple(parameter.shape)}: no fact says how it touches the stream")
            continue
        if id(parameter) not in seen:
            found[name] = seen[id(parameter)] = dim
        elif seen[id(parameter)] != dim:
            faults.append(f"{name} is tied, and has its channels elsewhere")
    widths = {model.get_parameter(name).shape[dim] for name, dim in found.items()}
    if not faults and len(widths) != 1:
        faults.append(f"its parts are {sorted(widths)} wide")
    if faults:
        raise InputError(problems("the residual stream of this model is not known", faults))
    return Stream(width=widths.pop(), parameters=tuple(found.items()))


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)
