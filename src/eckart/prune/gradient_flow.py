r"""Progressive gradient flow: training towards "keep N of M" with the pruned weights let go little by little.

*What it does.* Trains a model so that of every M consecutive inputs of an output only N have a weight. The stored
weights stay dense; the forward pass sees them through a mask that hardens as training goes on, either by a factor β
on the weights outside of the mask that falls from 1 to 0 (mask decay, MdGF), or by patterns that come closer to the
last one (structure decay, SdGF). :meth:`GradientFlow.bake` leaves ordinary parameters with exact zeros.

*Formula.* The forward weight is W̃ = W ⊙ (M + β(1 − M)), M the mask of the N largest |W| of every M, taken anew in
every forward pass; the gradient of W̃ goes to W as it is (straight-through). With x from 0 to 1 over the time between
the dense and the fine-tuning steps:

=================== ===================== ===============================================
schedule            β                     patterns, equal times each
=================== ===================== ===============================================
mdgf-linear         max(0, 1 − rate · x)  N:M
mdgf-exponential    e^(−rate · x)         N:M
sdgf-stepwise       0                     M−1:M, M/2:M, M/4:M, … N:M
sdgf-geometric      0                     8N:8M, 4N:4M, 2N:2M, N:M
sdgf-densify        0                     N:8M, N:4M, N:2M, N:M (sparser first)
sdgf-custom         0                     those given as ``stages``
sr-ste (baseline)   0                     N:M, and the gradient gets + λ (1 − M) ⊙ W
=================== ===================== ===============================================

*Cost.* One selection over every weight per forward pass, O(numbers), and a second copy of the masked weights; state
of the optimizer as in dense training. Nothing is faster until the end, and then only where a kernel knows the pattern.

*When it does not help.* Where much is kept, at short training, and with the wrong schedule. On the claim's network
(200 steps, 1 of 16 kept in three maps, means of three seeds, nats per byte): mdgf-exponential 2.353, SR-STE 2.380,
masks without decay 2.379; all others are worse than SR-STE: sdgf-stepwise and sdgf-geometric 2.40, mdgf-linear 2.435,
sdgf-densify 2.486. What spends long at a dense or another pattern has little time left for the last one.
With 1 of 8 and 1 of 16 kept in ``benchmarks/prune_training.py`` (means of three seeds), digits after 250 steps,
accuracy: gradual magnitude pruning towards the pattern .927 and .819; mdgf-exponential .940 and .907; sr-ste .940 and
.897; mdgf-linear .929 and .890; sdgf-stepwise .925 and .842. A small Llama after 150 steps, nats per byte (2.683
dense): 2.663 and 2.696; 2.601 and 2.640; 2.600 and 2.657; 2.634 and 2.676; 2.653 and 2.691 in this order.

*Departs from the paper in.* "Six schedules" are the two of the mask and the four of the structure that the authors'
code knows (it calls the latter sparsify, fine, densify, custom); the paper compares the first four. As published the
code does not import (an indentation), drops the bias of its linear layers, groups weights across the ends of rows
where M does not divide them, and its stepwise schedule never arrives at N:M where M/N is no power of two; here that is
an error, or ends at N:M. Its rates are per step (10⁻⁴ for ViT over 350 epochs); here ``rate`` is per whole decay,
so that it does not depend on the length of training. The abstract speaks of restricting the gradients of pruned
weights, the code passes them whole: that is the default, ``backward="masked"`` scales them by M + β(1 − M)
(2.373 in the same test). At the end β is 0 even where e^(−rate) is not.

*Reference.* A. R. Bambhaniya, A. Yazdanbakhsh, S. Subramanian, S.-C. Kao, S. Agrawal, U. Evci, T. Krishna,
“Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers”, 2024, https://arxiv.org/abs/2402.04744;
SR-STE: A. Zhou et al., “Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch”, 2021,
https://arxiv.org/abs/2102.04010.

*Example.*

>>> import torch
>>> from torch import nn
>>> generator = torch.Generator().manual_seed(0)
>>> model = nn.Sequential(nn.Linear(16, 4))
>>> X, y = torch.randn(200, 16, generator=generator), torch.randn(200, 4, generator=generator)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
>>> flow = GradientFlow(model, pattern="1:8", steps=60)
>>> flow.attach(optimizer)
>>> for _ in range(60):
...     optimizer.zero_grad()
...     (model(X) - y).square().mean().backward()
...     optimizer.step()
>>> masks = flow.bake()
>>> (model[0].weight != 0).sum(1).tolist(), [name for name, _ in model.named_parameters()]
([2, 2, 2, 2], ['0.weight', '0.bias'])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eckart.arch import check_finite, find_sites, get_module
from eckart.errors import InputError, MismatchError, problems, unknown
from eckart.evidence.trial import held_out_loss, train, untrained
from eckart.prune.masks import MaskSet, plain_optimizer
from eckart.prune.patterns import NofM, parse_pattern
from eckart.records import Claim, Paper, Site, SiteKind, Technique, Verdict

FLOWS = (
    "mdgf-linear",
    "mdgf-exponential",
    "sdgf-stepwise",
    "sdgf-geometric",
    "sdgf-densify",
    "sdgf-custom",
    "sr-ste",
)
"""The six schedules and the baseline."""

RATES = {"mdgf-linear": 1.0, "mdgf-exponential": 10.0}
"""What ``rate=None`` means. e⁻¹⁰ is about where ViT's 10⁻⁴ per step ends after 350 epochs in batches of 4096."""

DOUBLINGS = (8, 4, 2, 1)
"""Multiples of N and M (geometric) or of M alone (densify) that the authors' code goes through."""


class GradientFlow:
    """Trains the linear maps of a model towards "keep n of m", in any PyTorch loop.

    ::

        flow = GradientFlow(model, pattern="1:16", steps=10_000)
        flow.attach(optimizer)  # made before or after: the parameters stay the same objects
        …  # train for 10 000 steps
        masks = flow.bake()  # plain parameters again, zeros in place
        keep_zero(masks, model, optimizer)  # where training goes on

    nn.Linear, ``Conv1D`` of transformers, nn.Conv1d and nn.Conv2d; N:M runs along the inputs of a linear map and along
    the input channels of a convolution, at each place of the kernel. Until :meth:`bake` the weights are called
    ``….parametrizations.weight.original`` in a state dict. Patterns always count what is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pattern: str | NofM,
        steps: int,
        schedule: str = "mdgf-exponential",
        rate: float | None = None,
        stages: Sequence[str | NofM] = (),
        dense: float = 0.0,
        fine_tune: float = 0.1,
        shrink: float = 2e-4,
        backward: str = "straight-through",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        head: bool = False,
    ) -> None:
        """Puts the mask before the chosen weights; the parameters stay where they are in memory.

        ``pattern``: what the end has, "1:16" or NofM(1, 16). ``steps`` ≥ 1: optimizer steps in all. ``schedule``:
        one of FLOWS. ``rate`` > 0, of the two mask decays: see the formula; None takes 1 and 10. ``stages``: the
        patterns of sdgf-custom, the last of which is ``pattern``. ``dense`` and ``fine_tune``: shares of the steps at
        the start without a mask and at the end with the mask as it will be, each in [0, 1), less than 1 together.
        ``shrink`` ≥ 0: λ of sr-ste. ``backward``: "straight-through" or "masked"; the latter not with sr-ste.
        ``include``, ``exclude``, ``head``: as :func:`eckart.arch.find_sites` takes them.

        Raises InputError with all that is wrong: options, tied, frozen or parametrised weights, fused experts, maps
        whose inputs a pattern of the schedule does not divide; NotFiniteError for NaN or Inf. Nothing is changed then.
        """
        faults = []
        if schedule not in FLOWS:
            faults.append(unknown("schedule", str(schedule), FLOWS))
        final = parse_pattern(pattern)
        if not isinstance(final, NofM) or final.keep == final.of:
            faults.append(f'pattern keeps n of m with n < m, such as "1:16"; got {str(final)!r}')
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            faults.append(f"steps counts optimizer steps, an int of at least 1; got {steps!r}")
        if rate is not None and (schedule not in RATES or not 0 < rate < math.inf):
            faults.append(f"rate is a positive number and of {' and '.join(RATES)} only; got {rate!r} for {schedule}")
        if bool(stages) != (schedule == "sdgf-custom"):
            faults.append(f"stages are needed by sdgf-custom and taken by no other; got {list(stages)} for {schedule}")
        if not 0 <= dense < 1 or not 0 <= fine_tune < 1 or dense + fine_tune >= 1:
            faults.append(
                f"dense and fine_tune are shares of the steps, less than 1 together; got {dense}, {fine_tune}"
            )
        if not 0 <= shrink < math.inf:
            faults.append(f"shrink is a number of at least 0; got {shrink!r}")
        if backward not in ("straight-through", "masked") or (backward == "masked" and schedule == "sr-ste"):
            faults.append(
                f'backward is "straight-through", or "masked" save for sr-ste; got {backward!r} for {schedule}'
            )
        if faults or not isinstance(final, NofM):
            raise InputError(problems("gradient flow", faults))
        self.pattern = final
        """What is kept at the end."""
        self.schedule = schedule
        self.stages = flow_stages(schedule, final, stages)
        """The patterns in their order, the last one ``pattern``."""
        found = find_sites(model, include=include, exclude=exclude, head=head)
        if wrong := [f"{s.name}: {reason}" for s in found if (reason := _unfit(model, s, self.stages)) is not None]:
            raise InputError(problems("gradient flow cannot train these maps; exclude them", wrong))
        if not found:
            raise InputError("gradient flow: the model has no linear map to work on.")
        check_finite(model, found)
        self.model, self.steps = model, steps
        self.taken = 0
        """Optimizer steps seen."""
        self._rate = RATES.get(schedule, 0.0) if rate is None else float(rate)
        self._start, self._end = round(dense * steps), steps - round(fine_tune * steps)
        self._flows: dict[str, _Flow] = {}
        self._handle: Any = None
        for site in found:
            module = get_module(model, site.name)
            through = _Flow(
                site.kind,
                tuple(module._parameters),
                shrink=shrink if schedule == "sr-ste" else 0.0,
                masked=backward == "masked",
            )
            parametrize.register_parametrization(module, "weight", through)
            self._flows[site.name] = through
        self._update()

    @property
    def names(self) -> tuple[str, ...]:
        """The maps under the mask, in the order of the model."""
        return tuple(self._flows)

    def now(self) -> tuple[NofM | None, float]:
        """The pattern (None: all weights) and β of the forward passes before the next optimizer step."""
        if self.taken < self._start:
            return None, 1.0
        if self.taken >= self._end:
            return self.pattern, 0.0
        x = (self.taken - self._start) / (self._end - self._start)
        beta = {
            "mdgf-linear": max(0.0, 1 - self._rate * x),
            "mdgf-exponential": math.exp(-self._rate * x),
        }.get(self.schedule, 0.0)
        return self.stages[int(x * len(self.stages))], beta

    def step(self) -> None:
        """Counts one optimizer step; called after each by the hook of :meth:`attach`."""
        self.taken += 1
        self._update()

    def _update(self) -> None:
        pattern, beta = self.now()
        for flow in self._flows.values():
            flow.pattern, flow.beta = pattern, beta

    def attach(self, optimizer: Any) -> None:
        """Calls :meth:`step` after every ``optimizer.step()``, until :meth:`bake`.

        Raises InputError where it is attached or baked already, or the optimizer lacks some of the weights.
        """
        if self._handle is not None or not self._flows:
            raise InputError("gradient flow is attached already." if self._flows else "gradient flow is baked already.")
        plain = plain_optimizer(optimizer)
        owned = {id(p) for group in plain.param_groups for p in group["params"]}
        missing = [n for n in self._flows if id(_original(self.model, n)) not in owned]
        if missing:
            raise InputError(problems("the optimizer lacks the weights of these maps", missing))
        self._handle = plain.register_step_post_hook(lambda *_: self.step())

    @torch.no_grad()
    def bake(self) -> MaskSet:
        """Ends it: weights outside of the last mask become 0, parameters and names are as they were before.

        May be called early; the pattern is exact in any case. Gives the masks by parameter name, for
        :func:`keep_zero` or a file. Raises InputError where it was called before.
        """
        if not self._flows:
            raise InputError("gradient flow is baked already.")
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        masks = {}
        for name, flow in self._flows.items():
            module = get_module(self.model, name)
            masks[f"{name}.weight"] = flow.mask(_original(self.model, name), self.pattern)
            flow.pattern, flow.beta = self.pattern, 0.0
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            for child in flow.order:  # torch puts the weight behind the bias; optimizers count parameters by place
                module._parameters[child] = module._parameters.pop(child)
        self._flows = {}
        return MaskSet(masks)

    def state_dict(self) -> dict[str, int]:
        """What a resume needs besides the model and the optimizer: the steps seen."""
        return {"taken": self.taken, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from :meth:`state_dict`. Raises MismatchError for a state of another length of training."""
        if set(state) != {"taken", "steps"} or state["steps"] != self.steps or not state["taken"] >= 0:
            raise MismatchError(f"expected the state of a gradient flow of {self.steps} steps; got {dict(state)}.")
        self.taken = int(state["taken"])
        self._update()


def flow_stages(schedule: str, final: NofM, stages: Sequence[str | NofM] = ()) -> tuple[NofM, ...]:
    """The patterns that a schedule goes through, the last one ``final``; ``stages`` are those of sdgf-custom.

    Raises InputError for stages that are no "keep n of m" or do not end at ``final``.
    """
    n, m = final.keep, final.of
    if schedule == "sdgf-stepwise":
        halves = [m >> i for i in range(1, m.bit_length()) if m >> i > n]
        found = [NofM(k, m) for k in (m - 1, *halves, n)]
    elif schedule == "sdgf-geometric":
        found = [NofM(f * n, f * m) for f in DOUBLINGS]
    elif schedule == "sdgf-densify":
        found = [NofM(n, f * m) for f in DOUBLINGS]
    elif schedule == "sdgf-custom":
        given = [parse_pattern(stage) for stage in stages]
        found = [stage for stage in given if isinstance(stage, NofM)]
        if len(found) < len(given) or found[-1] != final:
            raise InputError(f"stages are patterns that keep n of m and end at {final}; got {[str(s) for s in given]}.")
    else:
        found = [final]
    return (found[0], *(b for a, b in pairwise(found) if a != b))


def _unfit(model: nn.Module, site: Site, stages: Sequence[NofM]) -> str | None:
    """Why the weight of a site cannot be masked; None where it can."""
    if site.kind not in ("linear", "conv1d", "conv"):
        return f"{site.kind} is not supported"
    if site.tied:
        return f"it shares its weight with {', '.join(site.tied)}"
    module = get_module(model, site.name)
    if parametrize.is_parametrized(module, "weight") or not isinstance(getattr(module, "weight", None), nn.Parameter):
        return "its weight is no plain parameter"
    weight = module.get_parameter("weight")
    if not weight.requires_grad:
        return "its weight is frozen"
    inputs = _inputs_last(weight, site.kind).shape[-1]
    if wrong := [str(stage) for stage in stages if inputs % stage.of]:
        return f"its {inputs} inputs do not divide into {', '.join(wrong)}"
    return None


def _inputs_last(weight: Tensor, kind: SiteKind) -> Tensor:
    """A view with the inputs last, for a convolution the input channels."""
    return weight.movedim(1, -1) if kind == "conv" else weight.T if kind == "conv1d" else weight


def _original(model: nn.Module, name: str) -> nn.Parameter:
    parametrizations = get_module(model, name).get_submodule("parametrizations.weight")
    return parametrizations.get_parameter("original")


class _Flow(nn.Module):
    """W ↦ W ⊙ (M + β(1 − M)) as a parametrization; plain attributes, so that a copied model computes the same."""

    def __init__(self, kind: SiteKind, order: tuple[str, ...], *, shrink: float, masked: bool) -> None:
        super().__init__()
        self.kind: SiteKind = kind
        self.order = order
        self.shrink, self.masked = shrink, masked
        self.pattern: NofM | None = None
        self.beta = 0.0

    @torch.no_grad()
    def mask(self, weight: Tensor, pattern: NofM) -> Tensor:
        """Of the shape of ``weight`` as it is stored."""
        chosen = pattern.mask(_inputs_last(weight, self.kind).abs())
        if self.kind == "conv":
            return chosen.movedim(-1, 1).contiguous()
        return chosen.T.contiguous() if self.kind == "conv1d" else chosen

    def forward(self, weight: Tensor) -> Tensor:
        if self.pattern is None:
            return weight
        mask = self.mask(weight, self.pattern)
        if self.masked:
            return torch.where(mask, weight, self.beta * weight)
        through: Tensor = _StraightThrough.apply(weight, mask, self.beta, self.shrink)  # type: ignore[no-untyped-call]
        return through


class _StraightThrough(torch.autograd.Function):
    """Forward W ⊙ (M + β(1 − M)); backward the gradient as it is, plus λ(1 − M) ⊙ W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, beta: float, shrink: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.shrink = shrink
        return torch.where(mask, weight, beta * weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if not ctx.shrink:
            return grads[0], None, None, None
        weight, mask = ctx.saved_tensors
        return grads[0] + ctx.shrink * weight.masked_fill(mask, 0), None, None, None


CLAIM_MAPS = ("mix", "up", "down")
CLAIM_STEPS = 200


def _run_claim() -> Verdict:
    figures = {}
    for schedule in ("mdgf-exponential", "sr-ste"):
        model = untrained()
        flow = GradientFlow(model, pattern="1:16", steps=CLAIM_STEPS, schedule=schedule, include=CLAIM_MAPS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
        flow.attach(optimizer)
        train(model, optimizer, CLAIM_STEPS, seed=0)
        flow.bake()
        figures[f"{schedule}: held-out loss"] = held_out_loss(model)
    losses = list(figures.values())
    return Verdict(held=losses[0] < losses[1], figures=figures, note="nats per byte, 1 of 16 kept in three maps")


METHOD = Technique(
    name="gradient-flow",
    summary="trains towards keep N of M, pruned weights let go little by little (MdGF, SdGF; SR-STE)",
    paper=Paper(
        authors="A. R. Bambhaniya, A. Yazdanbakhsh, S. Subramanian, S.-C. Kao, S. Agrawal, U. Evci, T. Krishna",
        title="Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers",
        year=2024,
        link="https://arxiv.org/abs/2402.04744",
    ),
    entry=GradientFlow,
    claim=Claim(
        statement="Trained from scratch with 1 of 16 weights kept, exponential mask decay ends at a lower held-out "
        "loss than SR-STE after as many steps.",
        source="abstract: better than conventional sparse recipes at high sparsity; table of 1:16 and above",
        run=_run_claim,
    ),
)
