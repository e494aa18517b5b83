"""Layers with adapters beside them, in PEFT's protocol. The base layer is never changed except by a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from eckart.adaptation import Delta, Layout
from eckart.arch.kinds import is_experts, unfit, weights_of
from eckart.errors import EckartError, InputError, NotFiniteError
from eckart.hf.adapters.check import CHECK, SIZE, compare, record
from eckart.hf.adapters.sharded import gathered, is_spread, spread, standing_in
from eckart.layers.linear import ReplacedLinear
from eckart.linalg import fold, matricize
from eckart.records import SiteKind

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def refused(module: nn.Module, quantised: bool) -> str | None:
    """Why no adapter can lie beside this module, a sentence without a subject; None where one can."""
    if is_experts(module):
        return "the weights of its experts are quantised" if quantised else unfit(module)
    if hasattr(module, "parametrizations"):
        return "its weight is parametrised; remove the parametrisation first"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear" or isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight without calling the layer"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "max_norm changes its weight in every forward pass"
        if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return f"{type(module).__name__} has a forward of its own"
        return None
    if quantised or isinstance(module, ReplacedLinear) or type(module) is Conv1D:
        return None
    for base in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, base):
            own = type(module).forward is not base.forward
            return f"{type(module).__name__} has a forward of its own" if own else None
    return f"{type(module).__name__} is no linear layer, convolution or embedding that is known here"


def kind_of(module: nn.Module) -> SiteKind:
    """The kind of a module that is not :func:`refused`."""
    if is_experts(module):
        return "experts"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv"
    return "conv1d" if isinstance(module, Conv1D) else "linear"


def adapted_parameters(name: str, module: nn.Module) -> dict[str, str]:
    """The weights of a module that adapters change: the parameter's name by its own dotted path, or the module's where
    there is one alone."""
    if not is_experts(module):
        return {name: "weight"}
    return {f"{name}.{weight.parameter}": weight.parameter for weight in weights_of(module)}


def layout_of(name: str, module: Any, parameter: str = "weight") -> Layout:
    """Sizes of a weight of a module that is not :func:`refused`, without looking at its numbers."""
    kind = kind_of(module)
    if kind == "experts":
        experts, m, n = getattr(module, parameter).shape
        return Layout(name=name, kind=kind, slices=int(experts), out_features=int(m), in_features=int(n))
    if kind == "conv":
        groups, shape = int(module.groups), tuple(module.weight.shape)
        inner = torch.Size(shape[1:]).numel()
        return Layout(
            name=name,
            kind=kind,
            slices=groups,
            out_features=shape[0] // groups,
            in_features=inner,
            kernel=shape[2:],
        )
    if kind == "embedding":
        rows, width = int(module.num_embeddings), int(module.embedding_dim)
        return Layout(name=name, kind=kind, out_features=width, in_features=rows)
    if kind == "conv1d":
        rows, width = module.weight.shape
        return Layout(name=name, kind=kind, out_features=int(width), in_features=int(rows))
    m, n = int(module.out_features), int(module.in_features)
    return Layout(name=name, kind=kind, out_features=m, in_features=n)


class AdapterLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """y = layer(x) + Σ ΔW x over the active adapters, each in float32 whatever the dtype of the layer.

    Merging adds in float32 and rounds once; the old weight is kept, and unmerging puts it back, bit for bit.
    """

    parameter_name: str = "weight"
    """Of the base layer, which the adapter changes."""
    adapter_layer_names = ("eckart_delta",)
    other_param_names = ("eckart_dropout",)
    eckart_delta: nn.ModuleDict
    # What BaseTunerLayer brings, said for type checkers, which would look for children of the module.
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    merged: bool
    disable_adapters: bool
    active_adapters: list[str]
    _active_adapter: str | list[str]
    _get_embed_scale: Callable[[], Tensor | None]
    _get_base_layer_device_and_dtype: Callable[[nn.Module], tuple[torch.device | None, torch.dtype | None]]

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self.eckart_delta = nn.ModuleDict({})
        self.eckart_dropout: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before: tuple[nn.Module, nn.Parameter, Tensor] | None = None
        """Base layer, its weight and that one's data before the first merge."""

    def update_layer(self, adapter_name: str, delta: Delta, dropout: float, inference_mode: bool) -> None:
        # NaN: room for a file's record; zeros: a fresh adapter, of which nothing is recorded yet.
        empty = torch.full((SIZE,), 0.0 if delta.started else torch.nan, dtype=torch.float64)
        delta.register_buffer(CHECK, empty)
        self.eckart_delta[adapter_name] = delta
        self.eckart_dropout[adapter_name] = dropout
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT would cast to the dtype of the base layer too; adapters stay in float32."""
        if adapter_name not in self.eckart_delta:
            return
        delta = self.delta(adapter_name)
        target = self._get_base_layer_device_and_dtype(self.get_base_layer())[0] if device is None else device
        devices = {t.device for t in [*delta.parameters(), *delta.buffers()]}
        meta = torch.device("meta")
        if target not in (None, meta) and meta not in devices and devices != {target}:
            delta.to(target)

    def dense_weight(self) -> Tensor:
        """The base weight (slices, out, in) as it acts, dequantised. Raises InputError where it cannot be had."""
        return dense_weight(self.get_base_layer(), self.quantization_backend, self.parameter_name)

    def get_base_weight(self) -> Tensor:
        if self.quantization_backend is not None:
            return self.quantization_backend.get_base_weight(self.get_base_layer())  # type: ignore[no-any-return]
        return getattr(self.get_base_layer(), self.parameter_name).data  # type: ignore[no-any-return]

    def set_base_weight(self, weight_data: Tensor) -> None:
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight_data)
        else:
            getattr(self.get_base_layer(), self.parameter_name).data = weight_data

    @property
    def base_key(self) -> str:
        """The changed weight's name in a state dict, from this layer on; adapters of experts lie inside each other."""
        depth, inner = 1, self.base_layer
        while isinstance(inner, BaseTunerLayer):
            depth, inner = depth + 1, inner.base_layer
        return "base_layer." * depth + self.parameter_name

    def delta(self, adapter_name: str) -> Delta:
        """The adapter of that name."""
        return cast(Delta, self.eckart_delta[adapter_name])

    def active_deltas(self) -> list[tuple[str, Delta]]:
        """Names and deltas that act now. Raises EckartError for one whose numbers never came."""
        found = [(name, self.delta(name)) for name in self.active_adapters if name in self.eckart_delta]
        for name, delta in found:
            if not delta.started and not self._arrived(name, delta):
                raise EckartError(
                    f"the adapter {name!r} was made for the numbers of a file, and none were loaded. Load them with "
                    "PeftModel.from_pretrained, or set config.saved = False for a fresh start."
                )
        return found

    @torch.no_grad()
    def record(
        self, adapter_name: str, numbers: Mapping[str, Tensor] | None = None, base: Tensor | None = None
    ) -> Tensor | None:
        """What :func:`eckart.hf.adapters.check.record` says, or None where the numbers are not all here.

        ``numbers`` and ``base``: the parameters of the adapter and the stored weight of the layer, for those that are
        spread over processes.
        """
        delta, layer = self.delta(adapter_name), self.get_base_layer()
        own = dict(numbers or {}) if spread(delta) else {}
        if self.merged or any(p.is_meta or (spread(delta) and n not in own) for n, p in delta.named_parameters()):
            return None
        if any(is_spread(p) for p in layer.parameters()):
            if base is None or self.quantization_backend is not None or isinstance(layer, ReplacedLinear):
                return None
            kind = kind_of(layer)
            weight = matricize(gathered(base).detach(), kind, int(layer.groups) if kind == "conv" else 1)
        else:
            if any(p.is_meta for p in layer.parameters()):
                return None
            try:
                weight = self.dense_weight()
            except InputError:  # a quantised layer that does not give its weight back
                return None
        with standing_in(delta, own):
            return record(weight, delta.delta() if delta.linear else None)

    def _arrived(self, name: str, delta: Delta) -> bool:
        """Whether numbers came without PEFT's own loading, which checks them: transformers puts them in place."""
        kept: Tensor = getattr(delta, CHECK)
        if kept.is_meta or kept.isnan().any():
            return False
        delta.started = True
        # See the tuner: numbers in a mapped file lie at any address.
        delta._apply(torch.clone)  # type: ignore[no-untyped-call]
        delta.arrived()
        if (now := self.record(name)) is not None:
            compare({delta.layout.name: kept}, {delta.layout.name: now})
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        dtype = result.dtype
        y = result
        for name, delta in self.active_deltas():
            given, (work, cast_up) = x, _working(delta)
            if x.is_floating_point():
                given = F.dropout(x.to(work), self.eckart_dropout[name], self.training)
            if cast_up:
                with standing_in(delta, cast_up):
                    y = y + self.added(delta, given, result)
            else:
                y = y + self.added(delta, given, result)
        return y.to(dtype)

    def added(self, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        """What one adapter adds to the output y for the input x."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW in the shape of the layer's weight, float32."""
        delta = self.delta(adapter)
        return fold(delta.delta(), delta.layout.kind, _shape(delta.layout))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return all(self.delta(name).linear for name in self.eckart_delta)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW of the adapters to the weight. ``safe_merge`` refuses NaN and Inf with the weight as it was."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.eckart_delta]
        if not names:
            return
        base = self.get_base_layer()
        if reason := self._unmergeable(names):
            raise EckartError(reason)
        weight = self.get_base_weight()
        merged = weight.float()
        if self._before is not None and self.quantization_backend is None:
            # From the weight of before all merges again, so that several merges are rounded once too.
            merged, names = self._before[2].float(), [*self.merged_adapters, *names]
            self.merged_adapters = []
        for name in names:
            merged = merged + self.get_delta_weight(name).to(weight.device)
        if safe_merge and not merged.isfinite().all():
            raise NotFiniteError(f"the merged weight holds NaN or Inf; the adapters {names} are broken.")
        if self._before is None:
            stored = getattr(base, self.parameter_name)
            self._before = (base, stored, stored.data)
        self.set_base_weight(merged.to(weight.dtype))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the weight of before the merges, the same tensor."""
        if self._before is None:
            return
        base, parameter, data = self._before
        if self.get_base_layer() is not base:
            self.base_layer = base
        setattr(base, self.parameter_name, parameter)
        parameter.data = data
        self._before = None
        self.merged_adapters.clear()

    def _unmergeable(self, names: list[str]) -> str | None:
        base = self.get_base_layer()
        if any(is_spread(p) for p in self.parameters()):
            return "the model is spread over processes; save the adapter, and merge it into a model that is whole."
        if isinstance(base, ReplacedLinear):
            kind = type(base).__name__
            return (
                f"an adapter cannot be merged into a {kind}: the sum is not {kind} any more. Keep it beside the layer, "
                "or make the model dense first: eckart export DIR --to dense."
            )
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            return f"{self.quantization_backend.backend_name} layers cannot be merged into; keep the adapter beside it."
        for name in names:
            if not self.delta(name).linear:
                return f"the adapter {name!r} is not linear in its input, so it cannot be merged into a weight."
        return None

    def __repr__(self) -> str:
        return f"eckart.{super().__repr__()}"


class AdapterLinear(AdapterLayer):
    """Beside nn.Linear, transformers' Conv1D, Eckart's own linear layers and quantised ones."""

    def added(self, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = delta(x, y)
        return found


class AdapterConv(AdapterLayer):
    """Beside nn.Conv1d, 2d, 3d, with the stride, padding, padding mode, dilation and groups of the base layer."""

    def added(self, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        base: Any = self.get_base_layer()
        factors = delta.factors()
        if factors is None:
            found: Tensor = base._conv_forward(x, delta.delta().reshape(base.weight.shape), None)
            return found
        B, A = factors
        groups, m, k = B.shape
        inner = base._conv_forward(x, A.reshape(groups * k, *base.weight.shape[1:]), None)
        ones = (1,) * (base.weight.ndim - 2)
        outer: Tensor = _CONVOLUTIONS[base.weight.ndim](inner, B.reshape(groups * m, k, *ones), None, groups=groups)
        return outer


class AdapterEmbedding(AdapterLayer):
    """Beside nn.Embedding, also one that scales its output."""

    def added(self, delta: Delta, x: Tensor, y: Tensor) -> Tensor:
        factors = delta.factors()
        if factors is None:
            found = F.embedding(x, delta.delta()[0].T)
        else:
            found = F.embedding(x, factors[1][0].T) @ factors[0][0].T
        scale = self._get_embed_scale()
        return found if scale is None else found * scale.to(found.dtype)


class AdapterExperts(AdapterLayer):
    """Beside one fused parameter (experts, out, in) of the experts of a mixture.

    The experts run with W + ΔW in place of W, in W's dtype, so that their own routing and kernels serve: a sum of W's
    size per forward pass, and a gradient of that size. What is beside a second parameter lies around this one.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.parameter_name = parameter_name

    def update_layer(self, adapter_name: str, delta: Delta, dropout: float, inference_mode: bool) -> None:
        if dropout:
            raise InputError(
                f"{delta.layout.name}: experts read their inputs inside, so dropout is 0 here; got {dropout}."
            )
        super().update_layer(adapter_name, delta, dropout, inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        weight = getattr(base_layer, self.parameter_name)
        return weight.device, weight.dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self.active_deltas()
        base = self.get_base_layer()
        weight: Tensor = getattr(base, self.parameter_name)
        changed = weight
        for _, delta in active:
            with standing_in(delta, _working(delta)[1]):
                changed = changed + delta.delta()
        with standing_in(base, {self.parameter_name: changed.to(weight.dtype)} if active else {}):
            found: Tensor = self.base_layer(x, *args, **kwargs)
        return found

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """For PEFT: the experts without what lies around them, merged or as they were."""
        layer: nn.Module = self
        while isinstance(layer, AdapterExperts):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer


LAYERS: dict[SiteKind, type[AdapterLayer]] = {
    "linear": AdapterLinear,
    "conv1d": AdapterLinear,
    "conv": AdapterConv,
    "embedding": AdapterEmbedding,
}


def dense_weight(base: nn.Module, backend: Any, parameter: str = "weight") -> Tensor:
    """The weight (slices, out, in) of a layer, detached and dequantised.

    Raises InputError where a quantised layer does not give it back.
    """
    if isinstance(base, ReplacedLinear):
        return base.dense().detach()[None]  # type: ignore[operator, no-any-return]
    if backend is not None:
        if not backend.supports_merge:
            raise InputError(f"{backend.backend_name} layers do not give their weight back")
        return backend.get_base_weight(base).detach()[None]  # type: ignore[no-any-return]
    weight: Any = getattr(base, parameter)
    kind = kind_of(base)
    return matricize(weight.detach(), kind, int(base.groups) if kind == "conv" else 1)  # type: ignore[arg-type]


def _working(delta: Delta) -> tuple[torch.dtype, dict[str, Tensor]]:
    """The dtype in which an adapter acts, float32 or more, and what has to be cast for it.

    Adapters are made in float32; ``model.to(dtype)`` and the mixed precision of FSDP cast them, or some of them.
    """
    tensors = {
        name: tensor
        for name, tensor in [*delta._parameters.items(), *delta._buffers.items()]
        if tensor is not None and tensor.is_floating_point() and name != CHECK
    }
    work = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
    return work, {name: tensor.to(work) for name, tensor in tensors.items() if tensor.dtype != work}


def _shape(layout: Layout) -> tuple[int, ...]:
    """Of the stored weight."""
    if layout.kind == "conv":
        channels = layout.in_features // torch.Size(layout.kernel).numel()
        return (layout.slices * layout.out_features, channels, *layout.kernel)
    if layout.kind == "experts":
        return (layout.slices, layout.out_features, layout.in_features)
    shape = (layout.out_features, layout.in_features)
    return shape[::-1] if layout.kind in ("conv1d", "embedding") else shape
