r"""M-FAC: natural gradients from a sliding window of the last m gradients, without writing down a matrix.

*What it does.* Multiplies every gradient by the inverse of the damped empirical Fisher matrix of the last m of them,
exactly. Directions in which gradients keep coming back, large, are shortened; rare ones are kept.

*Formula.* With the last m gradients as rows of G (m, d), zero where there were none yet, F = λI + (1/m)GᵀG. The newest
gradient g_j is one of the rows, so F⁻¹g_j = m Gᵀ(mλI + GGᵀ)⁻¹e_j. Per step: row j = t mod m of G and row and column j
of GGᵀ are replaced; one Cholesky solve; v ← μv + (1 − μ)F⁻¹g; w ← w − ηv. Weight decay α adds αw to the gradient before
it enters the window. ``blocks`` cuts F: one block of all parameters ("full"), one per parameter ("layer"), or
neighbouring coordinates of a parameter, b at a time (an int).

*Cost.* 4dm multiply-adds and m³/3 for the factorisation per step. State: m numbers per parameter (at m = 1024 in
float32 4 KB per parameter, in bfloat16 half of it) and m × m for GGᵀ, per block. It pays on small models, or on the
few coordinates of a sparse one (``mask``). Blocks of at most m coordinates keep no GGᵀ and cost d b m per step instead.

*When it does not help.* On the byte model of the claim after 150 steps it ends at 2.36 nats per byte (m = 64, λ = 1e-3,
μ = 0.9, η = 0.05, the best of a few tried), between SGD with momentum (2.38) and Adam (2.33), at three times the time
of SGD: the claim does not hold. The rate has to fit the window: ‖F⁻¹g‖ is about m/‖g‖ for gradients that have little in
common, so at η = 0.001, the authors' default for m = 1024, windows of 32 hardly move (6.06 after 200 steps). Where
gradients nearly repeat (full batches), λ has to stay well above float32's rounding of ‖g‖².

*Departs from the paper in.* Same update as the authors' code, computed otherwise: they unroll Woodbury's identity one
gradient at a time by an LU factorisation without pivoting (absent on CPUs in PyTorch; their CUDA kernel wants m to be a
multiple of 32, at most 1024) and get F⁻¹g as a difference divided by λ. Here a Cholesky factorisation in float64
serves any m on any device, and the form above has no difference to lose digits in. Blocks, buffers in bfloat16,
decoupled weight decay and several devices by the place of the parameters are ours. In "full" the window spans all
parameter groups, as theirs.

*Reference.* E. Frantar, E. Kurtic, D. Alistarh, “M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information”, NeurIPS 2021, https://arxiv.org/abs/2107.03356.

*Example.*

>>> import torch
>>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
>>> scales = torch.tensor([100.0, 1.0], dtype=torch.float64)
>>> optimizer = MFAC([x], lr=0.01, window=4, damping=1e-8)
>>> x.grad = scales * x.detach()
>>> optimizer.step()  # one gradient: F⁻¹g = m g/(mλ + ‖g‖²), the same direction
>>> [round(v, 6) for v in x.tolist()]
[0.9996, 0.999996]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from eckart.errors import InputError, MismatchError, NotFiniteError, problems
from eckart.evidence.trial import held_out_loss, train, untrained
from eckart.linalg.mfac import (
    GradientWindow,
    block_runs,
    gram_blocks,
    newest_blockwise,
    push_blockwise,
    working_dtype,
)
from eckart.records import Claim, Paper, Technique, Verdict

Blocks = Literal["full", "layer"] | int
_FULL, _LAYER = 0, -1
"""How ``blocks`` is written in the groups, where only numbers go: a positive one is the length of a block."""


class MFAC(torch.optim.Optimizer):
    """Multiplies gradients by the exact inverse of the empirical Fisher matrix of the last ``window`` of them.

    A ``torch.optim.Optimizer`` with the usual groups, schedulers and ``state_dict`` of tensors and ints; a resumed run
    goes on bit for bit. ``lr``, ``momentum``, ``weight_decay``, ``decoupled`` and ``damping`` may differ by group
    (``damping`` not with ``blocks="full"``). State of a parameter: ``gradients`` (m, kept coordinates), ``step``, and
    where they apply ``momentum``, ``kept`` (positions of the coordinates that take part) and ``gram`` (with "full" in
    the first parameter only). A parameter without a gradient stays where it is; with "full" its gradient counts as 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        window: int = 1024,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        blocks: Blocks = "full",
        buffer_dtype: torch.dtype | None = None,
        solve_dtype: torch.dtype = torch.float64,
        mask: Literal["nonzero"] | Sequence[Tensor | None] | None = None,
        nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        """``window`` m ≥ 1, ``damping`` λ > 0, ``momentum`` μ in [0, 1), ``weight_decay`` α ≥ 0.

        ``decoupled`` takes ηα w off the weights instead of adding α w to the gradient. ``blocks``: see the module.
        ``buffer_dtype`` of the stored gradients: None for float32 (float64 for float64 parameters), or a float dtype.
        ``solve_dtype`` of GGᵀ and its factorisation. ``mask``: "nonzero" leaves out the coordinates that are exactly 0
        at the first step; or one bool tensor (or None) per parameter in order, True where a coordinate takes part;
        the others are never changed. ``nonfinite``: what a NaN or Inf in a gradient does, "raise" NotFiniteError
        before anything is changed, or "skip" the step and count it in ``skipped`` of the groups.

        Raises InputError with all options that are out of range, and for complex or sharded parameters.
        """
        found = []
        if not _is_int(window) or window < 1:
            found.append(f"window counts gradients, an int of at least 1; got {window!r}")
        if blocks not in ("full", "layer") and (not _is_int(blocks) or int(blocks) < 1):
            found.append(f"blocks is 'full', 'layer' or a length, an int of at least 1; got {blocks!r}")
        if buffer_dtype is not None and not buffer_dtype.is_floating_point:
            found.append(f"buffer_dtype is a float dtype or None; got {buffer_dtype}")
        if solve_dtype not in (torch.float32, torch.float64):
            found.append(f"solve_dtype is torch.float32 or torch.float64; got {solve_dtype}")
        if isinstance(mask, str) and mask != "nonzero":
            found.append(f"mask is 'nonzero', bool tensors or None; got {mask!r}")
        if nonfinite not in ("raise", "skip"):
            found.append(f"nonfinite is 'raise' or 'skip'; got {nonfinite!r}")
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
        }
        found += _faults(defaults)
        if found:
            raise InputError(problems("MFAC", found))
        block = {"full": _FULL, "layer": _LAYER}.get(str(blocks), blocks)
        self._fixed: dict[str, Any] = {
            "buffer_dtype": buffer_dtype,
            "solve_dtype": solve_dtype,
            "nonfinite": nonfinite,
            "masks": None,
        }
        super().__init__(params, {**defaults, "window": window, "block": block, "skipped": 0})
        self._fixed["masks"] = self._checked_masks(mask)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fixed": self._fixed}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As usual. Raises InputError for options out of range, and for complex or sharded parameters."""
        group = {**self.defaults, **param_group}
        found = _faults(group)
        found += [f"{k} is one for all groups" for k in ("window", "block") if group[k] != self.defaults[k]]
        params = group["params"]
        group_params = [params] if isinstance(params, Tensor) else list(params)
        for p in (q[1] if isinstance(q, tuple) else q for q in group_params):
            if isinstance(p, Tensor) and p.is_complex():
                found.append(f"a complex parameter {tuple(p.shape)}; give torch.view_as_real(p)")
            elif hasattr(p, "placements"):
                found.append(f"a sharded parameter (DTensor) {tuple(p.shape)}; M-FAC needs whole ones")
        if found:
            raise InputError(problems("MFAC", found))
        super().add_param_group({**param_group, "params": params if isinstance(params, Tensor) else group_params})

    @property
    def skipped(self) -> int:
        """Steps that were passed over for NaN or Inf gradients."""
        return max((int(group["skipped"]) for group in self.param_groups), default=0)

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure`` returns, which is called first, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        entries = list(self._entries())
        gradients = [p.grad for _, p, _ in entries if p.grad is not None]
        if not gradients:
            return loss
        if any(g.is_sparse for g in gradients):
            raise InputError("MFAC: sparse gradients; make the embedding with sparse=False.")
        if not self._all_finite(gradients):
            return loss
        if self.param_groups[0]["block"] == _FULL:
            self._step_full(entries)
        else:
            for group, p, mask in entries:
                if p.grad is not None:
                    self._step_alone(group, p, mask)
        return loss

    def _entries(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor | str | None]]:
        """(group, parameter, its mask) of all that are trained, in order."""
        masks = self._fixed["masks"]
        place = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    of_list = masks[place] if isinstance(masks, list) and place < len(masks) else None
                    yield group, p, masks if isinstance(masks, str) else of_list
                place += 1

    def _all_finite(self, gradients: list[Tensor]) -> bool:
        # The norm of a tensor is NaN or Inf where an entry is, or where it overflows.
        norms = [float(torch.linalg.vector_norm(g, dtype=working_dtype(g.dtype))) for g in gradients]
        if all(math.isfinite(n) for n in norms):
            return True
        if self._fixed["nonfinite"] == "raise":
            bad = sum(not math.isfinite(n) for n in norms)
            raise NotFiniteError(
                f"MFAC: {bad} of {len(norms)} gradients hold NaN or Inf; nothing was changed. "
                "nonfinite='skip' passes over such steps."
            )
        for group in self.param_groups:
            group["skipped"] += 1
        return False

    def _step_full(self, entries: list[tuple[dict[str, Any], Tensor, Tensor | str | None]]) -> None:
        dampings = {group["damping"] for group, _, _ in entries}
        if len(dampings) > 1:
            raise InputError(f"MFAC: blocks='full' has one damping for all groups; got {sorted(dampings)}.")
        t = max((self.state[p]["step"] for _, p, _ in entries if self.state[p]), default=0)
        states = [self._state(group, p, mask, step=t) for group, p, mask in entries]
        m = entries[0][0]["window"]
        first = states[0]
        if "gram" not in first:
            first["gram"] = torch.zeros(m, m, dtype=self._fixed["solve_dtype"], device=entries[0][1].device)
        pieces = [self._gradient(group, p, s) for (group, p, _), s in zip(entries, states, strict=True)]
        window = GradientWindow([s["gradients"] for s in states], first["gram"])
        window.push(pieces, t % m)
        updates = window.newest(t % m, dampings.pop())
        for (group, p, _), state, update in zip(entries, states, updates, strict=True):
            state["step"] = t + 1
            if p.grad is not None:
                _apply(group, p, state, update)

    def _step_alone(self, group: dict[str, Any], p: Tensor, mask: Tensor | str | None) -> None:
        state = self._state(group, p, mask, step=0)
        buffer = state["gradients"]
        m, block = group["window"], group["block"]
        runs = block_runs(buffer.shape[1], None if block == _LAYER else block)
        solve = self._fixed["solve_dtype"]
        if "gram" not in state:
            state["gram"] = torch.zeros(gram_blocks(runs, m), m, m, dtype=solve, device=p.device)
        row = state["step"] % m
        push_blockwise(buffer, state["gram"], self._gradient(group, p, state), row, runs)
        update = newest_blockwise(buffer, state["gram"], row, group["damping"], runs, solve)
        state["step"] += 1
        _apply(group, p, state, update)

    def _state(self, group: dict[str, Any], p: Tensor, mask: Tensor | str | None, step: int) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            kept = None
            if mask is not None:
                taking_part = p != 0 if isinstance(mask, str) else mask.to(p.device)
                kept = taking_part.reshape(-1).nonzero()[:, 0]
                state["kept"] = kept
            size = p.numel() if kept is None else kept.numel()
            dtype = self._fixed["buffer_dtype"] or working_dtype(p.dtype)
            state["gradients"] = torch.zeros(group["window"], size, dtype=dtype, device=p.device)
            state["step"] = step
        if group["momentum"] and "momentum" not in state:
            buffer = state["gradients"]
            state["momentum"] = torch.zeros(buffer.shape[1], dtype=working_dtype(buffer.dtype), device=p.device)
        return state

    def _gradient(self, group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> Tensor:
        """(kept,): the gradient of a parameter that enters the window."""
        if p.grad is None:
            return torch.zeros(state["gradients"].shape[1], dtype=p.dtype, device=p.device)
        g = p.grad.reshape(-1)
        w = p.reshape(-1)
        if "kept" in state:
            g, w = g[state["kept"]], w[state["kept"]]
        return g if group["decoupled"] or not group["weight_decay"] else g + group["weight_decay"] * w

    def _checked_masks(self, mask: str | Sequence[Tensor | None] | None) -> str | list[Tensor | None] | None:
        if mask is None or isinstance(mask, str):
            return mask
        masks = list(mask)
        params = [p for group in self.param_groups for p in group["params"]]
        if len(masks) != len(params):
            raise InputError(f"MFAC: one mask (or None) per parameter, {len(params)} of them; got {len(masks)}.")
        wrong = [
            f"mask {i}: expected bool {tuple(p.shape)}; got {m.dtype} {tuple(m.shape)}"
            for i, (m, p) in enumerate(zip(masks, params, strict=True))
            if m is not None and (m.shape != p.shape or m.dtype != torch.bool)
        ]
        if wrong:
            raise InputError(problems("MFAC", wrong))
        return masks

    # ---- resume

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over groups and state, every tensor in the dtype in which it was saved.

        Raises MismatchError for the state of another optimizer, another window, other blocks or other parameters.
        """
        ours, theirs = self.param_groups, state_dict["param_groups"]
        wrong = []
        if len(ours) != len(theirs):
            wrong.append(f"{len(theirs)} groups in the state; {len(ours)} here")
        for key in ("window", "block"):
            saved = {group.get(key) for group in theirs}
            if saved != {self.defaults[key]}:
                wrong.append(f"{key} {self.defaults[key]} here; {sorted(map(str, saved))} in the state")
        pairs = [
            (index, p)
            for one, other in zip(ours, theirs, strict=False)
            for index, p in zip(other["params"], one["params"], strict=False)
        ]
        m = self.defaults["window"]
        for index, p in pairs:
            saved = state_dict["state"].get(index)
            if saved:
                buffer, kept = saved.get("gradients"), saved.get("kept")
                size = p.numel() if kept is None else kept.numel()
                if buffer is None or tuple(buffer.shape) != (m, size):
                    got = "none" if buffer is None else str(tuple(buffer.shape))
                    wrong.append(f"parameter {index}: a window {(m, size)} is needed; got {got}")
        if wrong:
            raise MismatchError(problems("MFAC cannot take over this state", wrong))
        # The base class would cast every tensor to the dtype of its parameter.
        super().load_state_dict({**state_dict, "state": {}})
        for index, p in pairs:
            if saved := state_dict["state"].get(index):
                self.state[p] = {
                    key: value.to(p.device, copy=True) if isinstance(value, Tensor) else value
                    for key, value in saved.items()
                }


def _apply(group: dict[str, Any], p: Tensor, state: dict[str, Any], update: Tensor) -> None:
    """w ← w − ηv with v ← μv + (1 − μ)·update, on the coordinates that take part."""
    mu, lr = group["momentum"], group["lr"]
    if mu:
        update = state["momentum"].mul_(mu).add_(update, alpha=1 - mu)
    change = update.to(p.dtype) * -lr
    if group["decoupled"] and group["weight_decay"]:
        w = p.reshape(-1)
        change = change - lr * group["weight_decay"] * (w[state["kept"]] if "kept" in state else w)
    if "kept" in state:
        spread = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
        change = spread.index_put_((state["kept"],), change)
    p.add_(change.view(p.shape))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _faults(group: dict[str, Any]) -> list[str]:
    """What is wrong with the numbers of a group."""

    def number(key: str) -> float:
        value = group[key]
        if isinstance(value, Tensor) and value.numel() == 1:
            value = float(value)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan

    found = []
    if not 0 <= number("lr") < math.inf:
        found.append(f"lr is a number of at least 0; got {group['lr']!r}")
    if not 0 < number("damping") < math.inf:
        found.append(f"damping is a positive number; got {group['damping']!r}")
    if not 0 <= number("momentum") < 1:
        found.append(f"momentum is in [0, 1); got {group['momentum']!r}")
    if not 0 <= number("weight_decay") < math.inf:
        found.append(f"weight_decay is a number of at least 0; got {group['weight_decay']!r}")
    if not isinstance(group["decoupled"], (bool, int)):
        found.append(f"decoupled is True or False; got {group['decoupled']!r}")
    return found


CLAIM_STEPS = 150


def _run_claim() -> Verdict:
    makers: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
        "M-FAC": lambda p: MFAC(p, lr=0.05, window=64, damping=1e-3, momentum=0.9),
    }
    figures = {}
    for name, make in makers.items():
        model = untrained()
        train(model, make(model.parameters()), CLAIM_STEPS, seed=0)
        figures[name] = held_out_loss(model)
    return Verdict(
        held=figures["M-FAC"] < min(figures["SGD with momentum"], figures["Adam"]),
        figures=figures,
        note=f"held-out nats per byte after {CLAIM_STEPS} steps, each at the best learning rate of those tried",
    )


METHOD = Technique(
    name="m-fac-optimizer",
    summary="natural gradients by the exact inverse Fisher matrix of the last m gradients, in O(dm)",
    paper=Paper(
        authors="E. Frantar, E. Kurtic, D. Alistarh",
        title="M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        year=2021,
        link="https://arxiv.org/abs/2107.03356",
    ),
    entry=MFAC,
    claim=Claim(
        statement=f"After {CLAIM_STEPS} steps of a small byte model from scratch the held-out loss of M-FAC with 64 "
        "gradients is below that of SGD with momentum and that of Adam.",
        source="Frantar et al. 2021, experiments on optimization: M-FAC against SGD with momentum and Adam on ResNets",
        run=_run_claim,
    ),
)
