"""The optimizer that all others of this room are presets of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from eckart.errors import InputError, MismatchError, NotFiniteError, problems
from eckart.optim.feedback import Feedback, Stored
from eckart.optim.groups import (
    STRUCTURE,
    device_of,
    flat_group,
    group_faults,
    is_matrix,
    is_plain_adam,
    parameter_faults,
    parts_of,
    plain_data,
    refuse_unused,
    state_faults,
)
from eckart.optim.guards import Guard
from eckart.optim.layout import local
from eckart.optim.matrices import Unit, buckets_of, layer_report, update_of, write
from eckart.optim.report import Report
from eckart.optim.residuals import Residual
from eckart.optim.rules import Rule
from eckart.optim.sharded import layout_of, most_over_processes
from eckart.optim.subspaces import Carry, Subspaced
from eckart.optim.view import Side, pieces


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
        refuse_unused(type(self).__name__, given, rule, subspace, feedback)
        defaults = {
            "lr": lr, **chosen, "guards": guards, **given, "weight_decay": weight_decay, "scale": scale,
            "vector_scale": vector_scale, "state_dtype": state_dtype, "compute_dtype": compute_dtype,
            "stochastic_rounding": stochastic_rounding, "maximize": maximize, "seed": seed, "nonfinite": nonfinite,
            "matrix": True, "view": "auto", "split": None, "transposed": False, "skipped": 0,
            "preset": type(self).__name__,
        }  # fmt: skip
        super().__init__(params, flat_group(defaults, {}))

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimizer. Raises InputError with all that is wrong with the group and its parameters."""
        group = dict(param_group)
        params = group["params"]
        group["params"] = [params] if isinstance(params, Tensor) else list(params)
        if "view" not in group and group.get("role") == "conv":
            group["view"] = "flatten"
        flat = flat_group(group, self.defaults)
        faults = group_faults(flat)
        for i, p in enumerate(group["params"]):
            named = p if isinstance(p, tuple) else (f"parameter {i}", p)
            if isinstance(named[1], Tensor):
                faults += parameter_faults(named[0], named[1], flat)
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
        for bucket in buckets_of(self._units()):
            write(bucket, update_of(bucket))
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
        simple = [p for p in group["params"] if p.grad is not None and not is_matrix(p, group)]
        lr, decay = group["lr"], group["weight_decay"]
        vectors = [p for p in simple if not is_plain_adam(p, group)]
        if vectors:
            self._adamw(group, vectors, lr * group["vector_scale"], decay)
        others = [p for p in simple if is_plain_adam(p, group)]
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
            parts = parts_of(group)
            for i, p in enumerate(group["params"]):
                if not is_matrix(p, group):
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
                if plain_data(one.get(key)) != plain_data(other.get(key)):
                    faults.append(f"group {i} was saved with {key}={other.get(key)!r}; here it is {one.get(key)!r}")
        pairs = [
            (index, p, one)
            for one, other in zip(ours, theirs, strict=False)
            for index, p in zip(other["params"], one["params"], strict=False)
        ]
        if not faults:
            for index, p, group in pairs:
                faults += state_faults(f"parameter {index}", p, group, state_dict["state"].get(index, {}))
        if faults:
            raise MismatchError(problems(f"{name} cannot take over this state", faults))
        # The base class would cast every tensor to the dtype of its parameter.
        super().load_state_dict({**state_dict, "state": {}})
        for index, p, group in pairs:
            if saved := state_dict["state"].get(index):
                self.state[p] = {
                    key: value.to(device_of(key, p, group), copy=True) if isinstance(value, Tensor) else value
                    for key, value in saved.items()
                }

    # ---- what it does

    @torch.no_grad()
    def report(self) -> Report:
        """Per matrix: captured energy, feedback, size of the update and top singular value of the weight.

        The first and the third need gradients: call it between ``backward`` and ``zero_grad``. They are those of the
        step that would be taken now; nothing changes. Costs a step without the write, and a few products per matrix.
        """
        return Report(tuple(layer_report(unit) for unit in self._units(dry=True)))


def count_nonfinite(gradients: Sequence[Tensor]) -> int:
    """How many of them hold a NaN or an Inf: their largest magnitude, or on a CPU an extreme, is none or infinite."""
    sound: dict[torch.device, list[Tensor]] = {}
    elsewhere = []
    for gradient in gradients:
        if gradient.device.type == "cpu":  # where torch's norm takes ten times as long
            extremes = torch.stack(torch.aminmax(gradient))
            sound.setdefault(gradient.device, []).append(extremes.isfinite().all())
        else:
            elsewhere.append(gradient)
    for norm in torch._foreach_norm(elsewhere, math.inf) if elsewhere else []:
        sound.setdefault(norm.device, []).append(norm.isfinite())
    return sum(int((~torch.stack(found)).sum()) for found in sound.values())
