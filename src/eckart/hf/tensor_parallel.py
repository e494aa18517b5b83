"""Tensor parallelism of transformers (``DistributedConfig(tp_plan="auto")``) for layers of Eckart.

A plan gives each linear layer a style: ``colwise`` keeps a share of the outputs on every process, ``rowwise`` takes a
share of the inputs and adds up. Of y = b(a(x)), a colwise layer shares out ``b`` and a rowwise one ``a``; the other
factor, which is small, stays whole. A pivoted layer in a colwise place shares out ``b`` too, but its rows are
in another order than its outputs, so ``b``'s results are gathered and each process takes its outputs. Whatever
cannot be shared out (quantised factors, experts, embeddings and heads tied to them) is whole in every process and gives
right results; nothing is saved there.

Plans go by names with ``*`` for the number of a block, while blocks may hold different layers. So the entries
that meet a layer of Eckart get a style that looks at each module: ``eckart_colwise`` in the place of ``colwise``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from eckart.errors import InputError, problems
from eckart.layers import FactoredExperts, FactoredLinear, PivotedLinear

PREFIX = "eckart_"
_GATHERED = "colwise_gather_output"
_OUT, _IN = ("ColwiseParallel", "PackedColwiseParallel"), ("RowwiseParallel", "PackedRowwiseParallel")
_OTHER = ("EmbeddingParallel", "MoeExpertsParallel")
"""Classes of styles that touch weights. The rest only looks at what goes in or comes out."""


@functools.cache
def usual() -> Any:
    """transformers' styles. Older versions, which keep them elsewhere, have no hook that asks for them."""
    return importlib.import_module("transformers.distributed.tensor_parallel")


def _is(style: Any, classes: tuple[str, ...]) -> bool:
    return isinstance(style, tuple(getattr(usual(), name) for name in classes))


def adapt_plan(model: nn.Module, plan: dict[str, str]) -> None:
    """Change ``plan`` in place, so that layers of Eckart in ``model`` are shared out by factors; see the module.

    Raises InputError for a plan of the user's that says otherwise, for expert parallelism over factored experts,
    and where torchao has quantised layers.
    """
    styles = usual().ALL_PARALLEL_STYLES
    pattern = usual().replace_layer_number_by_wildcard
    names = {pattern(name) for name, module in model.named_modules() if is_ours(module)}
    asked = getattr(model.config, "distributed_config", None)
    for style in list(styles):
        if _is(styles[style], _OUT + _IN + _OTHER):
            styles.register(PREFIX + style, ByFactors(styles[style]))
    _check(model, names, asked)
    for key, style in plan.items():
        met = key in names or key.rpartition(".")[0] in names
        if met and PREFIX + style in styles:
            plan[key] = PREFIX + style


def restore_plan(plan: dict[str, str]) -> None:
    """The styles as transformers knows them, in place, after loading: ``generate`` counts heads by ``colwise``."""
    plan.update({key: style.removeprefix(PREFIX) for key, style in plan.items()})


def is_ours(module: nn.Module) -> bool:
    """Whether it is a layer that Eckart put there."""
    return type(module).__module__.startswith("eckart.")


def _check(model: nn.Module, names: set[str], asked: Any) -> None:
    wrong = []
    if getattr(asked, "ep_size", 1) > 1 and any(isinstance(module, FactoredExperts) for module in model.modules()):
        wrong.append("ep_size: factored experts cannot be dealt to processes; leave expert parallelism out")
    inner = getattr(getattr(model.config, "quantization_config", None), "inner", None)
    if getattr(asked, "tp_size", 1) > 1 and inner is not None:
        wrong.append("tp_size: layers that torchao has quantised cannot be shared out here; load on one device")
    own = getattr(asked, "tp_plan", None)
    for key, style in own.items() if isinstance(own, dict) else ():
        if key in names and PREFIX + style in usual().ALL_PARALLEL_STYLES:
            wrong.append(f"tp_plan: {key} is a layer of Eckart; write {PREFIX + style} instead of {style}")
    if wrong:
        raise InputError(problems("this model cannot be made parallel like this", wrong))


class ByFactors:
    """A style for places where some modules are Eckart's: those by their factors, the others as ever."""

    def __init__(self, style: Any) -> None:
        self.style = style

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        if not is_ours(module):
            self.style.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if not is_ours(module):
            self.style.shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Share out what can be, before the weights are loaded, and hook the rest."""
        if not is_ours(module):
            installed: nn.Module = self.style.install_forward(module, mesh)
            return installed
        plain = isinstance(module, (FactoredLinear, PivotedLinear)) and _plain(module.a) and _plain(module.b)
        if _is(self.style, _IN):
            if plain:
                _share_out(module.get_submodule("a"), self.style, mesh)
            elif isinstance(getattr(self.style, "input_layouts", Shard(-1)), Shard):
                _around(module, lambda x: _whole(x, mesh, module), lambda y: y)
        elif _is(self.style, _OUT):
            if plain and isinstance(module, FactoredLinear):
                _share_out(module.b, self.style, mesh)
                return module
            if plain:
                _share_out(module.get_submodule("b"), usual().ALL_PARALLEL_STYLES[_GATHERED], mesh)
            parts = getattr(self.style, "split_factor", 1)
            if isinstance(getattr(self.style, "output_layouts", Shard(-1)), Shard):
                _around(module, lambda x: x, lambda y: _own_share(y, mesh, parts))
        return module


def _plain(factor: nn.Module) -> bool:
    return type(factor) is nn.Linear


def _share_out(factor: nn.Module, style: Any, mesh: Any) -> None:
    for name, _ in list(factor.named_parameters(recurse=False)):
        style.shard_param(factor, name, mesh)
    style.install_forward(factor, mesh)


def _around(module: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
    forward = module.forward

    def parallel(x: Tensor) -> Tensor:
        return after(forward(before(x)))

    module.forward = parallel


def _whole(x: Tensor, mesh: Any, module: nn.Module) -> Tensor:
    """The inputs of all processes, in the place of this one's share (…, in / processes)."""
    shape = torch.Size((*x.shape[:-1], int(module.in_features)))  # type: ignore[arg-type]
    stride = x.new_empty(shape, device="meta").stride()
    shares = DTensor.from_local(x, mesh, [Shard(x.ndim - 1)], run_check=False, shape=shape, stride=stride)
    return shares.redistribute(placements=[Replicate()]).to_local()


def _own_share(y: Tensor, mesh: Any, parts: int) -> Tensor:
    """This process's share (…, out / processes) of outputs (…, out) that all have; of each of ``parts`` fused parts.

    Its gradient is gathered, so that every process differentiates the whole layer alike.
    """
    split = y.reshape(*y.shape[:-1], parts, -1)
    shares = DTensor.from_local(split, mesh, [Replicate()], run_check=False)
    return shares.redistribute(placements=[Shard(split.ndim - 1)]).to_local().flatten(-2)
