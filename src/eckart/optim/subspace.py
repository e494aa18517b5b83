"""The optimizer that all others of this room are presets of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from eckart.errors import InputError, MismatchError, NotFiniteError, problems, unknown
from eckart.linalg import round_stochastically
from eckart.optim.feedback import STORED, Feedback, Stored
from eckart.optim.guards import GUARDS, Guard
from eckart.optim.layout import Layout, local, mean_square
from eckart.optim.memory import Memory
from eckart.optim.parts import built, keys_of, knobs_of, name_of, number_fault
from eckart.optim.report import LayerReport, Report, name_in, top_singular_value
from eckart.optim.residuals import RESIDUALS, Drop, Residual
from eckart.optim.rules import RULES, Adam, Rule, product_of, work_of
from eckart.optim.sharded import Gathered, layout_of, most_over_processes, write_back
from eckart.optim.subspaces import SUBSPACES, Basis, Carry, Subspaced, carried
from eckart.optim.view import Piece, Side, matrices, pieces, rank_of, taken

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
STRUCTURE = ("rule", "subspace", "residual", "guards", "feedback", "state_dtype", "rank", "side", "view", "split",
             "transposed", "matrix")  # fmt: skip
"""Entries of a group that decide what is in the state."""


class Subspace(torch.optim.Optimizer):
    r"""Steps in a subspace: view → feedback → subspace → rule → residual → guards → weight decay → write.

    For a matrix W with gradient G, seen as (d, k) with d the spanned side, step t does::

        X = G + decay · E                            # feedback, else X = G
        Q = subspace.fit(X)                          # at every refresh, else as it was
        U = rule(Qᵀ X)                               # moments of r × k
        Δ = residual(Q U, X)                         # drop: Q U
        Δ = guards(Δ)
        E = X − (1 − keep) Q Qᵀ X
        W = (1 − lr · weight_decay) W − lr · scale · Δ

    Without ``subspace``, or where its rank is not below d, Q = I. Parameters of less than two dimensions and those of
    groups with ``matrix=False`` take an AdamW step by torch's own kernels, with ``lr · vector_scale``, ``betas`` and
    ``eps`` of their group; so do matrices of which nothing but rule "adam" is asked, with ``lr · scale``.

    All options but ``nonfinite`` may differ by group, and every number stands in ``param_groups`` under the name of its
    argument (or of the part's field; some have a prefix, such as ``feedback_decay``), where schedulers find it. Parts
    are given by name or as objects: ``rule="adam"`` or ``rule=Adam(betas=(0.9, 0.95))``.

    Groups also take ``matrix`` (bool), ``split`` (numbers of rows of the matrices that are fused in one, as of queries,
    keys and values), ``transposed`` (weights stored inputs × outputs) and ``view``: "auto" takes a parameter of three
    dimensions as a stack of matrices and of more as out × rest; "stack" and "flatten" say which. A group of
    ``role="conv"``, as :func:`param_groups` makes them, is flattened. ``rank=None`` in a group turns its subspace off.

    The state holds tensors alone: ``step``, moments (``exp_avg``, …), and of the subspace a basis, indices or a seed.
    A resumed run is equal bit by bit. Keys of fused pieces end in ``.0``, ``.1``, ….
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        rule: str | Rule = "adam",
        subspace: str | Subspaced | None = None,
        rank: int | float | None = None,
        every: int | None = None,
        side: Side | None = None,
        carry: Carry | None = None,
        feedback: Stored | Feedback | None = None,
        residual: str | Residual = "drop",
        guards: str | Guard | Sequence[str | Guard] = (),
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        momentum: float | None = None,
        nesterov: bool | None = None,
        weight_decay: float = 0.0,
        scale: float | str = 1.0,
        vector_scale: float = 1.0,
        state_dtype: Stored = "fp32",
        compute_dtype: Literal["fp32", "bf16"] | None = None,
        stochastic_rounding: bool = False,
        nonfinite: Literal["skip", "raise"] | None = None,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        """``params``: parameters, (name, parameter) pairs, or groups of them.

        ``lr`` ≥ 0. ``rule``: one of :data:`RULES`; ``subspace``: of :data:`SUBSPACES`, or None; ``rank``, ``every``,
        ``side``, ``carry``: fields of the subspace; ``betas``, ``eps``, ``momentum``, ``nesterov``: of the rule
        (``betas`` and ``eps`` of vectors too). ``feedback``: what the error feedback is stored in, or None for none.
        ``residual``: one of :data:`RESIDUALS`; ``guards``: of :data:`GUARDS`, in order. ``scale``: a number or one of
        :data:`SCALES`, on updates of matrices. ``vector_scale``: on the learning rate of vectors.

        ``state_dtype``: what moments of matrices are kept in, "fp32" (float64 for float64 parameters), "bf16" or "int8"
        by blocks. ``compute_dtype``: "bf16" for products with the basis and of Newton-Schulz, where the device has
        them; None for the dtype of the rest, float32 (float64 for float64 parameters). ``stochastic_rounding``: of
        bfloat16 weights. ``nonfinite``: what NaN or Inf in any gradient does: "skip" the step and count it in
        ``skipped`` of the groups, "raise" NotFiniteError before anything changes (either reads every gradient once and
        waits for the device), None: nothing. ``seed``: of everything drawn.

        Raises InputError with all faults of a group at once: options out of range, complex or integer parameters.
        """
        chosen: dict[str, Any] = {"rule": rule, "subspace": subspace, "residual": residual, "feedback": feedback}
        knobs = {
            "rank": rank, "every": every, "side": side, "carry": carry, "betas": betas, "eps": eps,
            "momentum": momentum, "nesterov": nesterov,
        }  # fmt: skip
        given = {key: value for key, value in knobs.items() if value is not None}
        _refuse_unused(type(self).__name__, given, rule, subspace, feedback)
        defaults = {
            "lr": lr, **chosen, "guards": guards, **given, "weight_decay": weight_decay, "scale": scale,
            "vector_scale": vector_scale, "state_dtype": state_dtype, "compute_dtype": compute_dtype,
            "stochastic_rounding": stochastic_rounding, "maximize": maximize, "seed": seed, "nonfinite": nonfinite,
            "matrix": True, "view": "auto", "split": None, "transposed": False, "skipped": 0,
            "preset": type(self).__name__,
        }  # fmt: skip
        super().__init__(params, _flat(defaults, {}))

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer. Raises InputError with all that is wrong with the group and its parameters."""
        group = dict(param_group)
        params = group["params"]
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        if "view" not in group and group.get("role") == "conv":
            group["view"] = "flatten"
        flat = _flat(group, self.defaults)
        faults = _group_faults(flat)
        for i, p in enumerate(group["params"]):
            named = p if isinstance(p, tuple) else (f"parameter {i}", p)
            if isinstance(named[1], Tensor):
                faults += _parameter_faults(named[0], named[1], flat)
        if faults:
            raise InputError(problems(type(self).__name__, faults))
        super().add_param_group(flat)

    @property
    def skipped(self) -> int:
        """How many steps were left out for gradients with NaN or Inf."""
        return max((int(group["skipped"]) for group in self.param_groups), default=0)

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure``, called first with gradients enabled, computes the loss, which is returned.

        Raises InputError for sparse gradients, NotFiniteError by ``nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        if not self._all_finite():
            return loss
        for group in self.param_groups:
            self._step_vectors(group)
        for bucket in _buckets(self._units()):
            _write(bucket, _update(bucket))
        return loss

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise InputError(
                        f"{type(self).__name__}: a gradient of layout {p.grad.layout}, shape {tuple(p.shape)}; "
                        "expected dense ones. Make the embedding with sparse=False, or use torch.optim.SparseAdam."
                    )

    def _all_finite(self) -> bool:
        wanted = self.defaults["nonfinite"]
        if wanted is None:
            return True
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [g for p in params if (g := local(p.grad)).numel()]
        bad = most_over_processes(count_nonfinite(gradients), params)
        if not bad:
            return True
        if wanted == "raise":
            raise NotFiniteError(
                f"{type(self).__name__}: {bad} of {len(gradients)} gradients hold NaN or Inf; nothing was changed. "
                "Lower the learning rate, clip gradients, or pass over such steps with nonfinite='skip'."
            )
        for group in self.param_groups:
            group["skipped"] += 1
        return False

    def _step_vectors(self, group: dict[str, Any]) -> None:
        """AdamW by torch's kernels: vectors, and matrices of which nothing else is asked."""
        simple = [p for p in group["params"] if p.grad is not None and not _is_matrix(p, group)]
        lr, decay = group["lr"], group["weight_decay"]
        vectors = [p for p in simple if not _is_plain_adam(p, group)]
        if vectors:
            self._adamw(group, vectors, lr * group["vector_scale"], decay)
        others = [p for p in simple if _is_plain_adam(p, group)]
        if others:  # whose updates are scaled, and whose decay is not
            self._adamw(group, others, lr * group["scale"], decay / group["scale"])

    def _adamw(self, group: dict[str, Any], params: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
        fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") for p in params)
        fused = fused and not torch.compiler.is_compiling()
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            [local(p) for p in params],
            [local(p.grad) for p in params if p.grad is not None],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            foreach=None if fused else True,
            fused=fused,
            capturable=torch.compiler.is_compiling(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _units(self, *, dry: bool = False) -> Iterator[Unit]:
        """The matrices that have a gradient, with their steps counted; all matrices and no count where ``dry``."""
        number = 0
        for place, group in enumerate(self.param_groups):
            parts = _parts(group)
            for i, p in enumerate(group["params"]):
                if not _is_matrix(p, group):
                    continue
                whole = pieces(tuple(p.shape), group["view"], group["split"], group["transposed"])
                first = number
                number += len(whole)
                if p.grad is None and not dry:
                    continue
                state = self.state.get(p, {}) if dry else self.state[p]
                if "step" not in state and not dry:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                t = int(state["step"]) + 1 if "step" in state else 1
                if not dry:
                    state["step"] += 1
                layout = layout_of(p, group)
                for j, piece in enumerate(whole):
                    yield Unit(place, i, p, group, parts, piece, state, first + j, t, layout, dry)

    # ---- resume

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over groups and state, every tensor in the dtype in which it was saved.

        Raises MismatchError for the state of another optimizer, of other parameters, or of another structure (rule,
        subspace, rank, …), with all that differs; numbers such as lr are taken over, as torch's optimizers do.
        """
        name = type(self).__name__
        ours, theirs = self.param_groups, state_dict["param_groups"]
        faults = []
        if len(ours) != len(theirs):
            faults.append(f"{len(theirs)} groups are saved; here are {len(ours)}")
        for i, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            preset = other.get("preset", "another optimizer, which is not of eckart")
            if preset != one["preset"]:
                faults.append(f"group {i} was saved by {preset}; this is {one['preset']}")
                continue
            if len(one["params"]) != len(other["params"]):
                faults.append(f"group {i} has {len(other['params'])} parameters saved; here are {len(one['params'])}")
            for key in STRUCTURE:
                if _plain(one.get(key)) != _plain(other.get(key)):
                    faults.append(f"group {i} was saved with {key}={other.get(key)!r}; here it is {one.get(key)!r}")
        pairs = [
            (index, p, one)
            for one, other in zip(ours, theirs, strict=False)
            for index, p in zip(other["params"], one["params"], strict=False)
        ]
        if not faults:
            for index, p, group in pairs:
                faults += _state_faults(f"parameter {index}", p, group, state_dict["state"].get(index, {}))
        if faults:
            raise MismatchError(problems(f"{name} cannot take over this state", faults))
        # The base class would cast every tensor to the dtype of its parameter.
        super().load_state_dict({**state_dict, "state": {}})
        for index, p, group in pairs:
            if saved := state_dict["state"].get(index):
                self.state[p] = {
                    key: value.to(_device(key, p, group), copy=True) if isinstance(value, Tensor) else value
                    for key, value in saved.items()
                }

    # ---- what it does

    @torch.no_grad()
    def report(self) -> Report:
        """Per matrix: captured energy, feedback, size of the update and top singular value of the weight.

        The first and the third need gradients: call it between ``backward`` and ``zero_grad``. They are those of the
        step that would be taken now; nothing changes. Costs a step without the write, and a few products per matrix.
        """
        return Report(tuple(_layer_report(unit) for unit in self._units(dry=True)))


# ---- one bucket of equal matrices


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


def _buckets(units: Iterable[Unit]) -> list[Bucket]:
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


def _update(bucket: Bucket) -> Update:
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
        step = residual.update(X, inside, basis, low, U, last, layout)
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


def _write(bucket: Bucket, update: Update) -> None:
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


def _layer_report(unit: Unit) -> LayerReport:
    captured = size = None
    if unit.p.grad is not None:
        update = _update([unit])
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


def count_nonfinite(gradients: Sequence[Tensor]) -> int:
    """How many of them hold a NaN or an Inf: their largest magnitude is none or infinite."""
    if not gradients:
        return 0
    by_device: dict[torch.device, list[Tensor]] = {}
    for norm in torch._foreach_norm(list(gradients), math.inf):
        by_device.setdefault(norm.device, []).append(norm.float())
    return sum(int((~torch.stack(norms).isfinite()).sum()) for norms in by_device.values())


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _seed(unit: Unit, matrix: int) -> int:
    """One for each matrix and step, from the seed of the group."""
    mixed: int = (unit.group["seed"] * 1_000_003 + unit.number) * 1_000_033 + unit.t * 8191 + matrix
    return mixed % (2**62)


# ---- groups


def _parts(group: Mapping[str, Any]) -> Parts:
    name = group["subspace"]
    return Parts(
        built(RULES[group["rule"]], group),
        None if name is None else built(SUBSPACES[name], group),
        built(RESIDUALS[group["residual"]], group),
        tuple(built(GUARDS[guard], group) for guard in group["guards"]),
        None if group["feedback"] is None else built(Feedback, group),
        group["state_dtype"],
        group["compute_dtype"],
    )


def _flat(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group of plain data: names of parts, and all of their numbers. What is given wins over the defaults."""
    group = dict(given)
    if "rank" in given and given["rank"] is None:
        group["subspace"] = None
    for key in ("rule", "subspace", "residual", "guards", "feedback"):
        group.setdefault(key, defaults.get(key))
    numbers: dict[str, Any] = {}
    classes: list[type] = [Adam]  # its betas and eps are those of vectors
    for kind, table in (("rule", RULES), ("subspace", SUBSPACES), ("residual", RESIDUALS)):
        value = group[kind]
        if value is not None:
            group[kind] = name_of(kind, value, table)
            numbers |= knobs_of(value)
            classes.append(table[group[kind]])
    guards = group["guards"]
    names = []
    for value in guards if isinstance(guards, (list, tuple)) else [guards]:
        names.append(name_of("guard", value, GUARDS))
        numbers |= knobs_of(value)
        classes.append(GUARDS[names[-1]])
    group["guards"] = tuple(names)
    if isinstance(group["feedback"], Feedback):
        numbers |= knobs_of(group["feedback"])
        group["feedback"] = numbers.pop("feedback")
    if group["feedback"] is not None:
        classes.append(Feedback)
    for key, value in numbers.items():
        if key not in given:
            group[key] = value
    for key, value in defaults.items():
        group.setdefault(key, value)
    for cls in classes[::-1]:
        if cls is not Adam or "betas" not in group or "eps" not in group:
            for key, value in knobs_of(cls()).items():
                group.setdefault(key, value)
    if group["subspace"] is None and "feedback" not in given and not group.get("feedback_keep"):
        group["feedback"] = None  # which has nothing to bring back
    if isinstance(group.get("split"), (list, tuple)):
        group["split"] = tuple(group["split"])
    return group


def _refuse_unused(name: str, given: Mapping[str, Any], rule: Any, subspace: Any, feedback: Any) -> None:
    """Options of parts that are not there are errors."""
    if subspace is None and feedback is not None and not getattr(feedback, "keep", 0):
        raise InputError(f"{name}: feedback without a subspace has nothing to bring back; give subspace=.")
    of_subspace = sorted({"rank", "every", "side", "carry"} & set(given))
    if subspace is None and of_subspace:
        raise InputError(f"{name}: {', '.join(of_subspace)} without a subspace; give subspace= one of "
                         f"{', '.join(SUBSPACES)}.")  # fmt: skip
    rule_class = RULES[name_of("rule", rule, RULES)]
    unused = sorted({"momentum", "nesterov"} & set(given) - keys_of([rule_class]))
    if unused:
        raise InputError(f"{name}: rule {rule!r} has no {' and no '.join(unused)}.")


def _group_faults(group: Mapping[str, Any]) -> list[str]:
    found = number_fault("lr", group["lr"], 0) + number_fault("weight_decay", group["weight_decay"], 0)
    found += number_fault("vector_scale", group["vector_scale"], 0)
    if isinstance(group["scale"], str):
        found += [] if group["scale"] in SCALES else [unknown("scale", group["scale"], SCALES)]
    else:
        found += number_fault("scale", group["scale"], 0)
    if group["state_dtype"] not in STORED:
        found.append(f"state_dtype is one of {', '.join(STORED)}; got {group['state_dtype']!r}")
    if group["compute_dtype"] not in (None, "fp32", "bf16"):
        found.append(f"compute_dtype is 'bf16', 'fp32' or None; got {group['compute_dtype']!r}")
    if group["nonfinite"] not in (None, "skip", "raise"):
        found.append(f"nonfinite is 'skip', 'raise' or None; got {group['nonfinite']!r}")
    if group["view"] not in ("auto", "stack", "flatten"):
        found.append(f"view is 'auto', 'stack' or 'flatten'; got {group['view']!r}")
    found += number_fault("seed", group["seed"], 0, 2**31)
    parts = _parts(group)
    for part in (parts.rule, parts.subspace, parts.residual, *parts.guards, parts.feedback):
        if part is not None:
            found += part.faults()
    return found


def _parameter_faults(name: str, p: Tensor, group: Mapping[str, Any]) -> list[str]:
    if p.is_complex():
        return [f"{name} {tuple(p.shape)} is complex; give torch.view_as_real of it, or its parts"]
    if not p.is_floating_point():
        return [f"{name} {tuple(p.shape)} is {p.dtype}; expected floating point numbers"]
    split = group["split"]
    if split is not None and _is_matrix(p, group):
        whole = pieces(tuple(p.shape), group["view"], None, group["transposed"])[0]
        if any(not isinstance(s, int) or s < 1 for s in split) or sum(split) != whole.rows:
            return [f"{name} has {whole.rows} rows, and split={split!r} does not add up to them in positive parts"]
    return []


def _is_matrix(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether it goes through the pipeline."""
    return p.ndim >= 2 and p.numel() > 0 and bool(group["matrix"]) and not _is_plain_adam(p, group)


def _is_plain_adam(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the pipeline would do to a matrix what torch's AdamW does, which reads memory once."""
    asked = group["subspace"], group["feedback"], *group["guards"]
    return (
        p.ndim >= 2
        and bool(group["matrix"])
        and group["rule"] == "adam"
        and all(part is None for part in asked)
        and group["state_dtype"] == "fp32"
        and not isinstance(group["scale"], str)
        and group["scale"] > 0
        and p.dtype in (torch.float32, torch.float64)
    )


def _plain(value: Any) -> Any:
    """Lists and tuples alike, since JSON and DCP do not tell them apart."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _device(key: str, p: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where an entry of the state lives: with the parameter, but for counters and seeds of the pipeline."""
    counts = key.partition(".")[0] in ("step", "age", "seed") and _is_matrix(p, group)
    return torch.device("cpu") if counts else p.device


def _state_faults(name: str, p: Tensor, group: dict[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What a saved state says that does not fit a parameter."""
    if not saved:
        return []
    if not _is_matrix(p, group):
        expected = {"exp_avg": tuple(local(p).shape)}
    else:
        parts = _parts(group)
        expected = {}
        for piece in pieces(tuple(p.shape), group["view"], group["split"], group["transposed"]):
            unit = Unit(0, 0, p, group, parts, piece, {}, 0, 1, layout_of(p, group), True)
            batch, d, k = unit.shape
            for n in parts.rule.moments:
                coded = "_codes" if parts.stored == "int8" else ""
                expected[f"{n}{coded}{piece.suffix}"] = (batch, unit.rank or d, k)
    wrong = []
    for key, shape in expected.items():
        got = saved.get(key)
        if got is None:
            wrong.append(f"{name} {tuple(p.shape)} lacks {key} in the state")
        elif tuple(local(got).shape) != shape:
            wrong.append(f"{name} {tuple(p.shape)} needs {key} of {shape}; saved is {tuple(got.shape)}")
    return wrong
