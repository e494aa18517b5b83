"""How transformers loads and saves models with factored layers: its quantizer interface.

``config.json`` names every factored module with its form and rank. ``from_pretrained`` builds the dense
architecture on the meta device, this quantizer puts empty factored layers in place, and the factors
are loaded like any other weights. Nothing is quantised; the slot is the one that transformers has for this.

Note [Loading without Eckart]. transformers only warns about a quantisation method that it does not know, and
goes on with random numbers for the weights that it misses. So every factored weight leaves an empty tensor
under its dense name in the files: a shape mismatch, which stops ``from_pretrained``. A class that holds none
of the factored modules loads without Eckart, and rightly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.errors import FileError, InputError, problems, unknown
from eckart.layers import FACTORED, FactoredExperts, TiedLayer, dense_keys, describe, layer_skeleton

QUANT_METHOD = "eckart"
FORMAT_VERSION = 1
FEATURES: frozenset[str] = frozenset()
"""What a checkpoint may list under ``requires`` for this version to read it."""


class EckartConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``config.quantization_config`` of a compressed model.

    ``modules``: what each factored layer is, by dotted name (:func:`eckart.layers.describe`). Unknown keys
    are left alone; a format version or an entry of ``requires`` unknown to this version raises FileError.
    """

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        requires: list[str] | None = None,
        **_optional: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.modules = {name: dict(entry) for name, entry in (modules or {}).items()}
        self.requires = list(requires or [])
        if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
            raise FileError(
                f"this checkpoint has format version {format_version!r}; this Eckart reads up to "
                f"{FORMAT_VERSION}. Update it: pip install -U eckart."
            )
        if missing := sorted(set(self.requires) - FEATURES):
            raise FileError(
                f"this checkpoint requires {', '.join(missing)}, which this Eckart does not know. "
                "Update it: pip install -U eckart."
            )

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "modules": {name: dict(entry) for name, entry in self.modules.items()},
        }
        return found | ({"requires": self.requires} if self.requires else {})


class EckartQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts factored layers into a model that is about to be loaded, and describes them when it is saved."""

    def __init__(self, quantization_config: EckartConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise InputError(
                "Eckart compresses with calibration data, not while a dense model is loaded: use "
                "eckart.compress, and leave quantization_config out of from_pretrained."
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        put_skeletons(model, self.quantization_config.modules)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        align(model)
        attach(model, self)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        densify(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Called by ``save_pretrained`` before it writes: the weights, and ``config`` brought up to date.

        See Note [Loading without Eckart] for the empty tensors.
        """
        entries = describe(model)
        self.quantization_config.modules = entries
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        state = dict(model.state_dict())
        for name, entry in entries.items():
            layer = model.get_submodule(name)
            for key in dense_keys(name, entry):
                state[key] = _empty(layer, key.rpartition(".")[2])
        return state, {}


def _empty(layer: nn.Module, weight: str) -> Tensor:
    """A tensor without entries in a storage of its own, since tensors in one storage count as tied."""
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
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
    for name, entry in sorted(modules.items(), key=lambda item: "table" in item[1]):
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
        if weight.device.type == "cpu" and weight.data_ptr() % 64:
            weight.data = weight.data.clone()


def attach(model: nn.Module, quantizer: EckartQuantizer) -> None:
    """Let ``save_pretrained`` of the model, and of models inside it, write factored layers.

    The model does not count as quantised: its weights are ordinary, so ``half()`` and training are allowed.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.hf_quantizer = quantizer
            module.is_quantized = False
            module.quantization_method = QUANT_METHOD
            if hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
    model.config.quantization_config = quantizer.quantization_config  # type: ignore[union-attr]


def densify(model: nn.Module) -> int:
    """Replace every factored layer by the dense one that it stands for; returns how many there were.

    Heads and tables that shared factors share the dense table afterwards.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, FACTORED)]
    dense = {id(layer): layer.to_dense() for _, layer in layers}
    for name, layer in layers:
        new = dense[id(layer)]
        if isinstance(layer, TiedLayer):
            new.weight = dense[id(layer.table)].get_parameter("weight")
        model.set_submodule(name, new)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _find_ties(module)
    return len(layers)


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
