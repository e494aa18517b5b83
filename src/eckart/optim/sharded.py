"""Parameters that are spread over processes (DTensor, as FSDP2 makes them), seen from one of them.

A matrix that is cut along one side is worked on where it lies. Subspaces span the side that is whole, so that products
with the basis stay local, and what is summed over the cut side (norms of rows, Gram matrices of them) is one all-reduce
of few numbers. What needs whole matrices (Newton-Schulz, quantiles) is dealt out: each process gets its share of a
bucket of equal matrices by one all-to-all, and sends the results back by another. Stacks that are cut between their
matrices need neither. All else (several cuts, a fused map cut along the rows that it is split in, a ``side`` that is
cut) is gathered whole on every process, with one warning.

State has the placements of its parameter, where it is cut at all, so that torch.distributed.checkpoint saves and
reshards it. Results are those of one process up to rounding; with int8, whose blocks end where a part does, up to the
rounding of int8. With ``side="auto"`` one process spans the shorter side and several the whole one: give ``side`` where
both have to agree. A checkpoint moves to another number of processes if the side that is whole is the shorter one too,
and nothing is int8; otherwise torch refuses it, naming the sizes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from eckart.errors import EckartWarning
from eckart.optim.layout import WHOLE, Layout, local
from eckart.optim.memory import BLOCK

Cut = Literal["batch", "rows", "columns"]
"""The dimension of a stack of matrices that is cut."""

_warned = False


@dataclass(frozen=True)
class Gathered(Layout):
    """Whole on every process: all of them compute the same and keep their part of the weight."""

    def local(self, T: Tensor) -> Tensor:
        found: Tensor = T.full_tensor() if is_spread(T) else T  # type: ignore[attr-defined]
        return found


@dataclass(frozen=True)
class Sharded(Layout):
    """Matrices of which each process has a run of one side, or a run of the stack."""

    mesh: Any
    """The DeviceMesh."""
    axis: int
    """Its dimension along which processes have different parts; along the others they hold the same."""
    cut: Cut
    size: int
    """The length of the side that is cut, over all processes."""

    @property
    def group(self) -> Any:
        return self.mesh.get_group(self.axis)

    @property
    def spread(self) -> bool:
        return self.cut != "batch"

    @property
    def first(self) -> int:
        return self._run(self.place)[0] if self.cut == "batch" else 0

    @property
    def place(self) -> int:
        rank: int = self.mesh.get_local_rank(self.axis)
        return rank

    def mine(self, batch: int, d: int, k: int) -> tuple[int, int, int]:
        held = self._run(self.place)[1]
        return (held, d, k) if self.cut == "batch" else (batch, d, held)

    def along(self, partial: Tensor) -> Tensor:
        return self._reduced(partial, dist.ReduceOp.SUM)

    def total(self, partial: Tensor) -> Tensor:
        return self._reduced(partial, dist.ReduceOp.SUM)

    def peak(self, partial: Tensor) -> Tensor:
        return self._reduced(partial, dist.ReduceOp.MAX)

    def mean(self, values: Tensor) -> float:
        if self.spread:
            return super().mean(values)
        total = values.sum()
        dist.all_reduce(total, group=self.group)
        return float(total) / self.size

    def length(self, k: int) -> int:
        return self.size if self.spread else k

    def by_columns(self, rows: int, columns: int) -> bool:
        return self.cut == "rows" if self.spread else columns < rows

    def whole(self, M: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Two all-to-alls: matrix i of the bucket is whole on the process that has i in its share."""
        if not self.spread:
            return function(M)
        count, me = self.mesh.size(self.axis), self.place
        n, d, k = M.shape
        shares = [len(part) for part in torch.arange(n).tensor_split(count)]
        lengths = [self._run(rank)[1] for rank in range(count)]
        sent = [share * d * k for share in shares]
        received = [shares[me] * d * length for length in lengths]
        flat = self._exchanged(M, sent, received)
        parts = [
            part.view(shares[me], d, length) for part, length in zip(torch.split(flat, received), lengths, strict=True)
        ]
        X = torch.cat(parts, -1)
        done = function(X) if shares[me] else X
        back = torch.cat([part.reshape(-1) for part in torch.split(done, lengths, -1)])
        return self._exchanged(back, received, sent).view(n, d, k)

    def kept(self, name: str, T: Tensor) -> Tensor:
        """An entry of the state as part of one over all processes; as it is where all hold the same."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if self.cut == "batch":
            dim, whole = 0, self.size
        elif name.startswith("feedback"):
            dim, whole = (1 if self.cut == "rows" else 2), self.size
        elif name in ("basis", "index", "seed") or "_norm" in name:
            return T
        else:
            dim, whole = 2, self.size
        if dim == 2 and name.endswith("_scales"):
            whole = sum(-(-self._run(rank)[1] // BLOCK) for rank in range(self.mesh.size(self.axis)))
        placements: list[Any] = [Replicate()] * self.mesh.ndim
        placements[self.axis] = Shard(dim)
        shape = torch.Size([*T.shape[:dim], whole, *T.shape[dim + 1 :]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(T, self.mesh, placements, run_check=False, shape=shape, stride=stride)

    def _run(self, rank: int) -> tuple[int, int]:
        """First and number of what a process holds, as torch cuts: equal parts, and what is left at the end."""
        step = -(-self.size // self.mesh.size(self.axis))
        first = min(rank * step, self.size)
        return first, min(step, self.size - first)

    def _reduced(self, partial: Tensor, op: Any) -> Tensor:
        if not self.spread:
            return partial
        found = partial.contiguous()
        dist.all_reduce(found, op=op, group=self.group)
        return found

    def _exchanged(self, T: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = T.new_empty(sum(received))
        dist.all_to_all_single(out, T.reshape(-1).contiguous(), received, sent, group=self.group)
        return out


def is_spread(T: Tensor) -> bool:
    """Whether this is a DTensor, told without importing them, which takes a second."""
    return hasattr(T, "placements") and hasattr(T, "device_mesh")


def layout_of(p: Tensor, group: Mapping[str, Any]) -> Layout:
    """How the matrices of a parameter lie over processes, with the entries of its group. Warns once on gathering."""
    if not is_spread(p):
        return WHOLE
    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    cuts = [i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(i) > 1]
    if not cuts:
        return Gathered()
    axis = cuts[0]
    # Only of type Shard itself: a strided one is no run of rows.
    side = _side(p, group, placements[axis]) if len(cuts) == 1 and type(placements[axis]).__name__ == "Shard" else None
    if side is None:
        _warn(tuple(p.shape), placements)
        return Gathered()
    return Sharded(mesh, axis, side, p.shape[placements[axis].dim])


def write_back(p: Tensor, whole: Tensor) -> None:
    """Puts a gathered parameter, changed, into the part that this process holds."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = p.device_mesh  # type: ignore[attr-defined]
    spread = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    local(p).copy_(spread.redistribute(placements=p.placements).to_local())  # type: ignore[attr-defined]


def most_over_processes(count: int, params: Iterable[Tensor]) -> int:
    """The largest count that any of the processes has that share some of the parameters."""
    for mesh, device in dict.fromkeys((p.device_mesh, p.device) for p in params if is_spread(p)):  # type: ignore[attr-defined]
        most = torch.tensor(count, device=device)
        for axis in range(mesh.ndim):
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=mesh.get_group(axis))
        count = int(most)
    return count


def _side(p: Tensor, group: Mapping[str, Any], placement: Any) -> Cut | None:
    """Which dimension of the stack (batch, rows, columns) is cut; None where what is asked for cannot work on parts."""
    sides: tuple[Cut, ...] = ("batch", "columns", "rows") if group["transposed"] else ("batch", "rows", "columns")
    flat = p.ndim > 3 or (p.ndim == 3 and group["view"] == "flatten")
    sides = sides[1:2] if flat else sides[3 - p.ndim :]
    if placement.dim >= len(sides):
        return None
    side = sides[placement.dim]
    if side == "rows" and group["split"] is not None:
        return None
    return None if group["subspace"] is not None and group.get("side", "auto") == side else side


def _warn(shape: tuple[int, ...], placements: Any) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"A parameter {shape} with placements {list(placements)} cannot be worked on in parts, with the split and "
            "side of its group; it, and others like it, are gathered whole on every process at every step, which takes "
            "their memory and time. Shard along one dimension, leave side='auto', or split fused maps by columns.",
            EckartWarning,
            stacklevel=2,
        )
