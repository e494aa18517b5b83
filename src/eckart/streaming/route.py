"""The way of a batch through a model whose blocks run one at a time.

The model's own forward does everything outside of the blocks: embeddings, masks, positions, the norm at the end, the
head. Stand-ins in the place of the blocks stop it at a block, to see what that block is called with, or hand
a stored hidden state to what follows the last one. So no architecture has to be known by name; what cannot be walked
this way is found by :meth:`Route.check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from eckart.arch import Block, find_blocks, get_module
from eckart.errors import InputError
from eckart.hf.mapped import filled
from eckart.moments import Batch

Stand = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""What stands in for block ``index``, called with the block's arguments."""
_NAME = "hidden_states"


class _Reached(Exception):
    """Ends a forward pass at a block, with what the block was called with."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args_of_block = args
        self.kwargs_of_block = kwargs


class Route:
    """The blocks of a model in order, and how to get from one to the next."""

    def __init__(self, model: nn.Module) -> None:
        """Raises InputError for a model without one chain of repeated blocks."""
        self.model = model
        self.blocks: tuple[Block, ...] = find_blocks(model)
        chains = sorted({block.label for block in self.blocks})
        if len(self.blocks) < 1 or len(chains) > 1:
            found = f"it has {len(chains)}: {', '.join(chains)}" if chains else "it has none"
            raise _refused(model, f"streaming walks along one chain of repeated blocks, and {found}")
        self._modules = [get_module(model, block.name) for block in self.blocks]
        self._tuple = False

    def __len__(self) -> int:
        return len(self.blocks)

    def check(self, batch: Batch) -> None:
        """Run the first block and everything outside of the blocks on one row.

        Raises InputError with the reason where the blocks are not a chain: something is computed between two of
        them, a block is called twice or not at all, or reads the outputs of more than the one before it.
        """
        row: Batch = batch[:1] if isinstance(batch, Tensor) else {name: value[:1] for name, value in batch.items()}
        entering = self.start(row)
        with torch.no_grad(), self.holding(0):
            output = self._run(0, row, entering)
        self._tuple = isinstance(output, tuple)
        rest = [part for part in output[1:] if part is not None] if self._tuple else []
        hidden = output[0] if self._tuple else output
        if rest or not isinstance(hidden, Tensor) or (hidden.shape, hidden.dtype) != (entering.shape, entering.dtype):
            raise _refused(self.model, "a block gives more than a hidden state like the one that it gets")
        given: list[Tensor] = []

        def stand(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index != len(given):
                raise _refused(self.model, f"{self.blocks[index].name} is not called once, in its turn")
            entering, others = _split(args, kwargs)
            if given and entering is not given[-1]:
                raise _refused(self.model, f"something is computed before {self.blocks[index].name}")
            if any(isinstance(part, Tensor) and part.requires_grad for part in tree_leaves(others)):
                raise _refused(self.model, f"{self.blocks[index].name} reads more than the block before it gives")
            given.append(entering.detach().requires_grad_())
            return self._wrapped(given[-1])

        with torch.enable_grad(), self._standing(stand):
            outputs = _called(self.model, row)
        if len(given) != len(self):
            raise _refused(self.model, f"only {len(given)} of its {len(self)} blocks are called")
        leaves = tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
        ends = [part for part in leaves if isinstance(part, Tensor) and part.requires_grad]
        if not ends:
            raise _refused(self.model, "its outputs do not depend on the last block")
        reached = torch.autograd.grad(sum(end.sum() for end in ends), given, allow_unused=True)  # type: ignore[arg-type]
        if any(gradient is not None for gradient in reached[:-1]):
            raise _refused(self.model, "its head reads more than the last block")

    def holding(self, index: int) -> AbstractContextManager[None]:
        """Experts of the block that lie in the files one by one are in memory while this is open."""
        return filled(self.model, self.blocks[index].name)

    def start(self, batch: Batch) -> Tensor:
        """The hidden state that enters the first block."""
        return self._stopped(0, batch)[0].detach()

    def call(self, index: int, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Block ``index`` as a function of its hidden state, with the masks and positions of this batch."""
        _, args, kwargs = self._stopped(index, batch)

        def block(hidden: Tensor) -> Tensor:
            output = _with(self._modules[index], hidden, args, kwargs)
            result: Tensor = output[0] if self._tuple else output
            return result

        return block

    def finish(self, batch: Batch, hidden: Tensor) -> Any:
        """The model's output where its last block gives ``hidden``."""

        def stand(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._wrapped(hidden if index == len(self) - 1 else _split(args, kwargs)[0])

        with self._standing(stand):
            return _called(self.model, batch)

    def _run(self, index: int, batch: Batch, hidden: Tensor) -> Any:
        _, args, kwargs = self._stopped(index, batch)
        return _with(self._modules[index], hidden, args, kwargs)

    def _stopped(self, stop: int, batch: Batch) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Hidden state and arguments with which the forward pass arrives at a block."""

        def stand(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == stop:
                raise _Reached(args, kwargs)
            return self._wrapped(_split(args, kwargs)[0])

        with torch.no_grad(), self._standing(stand):
            try:
                _called(self.model, batch)
            except _Reached as reached:
                args, kwargs = reached.args_of_block, reached.kwargs_of_block
                return _split(args, kwargs)[0], args, kwargs
        raise _refused(self.model, f"{self.blocks[stop].name} is not called")

    def _wrapped(self, hidden: Tensor) -> Any:
        return (hidden,) if self._tuple else hidden

    @contextmanager
    def _standing(self, stand: Stand) -> Iterator[None]:
        def forward(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: stand(index, args, kwargs)

        try:
            for index, module in enumerate(self._modules):
                module.forward = forward(index)
            yield
        finally:
            for module in self._modules:
                module.__dict__.pop("forward", None)


def _called(model: nn.Module, batch: Batch) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Sequence[Any]]:
    """The hidden state among a block's arguments, and the others."""
    found = args[0] if args else kwargs.get(_NAME)
    if not isinstance(found, Tensor):
        raise InputError(f"a block takes its hidden state first or as {_NAME}=; got neither. Leave out --stream.")
    return found, [*args[1:], *(value for name, value in kwargs.items() if args or name != _NAME)]


def _with(module: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(hidden, *args[1:], **kwargs) if args else module(**{**kwargs, _NAME: hidden})


def _refused(model: nn.Module, why: str) -> InputError:
    return InputError(
        f"{type(model).__name__} cannot be compressed block by block: {why}. Leave out --stream, on a machine that "
        "holds the model in memory."
    )
