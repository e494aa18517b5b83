"""How transformers loads and saves models with factored layers: its quantizer interface.

``config.json`` names every factored module with its form and rank. ``from_pretrained`` builds the dense
architecture on the meta device, this quantizer puts empty factored layers in place, and the factors
are loaded like any other weights. The slot is the one that transformers has for quantisers, and it has one only: where
torchao has quantised linear layers as well, its own quantizer works inside of this one.

Note [Loading without Eckart]. transformers only warns about a quantisation method that it does not know, and
goes on with random numbers for the weights that it misses. So every factored weight leaves an empty tensor
under its dense name in the files: a shape mismatch, which stops ``from_pretrained``. A class that holds none
of the factored modules loads without Eckart, and rightly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.torchao import TorchAoDeserialize
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils import is_torchao_available
from transformers.utils.quantization_config import QuantizationConfigMixin, TorchAoConfig

from eckart.errors import FileError, InputError, problems, unknown
from eckart.hf.tensor_parallel import adapt_plan, restore_plan
from eckart.layers import (
    FACTORED,
    FactoredExperts,
    SNNKLinear,
    SparseLinear,
    TiedLayer,
    dense_keys,
    describe,
    is_narrowed,
    layer_skeleton,
    widened,
)

QUANT_METHOD = "eckart"
FORMAT_VERSION = 1
_NEEDS = {
    "quantised": "quantised",
    "group-sparse": "coded",
    "sparse": "sparse",
    "vector-coded": "coded",
    "random-features": "random-features",
}
"""Kinds of layers that a reader of the first version does not know, and the feature that each belongs to."""
FEATURES = frozenset({*_NEEDS.values(), "torchao"})
"""What a checkpoint may list under ``requires`` for this version to read it: layers with integer weights of Eckart's,
with coded ones, with zeros that are not stored, blocks on random features, and an ``inner`` config of torchao's."""


class EckartConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``config.quantization_config`` of a compressed model.

    ``modules``: what each factored layer is, by dotted name (:func:`eckart.layers.describe`). ``inner``: the config of
    torchao, where it has quantised linear layers of the model. Unknown keys are left alone; a format version or an
    entry of ``requires`` unknown to this version raises FileError, as does a missing torchao.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        requires: list[str] | None = None,
        inner: TorchAoConfig | Mapping[str, Any] | None = None,
        **_optional: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.modules = {name: dict(entry) for name, entry in (modules or {}).items()}
        if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
            raise FileError(
                f"this checkpoint has format version {format_version!r}; this Eckart reads up to "
                f"{FORMAT_VERSION}. Update it: pip install -U eckart."
            )
        if missing := sorted(set(requires or ()) - FEATURES):
            raise FileError(
                f"this checkpoint requires {', '.join(missing)}, which this Eckart does not know. "
                "Update it: pip install -U eckart."
            )
        self.inner = _torchao_config(inner) if isinstance(inner, Mapping) else inner
        if self.inner is not None:  # PEFT looks for it here when it merges an adapter into such a layer
            self.get_apply_tensor_subclass = self.inner.get_apply_tensor_subclass

    @property
    def requires(self) -> list[str]:
        """The features of the format that a reader has to know."""
        found = {_NEEDS[entry["kind"]] for entry in self.modules.values() if entry.get("kind") in _NEEDS}
        return sorted(found) + ["torchao"] * (self.inner is not None)

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "modules": {name: dict(entry) for name, entry in self.modules.items()},
        }
        if self.inner is not None:
            found["inner"] = self.inner.to_dict()
        return found | ({"requires": self.requires} if self.requires else {})


def _torchao_config(inner: Mapping[str, Any]) -> TorchAoConfig:
    if inner.get("quant_method") != "torchao":
        raise FileError(
            f"this checkpoint has layers quantised by {inner.get('quant_method')!r}, which this Eckart does not know. "
            "Update it: pip install -U eckart."
        )
    if not is_torchao_available():
        raise FileError("torchao has quantised layers of this checkpoint, and it is not installed: pip install torchao")
    return TorchAoConfig.from_dict(dict(inner))


class EckartQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts factored layers into a model that is about to be loaded, and describes them when it is saved."""

    def __init__(self, quantization_config: EckartConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise InputError(
                "Eckart compresses with calibration data, not while a dense model is loaded: use "
                "eckart.compress, and leave quantization_config out of from_pretrained."
            )
        inner = quantization_config.inner
        self.inner = None if inner is None else TorchAoHfQuantizer(inner, pre_quantized=True)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.inner is not None:
            self.inner.validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        put_skeletons(model, self.quantization_config.modules)
        if self.inner is not None:
            self.inner._process_model_before_weight_loading(model, **kwargs)
            _name_as_here(self.inner.metadata, model)
        return model

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        return {} if self.inner is None else self.inner.serialized_names

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        quantizer: Any = super() if self.inner is None else self.inner
        found: list[Any] = quantizer.update_weight_conversions(weight_conversions, model)
        return found

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """Called by transformers with the plans of tensor and expert parallelism, before the model is shared out."""
        adapt_plan(model, plan)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        restore_plan(getattr(model, "tp_plan", None) or {})
        for layer in model.modules():
            if isinstance(layer, SNNKLinear):
                layer.draw()  # the seed has been read by now
            elif isinstance(layer, SparseLinear):
                layer.unpack()
        align(model)
        attach(model, self)
        if self.inner is not None:  # get_state_dict_and_metadata does the reverse; transformers would try to, and fails
            kept = [c for c in model._weight_conversions if not _reads_torchao(c)]  # type: ignore[union-attr]
            model._weight_conversions = kept  # type: ignore[assignment]
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        densify(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.inner is None or self.inner.is_trainable

    @property
    def is_qat_trainable(self) -> bool:
        return self.inner is None

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Called by ``save_pretrained`` before it writes: the weights, and ``config`` brought up to date.

        See Note [Loading without Eckart] for the empty tensors. Raises InputError for weights of torchao's that no
        inner config speaks of.
        """
        entries = describe(model)
        self.quantization_config.modules = entries
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        if self.inner is None:
            if strange := [name for name, weight in model.named_parameters() if is_torchao(weight)]:
                raise InputError(
                    f"torchao has quantised weights of this model ({strange[0]}, …), which Eckart was not told of. "
                    "Call eckart.hf.torchao.quantise_torchao(model, …) before saving; it keeps them."
                )
            state, metadata = dict(model.state_dict()), {}
        else:
            state, metadata = self.inner.get_state_dict_and_metadata(model)
        for name, entry in entries.items():
            layer = model.get_submodule(name)
            for key in dense_keys(name, entry):
                state[key] = _empty(layer, key.rpartition(".")[2])
        return state, metadata


def is_torchao(weight: Tensor) -> bool:
    """Whether a weight is one of torchao's tensor subclasses."""
    return type(weight.data).__module__.partition(".")[0] == "torchao"


def _name_as_here(metadata: dict[str, str], model: nn.Module) -> None:
    """Let torchao's account of each tensor be found under its name in ``model`` too (see :func:`resolve`)."""
    names = json.loads(metadata["tensor_names"])
    for name in list(names):
        module, _, weight = name.rpartition(".")
        here = resolve(model, module)
        if here not in (None, module):
            metadata[f"{here}.{weight}"] = metadata[name]
            names.append(f"{here}.{weight}")
    metadata["tensor_names"] = json.dumps(names)


def _reads_torchao(conversion: Any) -> bool:
    return any(isinstance(operation, TorchAoDeserialize) for operation in getattr(conversion, "operations", ()))


def _empty(layer: nn.Module, weight: str) -> Tensor:
    """A tensor without entries in a storage of its own, since tensors in one storage count as tied."""
    tensors = (*layer.parameters(), *layer.buffers())
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    if isinstance(layer, FactoredExperts):  # some checkpoints split this weight by expert: keep that possible
        experts, _, n = layer.shapes[weight]
        return torch.zeros(1, dtype=dtype)[:0].reshape(experts, 0, n)
    return torch.zeros(1, dtype=dtype)[:0]


def resolve(model: nn.Module, name: str) -> str | None:
    """The name in ``model`` of the module that a checkpoint calls ``name``, None where this class lacks it.

    A checkpoint of a model with a head can be loaded into the bare model and the other way round, so names
    are tried with and without ``base_model_prefix``, as transformers does for the weights.
    """
    prefix = getattr(model, "base_model_prefix", "")
    tries = [name]
    if prefix:
        tries += [f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
    for candidate in tries:
        try:
            model.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    return None


def put_skeletons(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the modules that ``modules`` names by empty factored layers on their device.

    Raises FileError where an entry does not fit the architecture or none of them belongs to it.
    """
    found: list[str] = []
    ignored: list[str] = []
    wrong: list[str] = []
    # Parents before their children, tables before what is tied to them.
    for name, entry in sorted(modules.items(), key=lambda item: ("table" in item[1], item[0].count("."))):
        here = resolve(model, name)
        if here is None:
            continue
        table_name = entry.get("table")
        table = None if table_name is None else resolve(model, table_name)
        if table is not None:
            entry = {**entry, "table": table}
        try:
            owner = None if table is None else model.get_submodule(table)
            layer = layer_skeleton(entry, model.get_submodule(here), owner)
        except (InputError, KeyError, TypeError, ValueError) as error:
            wrong.append(f"{name}: {error}")
            continue
        model.set_submodule(here, layer)
        found.append(here)
        ignored += dense_keys(here, entry) + dense_keys(name, entry)
    if wrong:
        raise FileError(problems("quantization_config does not fit this model", wrong))
    if modules and not found:
        names = [name for name, _ in model.named_modules() if name]
        raise FileError(
            f"none of the factored modules exists in {type(model).__name__}: "
            + unknown("module", next(iter(modules)), names)
        )
    patterns = {rf"^{re.escape(key)}$" for key in ignored}
    model._keys_to_ignore_on_load_unexpected = {  # type: ignore[assignment]
        *(model._keys_to_ignore_on_load_unexpected or ()),  # type: ignore[misc]
        *patterns,
    }
    drop_lost_ties(model)


def drop_lost_ties(model: nn.Module) -> None:
    """Forget ties to weights that no longer exist, which transformers would otherwise try to tie again."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        there = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        factored = [name for name, layer in module.named_modules() if isinstance(layer, FACTORED)]
        gone = {f"{name}.{part}" for name in factored for part in ("weight", "bias")} - there
        declared = module._tied_weights_keys
        if isinstance(declared, dict) and any(a in gone or b in gone for a, b in declared.items()):
            module._tied_weights_keys = {a: b for a, b in declared.items() if a not in gone and b not in gone}
        known = getattr(module, "all_tied_weights_keys", None)
        if known:
            kept = {a: b for a, b in known.items() if a not in gone and b not in gone}
            module.all_tied_weights_keys = kept


def align(model: nn.Module) -> None:
    """Copy CPU weights that lie at odd addresses of a mapped file, as all do behind a factor of odd rank.

    Matrix products round differently there (1e-8 in float32) and are slower; aligned, a loaded model computes
    bit for bit what the saved one did.
    """
    for weight in model.parameters():
        if weight.device.type == "cpu" and not is_torchao(weight) and weight.data_ptr() % 64:
            weight.data = weight.data.clone()


def attach(model: nn.Module, quantizer: EckartQuantizer) -> None:
    """Let ``save_pretrained`` of the model, and of models inside it, write factored layers.

    The model does not count as quantised, so ``half()`` and training are allowed, unless torchao has quantised layers.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.hf_quantizer = quantizer
            module.is_quantized = quantizer.inner is not None
            module.quantization_method = QUANT_METHOD
            if hasattr(module.config, "_is_quantized") and quantizer.inner is None:
                del module.config._is_quantized
    model.config.quantization_config = quantizer.quantization_config  # type: ignore[union-attr]


def densify(model: nn.Module) -> int:
    """Replace every layer of Eckart's by the dense one that it stands for; returns how many there were.

    Heads and tables that shared factors share the dense table afterwards. Weights of torchao's become plain ones.
    """
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and is_torchao(weight):
                module.register_parameter(name, nn.Parameter(weight.dequantize()))
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, FACTORED)]
    tops = {name for name, _ in found if not any(name.startswith(f"{other}.") for other, _ in found)}
    for name, layer in reversed(found):  # children of factored layers first, which become trainable again by that
        if name not in tops:
            model.set_submodule(name, layer.to_dense())
    layers = [(name, layer) for name, layer in found if name in tops]
    dense = {id(layer): layer.to_dense() for _, layer in layers}
    for name, layer in layers:
        new = dense[id(layer)]
        if isinstance(layer, TiedLayer):
            new.weight = dense[id(layer.table)].get_parameter("weight")
        model.set_submodule(name, new)
    narrow = [name for name, layer in model.named_modules() if is_narrowed(layer)]
    for name in narrow:
        model.set_submodule(name, widened(model.get_submodule(name)))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _find_ties(module)
    return len({*narrow, *(name for name, _ in found)})


def _find_ties(model: PreTrainedModel) -> None:
    """Set the ties that the class declares and the weights really have."""
    model.__dict__.pop("_tied_weights_keys", None)
    declared = model.get_expanded_tied_weights_keys(all_submodels=True)
    there = dict(model.named_parameters(remove_duplicate=False))
    kept = {a: b for a, b in declared.items() if a in there and b in there and there[a] is there[b]}
    if kept != declared and isinstance(model._tied_weights_keys, dict):
        lost = {name for pair in declared.items() - kept.items() for name in pair[:1]}
        model._tied_weights_keys = {a: b for a, b in model._tied_weights_keys.items() if a not in lost}
    model.all_tied_weights_keys = kept
