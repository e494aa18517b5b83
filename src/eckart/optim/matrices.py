"""One step of matrices that are alike: several at a time, or a large one alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.linalg import round_stochastically
from eckart.optim.feedback import Feedback, Stored
from eckart.optim.guards import Guard
from eckart.optim.layout import Layout, local, mean_square
from eckart.optim.memory import Memory
from eckart.optim.report import LayerReport, name_in, top_singular_value
from eckart.optim.residuals import Drop, Residual, Seen
from eckart.optim.rules import Rule, product_of, work_of
from eckart.optim.sharded import Gathered, write_back
from eckart.optim.subspaces import Basis, Subspaced, carried
from eckart.optim.view import Piece, matrices, rank_of, taken

SCALES: dict[str, Callable[[int, int], float]] = {
    "muon": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
    "longest": lambda rows, columns: math.sqrt(max(rows, columns)),
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}
"""Factors on the update by the shape of the matrix (outputs × inputs): √max(1, m/n); √(m/n); √max(m, n);
0.2 √max(m, n), with which an orthogonal update has the root mean square 0.2 of an Adam step."""

STACKED_ENTRIES = {"cpu": 2**16}
"""Matrices of up to so many entries are stacked with their like; larger ones on a CPU gain nothing from it."""
BUCKET_ENTRIES = 2**24
"""What is stacked has at most so many entries."""


@dataclass(frozen=True)
class Parts:
    """The parts of a group with the numbers that they have now."""

    rule: Rule
    subspace: Subspaced | None
    residual: Residual
    guards: tuple[Guard, ...]
    feedback: Feedback | None
    stored: Stored
    compute: str | None


@dataclass(frozen=True, eq=False)
class Unit:
    """One piece of a parameter at one step."""

    place: int
    """Of its group."""
    position: int
    """Of the parameter in its group."""
    p: Tensor
    group: dict[str, Any]
    parts: Parts
    piece: Piece
    state: dict[str, Any]
    number: int
    """Of the piece among all matrices of the optimizer; it shifts the phase of its refreshes."""
    t: int
    """Its step, from 1."""
    layout: Layout
    dry: bool

    @property
    def by_columns(self) -> bool:
        """Whether the basis spans the columns (inputs)."""
        side = self.parts.subspace.side if self.parts.subspace is not None else "auto"
        if side == "auto":
            return self.layout.by_columns(self.piece.rows, self.piece.columns)
        return side == "columns"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, d, k) on this process."""
        piece = self.piece
        d, k = (piece.columns, piece.rows) if self.by_columns else (piece.rows, piece.columns)
        return self.layout.mine(piece.batch, d, k)

    @property
    def rank(self) -> int | None:
        """None: the whole space."""
        if self.parts.subspace is None:
            return None
        r = rank_of(self.parts.subspace.rank, self.piece)
        return r if r < self.shape[1] else None

    @property
    def due(self) -> bool:
        """Whether the subspace is fitted at this step."""
        part = self.parts.subspace
        if part is None or self.rank is None:
            return False
        return (self.t - 1 + self.number) % part.every == 0 or f"{part.kind}{self.piece.suffix}" not in self.state

    def oriented(self, T: Tensor) -> Tensor:
        """(batch, d, k) of the parameter or a tensor like it; a view where strides allow it."""
        M = taken(matrices(self.layout.local(T), self.group["view"], self.group["transposed"]), self.piece)
        return M.mT if self.by_columns else M


Bucket = list[Unit]


@dataclass(frozen=True)
class Update:
    """What a bucket's weights change by."""

    basis: Basis | None
    low: Tensor
    """Qᵀ X (n, r, k), n matrices."""
    step: Tensor
    """The direction in the subspace (n, r, k) if ``basis`` is given, else the whole one (n, d, k)."""
    decay: Tensor | None
    """Factor on the weight decay (n, 1, 1)."""
    square: Tensor | None
    """‖X‖² (n, 1, 1), for reports."""


def buckets_of(units: Iterable[Unit]) -> list[Bucket]:
    """Units of one shape, dtype, device and state of affairs together; large ones alone."""
    found: dict[Any, list[Bucket]] = {}
    for unit in units:
        shape = unit.shape
        entries = unit.piece.batch * unit.piece.rows * unit.piece.columns  # on all processes, so that all stack alike
        device = unit.p.device
        alone = not unit.layout.spread and entries > STACKED_ENTRIES.get(device.type, BUCKET_ENTRIES)
        assert unit.p.grad is not None
        key = (unit.place, shape, unit.by_columns, unit.p.dtype, unit.p.grad.dtype, device, unit.layout, unit.t,
               _age(unit), unit.due, alone)  # fmt: skip
        buckets = found.setdefault(key, [])
        if not buckets or alone or (len(buckets[-1]) + 1) * entries > BUCKET_ENTRIES:
            buckets.append([])
        buckets[-1].append(unit)
    return [bucket for buckets in found.values() for bucket in buckets]


def _age(unit: Unit) -> int:
    """Steps that the moments have seen before this one."""
    saved = unit.state.get(f"age{unit.piece.suffix}")
    return unit.t - 1 if saved is None else int(saved)


def update_of(bucket: Bucket) -> Update:
    first = bucket[0]
    parts, layout = first.parts, first.layout
    batch, d, k = first.shape
    work = work_of(first.p.dtype)
    product = product_of(parts.compute, work, first.p.device)
    memory = Memory([(unit.state, unit.piece.suffix) for unit in bucket], layout=layout, dry=first.dry)
    G = _stacked([unit.oriented(unit.p.grad).to(work) for unit in bucket])  # type: ignore[arg-type]
    feedback = parts.feedback
    if feedback is not None and first.rank is None and not feedback.keep:
        feedback = None  # nothing is left out
    X = G
    if feedback is not None:
        X = memory.read("feedback", (batch, k, d) if first.by_columns else (batch, d, k), feedback.dtype, G)
        X = X.mT if first.by_columns else X
        X = X.mul_(feedback.decay).add_(G)
    square = layout.total(X.square().sum((-2, -1), keepdim=True)) if first.dry else None

    basis, low, age = None, X, _age(first)
    names = parts.rule.moments
    unsigned = {name: name in parts.rule.unsigned for name in names}
    r = first.rank or d
    moments = {n: memory.read(n, (batch, r, k), parts.stored, G, unsigned=unsigned[n]) for n in names}
    if parts.subspace is not None and first.rank is not None:
        part = parts.subspace
        held = memory.held(part.kind)
        fitted_low = None
        if first.due:
            seeds = [_seed(unit, layout.first + i) for unit in bucket for i in range(batch)]
            fitted = part.fit(X, held, r, seeds, layout)
            if held is not None and part.carry != "keep":
                old, new = held, fitted.held
                if part.kind == "seed":
                    old, new = (part.basis(h, d, r, G, work).Q for h in (held, fitted.held))  # type: ignore[attr-defined]
                for n in names:
                    moments[n] = carried(moments[n], unsigned[n], old, new, part.carry, part.kind)
                if part.carry == "restart" and part.kind != "index":
                    age = 0
            held, fitted_low = fitted.held, fitted.low
            memory.hold(part.kind, held)
        assert held is not None
        if part.carry == "restart" and part.kind != "index" and not first.dry:
            for unit in bucket:
                unit.state[f"age{unit.piece.suffix}"] = torch.tensor(float(age + 1))
        basis = part.basis(held, d, r, G, product)
        low = basis.down(X) if fitted_low is None else fitted_low
    U = parts.rule.direction(low, moments, age + 1, layout, product)
    for n in names:
        memory.write(n, moments[n], parts.stored, unsigned=unsigned[n])

    decay: Tensor | None = None
    residual = parts.residual
    inside: Tensor | None = None
    if basis is not None and (feedback is not None or residual.needs_inside):
        inside = basis.up(low)
    step = U
    if basis is not None and (parts.guards or not isinstance(residual, Drop)):
        last = _last(memory, "residual_norm", batch, G) if residual.limited else None
        step = residual.update(Seen(X, inside, basis, low, U), last, layout)
        if last is not None:
            memory.write("residual_norm", last, "fp32")
        basis = None
    if parts.guards:
        W = _stacked([unit.oriented(unit.p).to(work) for unit in bucket])
        for i, guard in enumerate(parts.guards):
            last = _last(memory, f"update_norm_{i}", batch, G) if guard.limited else None
            step, factor = guard.passed(step, G, W, last, -1 if first.by_columns else -2, layout)
            if last is not None:
                memory.write(f"update_norm_{i}", last, "fp32")
            if factor is not None:
                decay = factor if decay is None else decay * factor
    if feedback is not None:
        E = X.mul_(feedback.keep) if inside is None else X.sub_(inside, alpha=1 - feedback.keep)
        memory.write("feedback", E.mT if first.by_columns else E, feedback.dtype)
    return Update(basis, low, step, decay, square)


def _last(memory: Memory, name: str, batch: int, like: Tensor) -> Tensor:
    return memory.read(name, (batch, 1, 1), "fp32", like)


def write(bucket: Bucket, update: Update) -> None:
    """W ← (1 − lr · weight_decay · factor) W − lr · scale · Δ."""
    batch = bucket[0].shape[0]
    for i, unit in enumerate(bucket):
        group, work = unit.group, work_of(unit.p.dtype)
        lr = float(group["lr"])
        alpha = -lr * scale_of(group, unit.piece) * (-1 if group["maximize"] else 1)
        own = slice(i * batch, (i + 1) * batch)
        target = unit.oriented(unit.p)
        in_place = target.dtype == work and target.untyped_storage().data_ptr() == (
            local(unit.p).untyped_storage().data_ptr()
        )
        W = target if in_place else target.to(work, copy=True)
        decay: float = 1 - lr * group["weight_decay"]
        if update.decay is not None:
            W.mul_(1 - lr * group["weight_decay"] * update.decay[own])
            decay = 1.0
        step = update.step[own]
        if update.basis is not None:
            update.basis.one(i * batch, batch).add(W, step, decay, alpha)
        else:
            if decay != 1:
                W.mul_(decay)
            W.add_(step, alpha=alpha)
        if not in_place:
            _put(unit, W)


def _put(unit: Unit, W: Tensor) -> None:
    """Rounds the new weight to the dtype of the parameter and copies it there."""
    p = unit.layout.local(unit.p)
    if unit.group["stochastic_rounding"] and p.dtype == torch.bfloat16:
        generator = torch.Generator(device=p.device).manual_seed(_seed(unit, unit.piece.batch + unit.layout.place))
        W = round_stochastically(W, p.dtype, generator)
    if unit.by_columns:
        W = W.mT
    M = matrices(p, unit.group["view"], unit.group["transposed"])
    target = taken(M, unit.piece)
    target.copy_(W)
    if M.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():  # strides that no matrix has
        p.copy_((M.mT if unit.group["transposed"] else M).reshape(p.shape))
    if isinstance(unit.layout, Gathered):
        write_back(unit.p, p)


def layer_report(unit: Unit) -> LayerReport:
    captured = size = None
    if unit.p.grad is not None:
        update = update_of([unit])
        assert update.square is not None
        whole = unit.layout.mean(update.square)
        kept = unit.layout.mean(unit.layout.total(update.low.square().sum((-2, -1), keepdim=True)))
        captured = kept / whole if whole else None
        step = update.step if update.basis is None else update.basis.up(update.step)
        rate = float(unit.group["lr"]) * scale_of(unit.group, unit.piece)
        size = rate * math.sqrt(unit.layout.mean(mean_square(step, unit.layout)))
    waiting = None
    if unit.parts.feedback is not None and (unit.rank is not None or unit.parts.feedback.keep):
        batch, d, k = unit.shape
        shape = (batch, k, d) if unit.by_columns else (batch, d, k)
        memory = Memory([(unit.state, unit.piece.suffix)], layout=unit.layout, dry=True)
        like = torch.empty(0, dtype=work_of(unit.p.dtype), device=unit.p.device)
        E = memory.read("feedback", shape, unit.parts.feedback.dtype, like)
        waiting = math.sqrt(unit.layout.mean(unit.layout.total(E.square().sum((-2, -1), keepdim=True))))
    return LayerReport(
        name=name_in(unit.group, unit.place, unit.position) + unit.piece.suffix,
        rows=unit.piece.rows,
        columns=unit.piece.columns,
        rank=unit.rank or unit.shape[1],
        steps=unit.t - 1,
        captured=captured,
        feedback=waiting,
        update=size,
        top=top_singular_value(unit.oriented(unit.p).to(work_of(unit.p.dtype)), unit.layout),
    )


def scale_of(group: Mapping[str, Any], piece: Piece) -> float:
    """The factor on the update of a matrix."""
    scale = group["scale"]
    return SCALES[scale](piece.rows, piece.columns) if isinstance(scale, str) else float(scale)


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _seed(unit: Unit, matrix: int) -> int:
    """One for each matrix and step, from the seed of the group."""
    mixed: int = (unit.group["seed"] * 1_000_003 + unit.number) * 1_000_033 + unit.t * 8191 + matrix
    return mixed % (2**62)
