"""PEFT's side of the adapters: the tuner, its registration, what it saves and what it checks when it loads.

Note [A tuner from outside]. PEFT knows tuners by an enum without further members, and refuses to register a name that
is not among them. So the member ECKART is added to the enum in place, as the class itself would make it. It happens as
soon as both PEFT and Eckart have been imported, in either order (:mod:`eckart.hooks`). A process without Eckart fails
on such an adapter with a KeyError that says so; it loads the plain-LoRA copy beside it.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import PeftType, get_quantization_kwargs, register_peft_method, resolve_quantization_backend
from torch import Tensor, nn

from eckart.adaptation import CAP, Delta, Layout, Source, adapt_options, gains, get_adaptation, limit, spread_ranks
from eckart.errors import EckartError, EckartWarning, InputError, NotFiniteError, problems
from eckart.hf.adapter_files import WEIGHTS
from eckart.hf.adapters.check import CHECK, compare
from eckart.hf.adapters.config import PEFT_TYPE, WRITTEN_TYPE, AdapterConfig
from eckart.hf.adapters.export import FOLDER, write_lora_copy
from eckart.hf.adapters.layers import (
    LAYERS,
    AdapterExperts,
    AdapterLayer,
    adapted_parameters,
    dense_weight,
    layout_of,
    refused,
)
from eckart.hf.adapters.sharded import gathered, whole
from eckart.layers.linear import ReplacedLinear
from eckart.linalg import leading_svd
from eckart.moments import SiteMoments
from eckart.records import Budget


class AdapterTuner(BaseTuner):  # type: ignore[misc]
    """Puts the deltas of a method of :mod:`eckart.adaptation` beside the layers of a model."""

    prefix = "eckart_"
    tuner_layer_cls = AdapterLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """Check every target and settle every rank before anything is changed."""
        _all_linear(peft_config, model)
        self._quantization = get_quantization_kwargs(model)
        modules = dict(self._targets(peft_config, model))
        faults = [f"{name}: {why}" for name, base in modules.items() if (why := refused(base, self._quantised(base)))]
        if faults:
            raise InputError(problems("these layers cannot be adapted", faults))
        if not peft_config.saved:
            targets = {
                path: (base, parameter)
                for name, base in modules.items()
                for path, parameter in adapted_parameters(name, base).items()
            }
            self._settle(peft_config, targets)
            peft_config.ranks = self._ranks(peft_config, model, targets)

    def _settle(self, config: AdapterConfig, targets: dict[str, tuple[nn.Module, str]]) -> None:
        """Measure the options that a method takes from the weights or moments. Broken layers are named later."""
        method = get_adaptation(config.method)
        if method.settle is None:
            return

        def sources() -> Iterator[Source]:
            for name, (base, parameter) in targets.items():
                if not any(p.is_meta for p in base.parameters()):
                    source = self._source(config, layout_of(name, base, parameter), base, parameter)
                    if source.weight.sum().isfinite():
                        yield source

        config.options = asdict(method.settle(adapt_options(method, config.options), sources()))

    def _targets(self, config: AdapterConfig, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Names and base layers that the config asks for; nothing inside of adapters that are there."""
        inside: list[str] = []
        for name, module in model.named_modules():
            if not name or any(name.startswith(prefix) for prefix in inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside.append(f"{name}.")
            if self._check_target_module_exists(config, name):
                yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module

    def _quantised(self, base: nn.Module) -> bool:
        return resolve_quantization_backend(base, **self._quantization) is not None

    def _source(self, config: AdapterConfig, layout: Layout, base: nn.Module, parameter: str) -> Source:
        method = get_adaptation(config.method)
        weight = dense_weight(base, resolve_quantization_backend(base, **self._quantization), parameter)
        moments: tuple[SiteMoments, ...] = ()
        if config._moments is not None and (method.needs or method.settle or config.budget is not None):
            moments = tuple(config._moments.site(layout.name, slice=i) for i in range(layout.slices))
        decompose = leading_svd if config._cache is None else config._cache
        return Source(layout=layout, weight=weight, seed=config.seed, moments=moments, decompose=decompose)

    def _ranks(
        self, config: AdapterConfig, model: nn.Module, targets: dict[str, tuple[nn.Module, str]]
    ) -> dict[str, int]:
        """The rank of every target, which is a module and the name of its weight.

        Raises InputError and NotFiniteError with everything that is wrong.
        """
        method, options = get_adaptation(config.method), adapt_options(get_adaptation(config.method), config.options)
        if method.needs and config._moments is None:
            raise InputError(
                f"method {method.name!r} starts from the moments of the inputs ({', '.join(sorted(method.needs))}); "
                "collect them with eckart.calibrate and give AdapterConfig(moments=…)."
            )
        layouts = {name: layout_of(name, *target) for name, target in targets.items()}
        faults, broken, ranks = [], [], {}
        for pattern in config.rank_pattern:
            if not any(_matches(pattern, name) for name in layouts):
                faults.append(f"rank_pattern {pattern!r} matches none of the {len(layouts)} layers")
        for name, layout in layouts.items():
            if why := method.delta.fits(layout, options):
                faults.append(f"{name}: method {method.name!r} cannot serve it: {why}")
                continue
            base, parameter = targets[name]
            weight = getattr(base, parameter, None)
            if isinstance(weight, Tensor) and weight.is_meta:
                ranks[name] = min(config.r or CAP, method.delta.most(layout, options))
                continue
            try:
                source = self._source(config, layout, base, parameter)
            except InputError as error:
                faults.append(f"{name}: {error}")
                continue
            # A sum is NaN or Inf where any entry is, and several times as fast as a look at each.
            if not source.weight.sum().isfinite() and not source.weight.isfinite().all():
                broken.append(f"{name}: NaN or Inf in its weight")
                continue
            asked, most = _asked(config, name), method.delta.most(layout, options)
            if asked is None and config.budget is None:
                asked = method.delta.default_rank(source, options)
            if asked is not None and asked > most and config.budget is None:
                faults.append(f"{name}: rank {asked} is above the {most} that this layer has")
            ranks[name] = min(most, CAP if asked is None else asked)
        if broken:
            raise NotFiniteError(problems("the base model is broken", broken))
        if faults:
            raise InputError(problems("these layers cannot be adapted", faults))
        if config.budget is None:
            return ranks
        spread = config.spread or ("activation" if "second" in method.needs else "weight")
        worth = [gains(self._source(config, layouts[n], *targets[n]), spread, most) for n, most in ranks.items()]
        allowed = limit(Budget(**config.budget), list(layouts.values()), sum(p.numel() for p in model.parameters()))
        costs = [lambda rank, at=layouts[n]: method.delta.cost(at, rank, options) for n in ranks]
        return dict(zip(ranks, spread_ranks(worth, costs, allowed), strict=True))

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        weights = adapted_parameters(current_key, base)
        if len(weights) > 1 and any(peft_config.ranks.get(path, 0) for path in weights):
            # Around all of them, also those that get no rank, so that names in files do not depend on that.
            for weight in [] if isinstance(target, AdapterLayer) else weights.values():
                target = AdapterExperts(target, weight, **self._quantization)
                target._active_adapter = adapter_name
            self._replace_module(parent, target_name, target.train(base.training), base)
        for path, weight in weights.items():
            self._put(peft_config, adapter_name, parent.get_submodule(target_name), target_name, parent, path, weight)

    def _put(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter: str,
    ) -> None:
        """Put the adapter of one weight beside the others of its module, or around its module."""
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if current_key not in peft_config.ranks:
            raise InputError(
                f"{current_key} is not among the layers that this adapter was made for: {len(peft_config.ranks)}, as "
                f"{next(iter(peft_config.ranks), 'none')}. The base is another model."
            )
        rank = peft_config.ranks[current_key]
        if rank == 0:
            return
        method = get_adaptation(peft_config.method)
        options = adapt_options(method, peft_config.options)
        layout = layout_of(current_key, base, parameter)
        delta = method.delta(layout, rank, options)
        done = sum(1 for name in peft_config.ranks if name < current_key)
        peft_config._progress("start adapters", done, len(peft_config.ranks))
        meta = any(p.is_meta for p in delta.parameters()) or getattr(base, parameter, torch.empty(0)).is_meta
        if not peft_config.saved and not meta:
            delta.start(self._source(peft_config, layout, base, parameter))
            delta.started = True
        present = _beside(target, parameter)
        if present is None:
            layer: AdapterLayer = LAYERS[layout.kind](target, **self._quantization)
            layer._active_adapter = adapter_name
            self._replace_module(parent, target_name, layer.train(target.training), target)
        else:
            layer = present
        layer.update_layer(adapter_name, delta, peft_config.dropout, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            delta.requires_grad_(False)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's also writes the weight over itself, which layers with a computed weight do not allow."""
        setattr(parent, child_name, new_module)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # PEFT looks for them among modules, and fused experts are parameters; see _ranks.
            warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match.*")
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        _tie(model, adapter_name, self.peft_config[adapter_name])
        self.peft_config[adapter_name].watch(model, _after_saving)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AdapterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        # Of spread numbers each process holds a part, so that none can save them without the others.
        found = {key: gathered(value) if isinstance(value, Tensor) else value for key, value in found.items()}
        for name, layer in adapter_layers(model, adapter_name):
            stem = f"{name}.eckart_delta.{adapter_name}."
            numbers = {n: found[stem + n] for n in layer.delta(adapter_name)._parameters if stem + n in found}
            base = state_dict.get(f"{name}.{layer.base_key}")
            if stem + CHECK in found and (value := layer.record(adapter_name, numbers, base)) is not None:
                found[stem + CHECK] = value
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        def after(loaded: nn.Module, _: Any) -> None:
            handle.remove()
            _tie(loaded, adapter_name, config)
            kept, now = {}, {}
            for _name, layer in adapter_layers(loaded, adapter_name):
                delta = layer.delta(adapter_name)
                # A tensor assigned from a mapped file lies at any address, and products over it round otherwise.
                delta._apply(torch.clone)  # type: ignore[no-untyped-call]
                if (found := layer.record(adapter_name)) is not None:
                    kept[delta.layout.name], now[delta.layout.name] = getattr(delta, CHECK), found
            compare(kept, now)

        handle = model.register_load_state_dict_post_hook(after)  # type: ignore[no-untyped-call]
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped


def _all_linear(config: AdapterConfig, model: Any) -> None:
    """Turn ``all-linear`` into names, Eckart's own linear layers among them instead of the factors inside of them."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != "all-linear":
        return
    _maybe_include_all_linear_layers(config, model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    own = {name: module for name, module in model.named_modules() if isinstance(module, ReplacedLinear)}
    plain = {name for name in config.target_modules if not any(name.startswith(f"{outer}.") for outer in own)}
    config.target_modules = sorted(plain | {name for name, module in own.items() if module is not head})


def _beside(module: nn.Module, parameter: str) -> AdapterLayer | None:
    """The layer of adapters that changes this weight already."""
    while isinstance(module, AdapterLayer):
        if module.parameter_name == parameter:
            return module
        module = module.base_layer
    return None


def _asked(config: AdapterConfig, name: str) -> int | None:
    for pattern, rank in config.rank_pattern.items():
        if _matches(pattern, name):
            return rank
    return config.r


def _matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def adapter_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, AdapterLayer]]:
    """Names and layers of a model that hold an adapter (of that name)."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer) and (adapter is None or adapter in module.eckart_delta):
            yield name, module


def _tie(model: nn.Module, adapter: str, config: AdapterConfig) -> None:
    method = get_adaptation(config.method)
    if method.tie is not None:
        method.tie([layer.delta(adapter) for _, layer in adapter_layers(model, adapter)])


def _after_saving(config: AdapterConfig, model: nn.Module, directory: str) -> None:
    """The plain-LoRA copy beside a saved adapter, or a warning that says why there is none."""
    names = [name for name, own in getattr(model, "peft_config", {}).items() if own is config]
    folder = Path(directory) / FOLDER
    # The Trainer takes every folder below one of its checkpoints for a further adapter, and fails when it resumes.
    if not names or re.fullmatch(r"checkpoint-\d+", Path(directory).name):
        return
    try:
        write_lora_copy(model, names[0], folder, config, Path(directory) / WEIGHTS)
    except EckartError as error:
        shutil.rmtree(folder, ignore_errors=True)
        warnings.warn(
            f"{directory} has no plain-LoRA copy, so it needs Eckart to be loaded. {error} "
            "eckart convert makes one with a measured error.",
            EckartWarning,
            stacklevel=2,
        )


def penalty(model: nn.Module) -> Tensor:
    """Sum of what the methods of the active adapters add to the loss, a scalar; 0 where they add nothing.

    Where FSDP spreads the adapters over processes, all of them call it, and :func:`after_step` too.
    """
    found = []
    for _, layer in adapter_layers(model):
        for _, delta in [] if layer.disable_adapters else layer.active_deltas():
            if type(delta).penalty is not Delta.penalty:
                with whole(delta):
                    found += [p] if (p := delta.penalty()) is not None else []
    return torch.stack([p.to(found[0].device) for p in found]).sum() if found else torch.zeros(())


@torch.no_grad()
def after_step(model: nn.Module, step: int) -> bool:
    """Call after every step of the optimiser, counted from 1, for methods that act then (retractions, new masks).

    True where one of them asks for a restart of the optimiser; ``optimizer.state.clear()`` makes it.
    """
    restart = False
    for _, layer in adapter_layers(model):
        for _, delta in [] if layer.disable_adapters else layer.active_deltas():
            if type(delta).after_step is not Delta.after_step:
                with whole(delta):
                    restart |= delta.after_step(step)
    return restart


def register() -> None:
    """See Note [A tuner from outside]. Once is enough.

    Raises EckartError where another package took the name.
    """
    if PEFT_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, PEFT_TYPE)
        member._name_, member._value_, member._sort_order_ = PEFT_TYPE, PEFT_TYPE, len(PeftType)
        PeftType._member_names_.append(PEFT_TYPE)
        PeftType._member_map_[PEFT_TYPE] = member
        PeftType._value2member_map_[PEFT_TYPE] = member
        type.__setattr__(PeftType, PEFT_TYPE, member)
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(PEFT_TYPE))
    if known is AdapterTuner:
        return
    if known is not None:
        raise EckartError(f"PEFT's method {PEFT_TYPE} belongs to {known.__module__}; uninstall that.")
    register_peft_method(
        name=PEFT_TYPE.lower(), config_cls=AdapterConfig, model_cls=AdapterTuner, prefix=AdapterTuner.prefix
    )
    PEFT_TYPE_TO_CONFIG_MAPPING[WRITTEN_TYPE] = AdapterConfig
