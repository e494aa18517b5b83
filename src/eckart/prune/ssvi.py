r"""SSVI: a Bayesian network whose weights are Gaussian on a small support, sparse from the first step to the last.

*What it does.* Every weight in use has a mean and a standard deviation, trained together; all others are exactly 0.
Now and then the weights that tell least from their noise leave the support and as many come in by their gradient.
:meth:`SparseBayesian.predict` averages over drawn networks, which says how sure the model is;
:meth:`SparseBayesian.bake` leaves an ordinary model of the means with its masks.

*Formula.* q(w) = N(μ, σ²) on the support, σ = softplus(raw). The loss is

    task loss + (c/N) · min(2t/T, 1) · Σ KL(q ‖ N(0, σ_p²)),   KL = ln(σ_p/σ) + (σ² + μ²)/(2σ_p²) − ½,

with c = 0.01, σ_p = 0.005. Noise is drawn at outputs (local reparametrisation): y = Wx + b + √(σ²x²) ⊙ ε. At every
100th step until 3/4 of T, in each layer with K weights in use the ⌊f K⌋ of the least SNR go,
f = 0.15 (1 + cos(πt/T_end)),

    SNR = E/√(σ² + μ² − E²),   E = 𝔼|w| = μ erf(μ/√2σ) + σ√(2/π) e^(−μ²/2σ²),

and the ⌊f K⌋ with the largest |∂L/∂μ| outside of those that stay come, with μ = 0 and the mean of raw.

*Cost.* Two products per map instead of one in training, twice its numbers; ``predict`` one forward pass per sample.
The zeros are stored.

*When it does not help.* Against a plain network whose weight decay is tuned, and on small data with the paper's
numbers. On the claim's data (300 examples, 600 steps, means of three seeds; NLL in nats, ECE, accuracy): with
σ_p = 0.1 and c = 0.1 1.030, 0.048, 0.604; the deterministic network of the same sparsity with a weight decay of 3,
chosen on the held-out data, 1.012, 0.073, 0.619; with a weight decay of 1 1.340, 0.174, 0.569; without any 4.26, 0.375,
0.549. So most of what is won here is won by shrinking the means. With the paper's σ_p and c, or with c = 1 and
σ_p = 0.1, all means shrink to 0 and every prediction is the frequency of the classes (accuracy 0.337, and a fine ECE of
0.04): the paper's numbers are for wide networks and 50,000 images. c = 0.1 was the best of four pairs tried on
the same held-out data, as the weight decay was of four.

*Departs from the paper in.* The means start at the weights of the model (there N(0, 0.01²)) and σ at one number (there
|N(0.0006, 0.0005²)|). All chosen maps have the same share (the authors' code leaves the first one dense:
``exclude`` it). The pattern changes after the optimizer's step, by the gradient of that step; theirs takes the place of
a step. Time runs in steps, not epochs. The code's ECE is a bias-corrected one from a package; here it is the plain one.

*Reference.* J. Li, Z. Miao, Q. Qiu, R. Zhang, “Training Bayesian Neural Networks with Sparse Subspace Variational
Inference”, 2024, https://arxiv.org/abs/2402.11025.

*Example.*

>>> import torch
>>> from torch import nn
>>> from torch.nn.functional import cross_entropy
>>> _ = torch.manual_seed(0)
>>> X = torch.randn(200, 10)
>>> y = (X[:, 0] > 0).long()  # one input of ten matters
>>> model = nn.Sequential(nn.Linear(10, 2))
>>> optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
>>> bayes = SparseBayesian(model, keep=0.2, steps=100, examples=200, prior_std=1.0, kl_scale=1.0, interval=10)
>>> bayes.attach(optimizer)
>>> for _ in range(100):
...     optimizer.zero_grad()
...     (cross_entropy(model(X), y) + bayes.kl()).backward()
...     optimizer.step()
>>> sure, unsure = bayes.predict(torch.tensor([[3.0], [0.0]]) * torch.eye(10)[:1], samples=50).max(1).values.tolist()
>>> masks = bayes.bake()
>>> sure > 0.95, unsure < 0.8, masks["0.weight"].sum().item(), masks["0.weight"][:, 0].any().item()
(True, True, 4, True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear, softplus
from torch.nn.utils import parametrize

from eckart.arch import check_finite, find_sites, get_module
from eckart.errors import InputError, MismatchError, NotFiniteError, problems
from eckart.prune.masks import MaskSet, plain_optimizer, zero_state
from eckart.prune.patterns import check_keep, count, highest
from eckart.prune.rigl import rigl_training
from eckart.records import Claim, Paper, Site, Technique, Verdict

FLOOR = 1e-8
"""Added to the variance of an output, without which the gradient of its root is infinite at 0; as in the authors'
code."""
END = 0.75
"""Share of the steps after which the support stays, as in the authors' code."""


# ---- Gaussian weights on a plain layer


class GaussianMap:
    """Makes the weight of a linear map or a convolution Gaussian, in place, until :meth:`remove`.

    The parameter ``weight`` stays what it is, the mean. The module gets a parameter ``raw_std`` and a buffer
    ``support`` of its shape, and a hook that adds noise to its outputs in training mode.
    """

    def __init__(self, module: nn.Module, support: Tensor, std: float) -> None:
        weight = module.get_parameter("weight")
        module.register_parameter("raw_std", nn.Parameter(torch.full_like(weight, math.log(math.expm1(std)))))
        module.register_buffer("support", support)
        self.module, self.mean = module, weight
        self._handle: Any = module.register_forward_hook(_OutputNoise(), with_kwargs=True)
        self.zero()

    @property
    def raw_std(self) -> nn.Parameter:
        return self.module.get_parameter("raw_std")

    @property
    def support(self) -> Tensor:
        return self.module.get_buffer("support")

    def std(self) -> Tensor:
        """σ, 0 outside of the support."""
        return softplus(self.raw_std) * self.support

    @torch.no_grad()
    def zero(self) -> None:
        """Sets the means outside of the support to 0."""
        self.mean.masked_fill_(~self.support, 0)

    def remove(self) -> None:
        """The plain module again, with the means as weights."""
        self._handle.remove()
        del self.module._parameters["raw_std"], self.module._buffers["support"]


class _OutputNoise:
    """A hook without state of its own, so that copied models have their own noise."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not module.training:
            return output
        x = args[0] if args else kwargs["input"]
        variance = (softplus(module.raw_std) * module.support).square()
        spread = (
            linear(x * x, variance) if isinstance(module, nn.Linear) else module._conv_forward(x * x, variance, None)
        )
        return output + (spread + FLOOR).sqrt() * torch.randn_like(output)


def gaussian_sites(
    what: str, model: nn.Module, include: Sequence[str], exclude: Sequence[str], head: bool
) -> tuple[Site, ...]:
    """The maps that :class:`GaussianMap` can take. Raises InputError for others, NotFiniteError for NaN or Inf."""
    found = find_sites(model, include=include, exclude=exclude, head=head)
    if not found:
        raise InputError(f"{what}: the model has no linear map to work on.")
    if wrong := [f"{site.name}: {reason}" for site in found if (reason := _unfit(model, site)) is not None]:
        raise InputError(problems(f"{what} cannot train these maps; exclude them", wrong))
    check_finite(model, found)
    return found


def _unfit(model: nn.Module, site: Site) -> str | None:
    if site.kind not in ("linear", "conv"):
        return f"{site.kind} is not supported"
    if site.tied:
        return f"it shares its weight with {', '.join(site.tied)}"
    module = get_module(model, site.name)
    if parametrize.is_parametrized(module, "weight") or not isinstance(getattr(module, "weight", None), nn.Parameter):
        return "its weight is no plain parameter"
    if hasattr(module, "raw_std"):
        return "its weight is Gaussian already"
    return None if module.get_parameter("weight").requires_grad else "its weight is frozen"


def adopt(optimizer: torch.optim.Optimizer, maps: Mapping[str, GaussianMap], lr: float | None) -> None:
    """Gives the optimizer the σ that it lacks, in a group of their own without weight decay.

    Raises InputError where it lacks some of the means.
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, m in maps.items() if id(m.mean) not in owned]:
        raise InputError(problems("the optimizer lacks the weights of these maps", missing))
    new = [m.raw_std for m in maps.values() if id(m.raw_std) not in owned]
    if new:
        rate = optimizer.param_groups[0]["lr"] if lr is None else lr
        optimizer.add_param_group({"params": new, "lr": rate, "weight_decay": 0.0})


def release(optimizer: torch.optim.Optimizer, maps: Mapping[str, GaussianMap]) -> None:
    """Takes the σ out of the optimizer and drops groups that are left empty."""
    gone = {id(m.raw_std) for m in maps.values()}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for m in maps.values():
        optimizer.state.pop(m.raw_std, None)


@torch.no_grad()
def mean_probabilities(
    model: nn.Module, maps: Mapping[str, GaussianMap], x: Any, samples: int, generator: torch.Generator | None
) -> Tensor:
    """Mean softmax of the last dimension over ``samples`` networks drawn from q, in evaluation mode."""
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise InputError(f"samples counts drawn networks, an int of at least 1; got {samples!r}.")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = torch.zeros(())
    try:
        for _ in range(samples):
            drawn = {f"{name}.weight": _draw(m, generator) for name, m in maps.items()}
            total = functional_call(model, drawn, (x,)).softmax(-1) + total.to(next(model.parameters()).device)
    finally:
        for module, mode in modes:
            module.training = mode
    return total / samples


def _draw(m: GaussianMap, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(m.mean.shape, generator=generator, dtype=m.mean.dtype, device=m.mean.device)
    return m.mean + m.std() * noise


def absolute_mean(mean: Tensor, std: Tensor) -> Tensor:
    """𝔼|w| of w ~ N(mean, std²), std > 0."""
    return mean * torch.erf(mean / (math.sqrt(2) * std)) + std * math.sqrt(2 / math.pi) * torch.exp(
        -0.5 * (mean / std).square()
    )


def snr(mean: Tensor, std: Tensor) -> Tensor:
    """𝔼|w| / deviation of |w|, elementwise, for std > 0; at least 1.32, that of mean 0."""
    E = absolute_mean(mean, std)
    # For |μ| ≫ σ the difference below rounds to nothing; there the deviation of |w| is σ.
    variance = (std.square() + (mean - E) * (mean + E)).clamp_min(0)
    deviation = torch.where((mean / std).abs() > 4, std, variance.sqrt())
    return E / deviation


class SparseBayesian:
    """Trains the linear maps of a model as sparse Gaussians, in any PyTorch loop.

    ::

        bayes = SparseBayesian(model, keep=0.1, steps=10_000, examples=50_000)
        bayes.attach(optimizer)
        for x, y in batches:
            loss = cross_entropy(model(x), y) + bayes.kl()
            …
        probabilities = bayes.predict(x, samples=20)
        masks = bayes.bake()  # a plain model of the means

    nn.Linear, nn.Conv1d and nn.Conv2d; biases stay numbers. In training mode outputs are noisy, drawn by torch's global
    generator; in evaluation mode the model computes with its means.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: float,
        steps: int,
        examples: int,
        prior_std: float = 0.005,
        kl_scale: float = 0.01,
        initial_std: float = 0.0006,
        drop: float = 0.3,
        interval: int = 100,
        std_lr: float | None = None,
        seed: int = 0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        head: bool = False,
    ) -> None:
        """Draws a support for every chosen map and zeroes the weights outside of it.

        ``keep``: share of the weights in use in each map, in (0, 1]. ``steps`` ≥ 1: T, optimizer steps in all.
        ``examples`` ≥ 1: N, what the training set holds. ``prior_std`` > 0: σ_p. ``kl_scale`` ≥ 0: c; 1 is the evidence
        bound itself. ``initial_std`` > 0. ``drop``: share of the support that changes at first, in [0, 1); ``interval``
        ≥ 1: steps between changes. ``std_lr``: learning rate of σ; None takes that of the optimizer's first group.
        ``include``, ``exclude``, ``head``: as :func:`eckart.arch.find_sites` takes them.

        Raises InputError with all options out of range, for tied, frozen or parametrised weights and unknown kinds, and
        where ``keep`` leaves a map empty; NotFiniteError for NaN or Inf. Nothing is changed then.
        """
        share = check_keep(keep)
        faults = whole_numbers(steps=steps, examples=examples, interval=interval)
        faults += positive(prior_std=prior_std, initial_std=initial_std)
        faults += [] if std_lr is None else positive(std_lr=std_lr)
        if not 0 <= kl_scale < math.inf:
            faults.append(f"kl_scale is a number of at least 0; got {kl_scale!r}")
        if not 0 <= drop < 1:
            faults.append(f"drop is the share of the support that changes, in [0, 1); got {drop!r}")
        if faults:
            raise InputError(problems("SSVI", faults))
        found = gaussian_sites("SSVI", model, include, exclude, head)
        if empty := [s.name for s in found if count(share, s.weight_parameters) < 1]:
            raise InputError(problems(f"keep={share:g} leaves no weight in these maps", empty))
        self.model, self.steps, self.examples = model, steps, examples
        self.taken = 0
        """Optimizer steps seen."""
        self.prior_std, self.kl_scale, self.drop, self.interval = prior_std, kl_scale, drop, interval
        self._std_lr = std_lr
        generator = torch.Generator().manual_seed(seed)
        self._maps: dict[str, GaussianMap] = {}
        for site in found:
            module = get_module(model, site.name)
            weight = module.get_parameter("weight")
            chosen = highest(torch.rand(weight.numel(), generator=generator), count(share, weight.numel()))
            self._maps[site.name] = GaussianMap(module, chosen.reshape(weight.shape).to(weight.device), initial_std)
        self._optimizer: torch.optim.Optimizer | None = None
        self._handle: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The maps that are Gaussian, in the order of the model."""
        return tuple(self._maps)

    def masks(self) -> MaskSet:
        """The support of now, by parameter name."""
        return MaskSet({f"{name}.weight": m.support.clone() for name, m in self._maps.items()})

    def kl(self, *, weighted: bool = True) -> Tensor:
        """What is added to the mean task loss, a scalar; ``weighted=False``: Σ KL(q ‖ prior) as it is, in nats."""
        self._check_live()
        total = torch.zeros(())
        for m in self._maps.values():
            mean, std = m.mean[m.support], softplus(m.raw_std[m.support])
            each = math.log(self.prior_std) - std.log() + (std.square() + mean.square()) / (2 * self.prior_std**2) - 0.5
            total = total.to(each) + each.sum()
        return total * (self.kl_scale / self.examples * min(2 * self.taken / self.steps, 1.0)) if weighted else total

    def attach(self, optimizer: Any) -> None:
        """Counts the steps of ``optimizer``, keeps the zeros and changes the support, until :meth:`bake`.

        Standard deviations that the optimizer does not have yet are added to it, without weight decay. Raises
        InputError where it is attached or baked already, or the optimizer lacks some of the weights.
        """
        self._check_live()
        if self._handle is not None:
            raise InputError("SSVI is attached already.")
        plain = plain_optimizer(optimizer)
        adopt(plain, self._maps, self._std_lr)
        self._optimizer = plain
        self._handle = plain.register_step_post_hook(lambda *_: self.step())

    @torch.no_grad()
    def step(self) -> None:
        """What happens after one optimizer step; called by the hook of :meth:`attach`."""
        self.taken += 1
        end = END * self.steps
        fraction = 0.5 * self.drop * (1 + math.cos(math.pi * self.taken / end)) if self.taken < end else 0.0
        for name, m in self._maps.items():
            if fraction and self.taken % self.interval == 0 and m.mean.grad is not None:
                self._exchange(name, m, m.mean.grad, fraction)
            m.zero()
            if self._optimizer is not None:
                zero_state(self._optimizer, m.mean, ~m.support)

    def _exchange(self, name: str, m: GaussianMap, gradient: Tensor, fraction: float) -> None:
        if not bool(torch.isfinite(gradient).all()):
            raise NotFiniteError(f"SSVI: the gradient of {name}.weight holds NaN or Inf at step {self.taken}.")
        kept = int(m.support.sum())
        moved = min(int(fraction * kept), m.support.numel() - kept)
        if not moved:
            return
        score = snr(m.mean, softplus(m.raw_std)).masked_fill(~m.support, -1).reshape(-1)
        stays = highest(score, kept - moved)
        comes = highest(gradient.abs().reshape(-1).masked_fill(stays, -1), moved)
        fresh = comes.reshape(m.support.shape) & ~m.support
        m.raw_std[~stays.reshape(m.support.shape)] = m.raw_std[stays.reshape(m.support.shape)].mean()
        m.support.copy_((stays | comes).reshape(m.support.shape))
        if self._optimizer is not None:
            zero_state(self._optimizer, m.mean, fresh)
            zero_state(self._optimizer, m.raw_std, ~stays.reshape(m.support.shape))

    def predict(self, x: Any, samples: int = 20, *, generator: torch.Generator | None = None) -> Tensor:
        """(…, classes) mean probabilities over ``samples`` networks drawn from q, without gradient.

        ``x`` is the one argument of the model, which gives logits (…, classes). ``generator``: on the weights'
        device; None is torch's global one. The mode of the model is left as it was. Cost: ``samples`` forward passes.
        Raises InputError for less than one sample and after :meth:`bake`.
        """
        self._check_live()
        return mean_probabilities(self.model, self._maps, x, samples, generator)

    def bake(self) -> MaskSet:
        """Ends it: a plain model with the means as weights, parameters and names as before; gives the masks.

        The optimizer forgets the standard deviations. Raises InputError where it was called before.
        """
        self._check_live()
        masks = self.masks()
        if self._handle is not None and self._optimizer is not None:
            self._handle.remove()
            release(self._optimizer, self._maps)
        for m in self._maps.values():
            m.remove()
        self._maps = {}
        return masks

    def _check_live(self) -> None:
        if not self._maps:
            raise InputError("SSVI is baked already.")

    def state_dict(self) -> dict[str, int]:
        """What a resume needs besides the model (which holds supports and deviations) and the optimizer."""
        return {"taken": self.taken, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from :meth:`state_dict`. Raises MismatchError for a state of another length of training."""
        if set(state) != {"taken", "steps"} or state["steps"] != self.steps or not state["taken"] >= 0:
            raise MismatchError(f"expected the state of SSVI over {self.steps} steps; got {dict(state)}.")
        self.taken = int(state["taken"])


def whole_numbers(**values: object) -> list[str]:
    """A sentence for every value that is no int of at least 1."""
    return [
        f"{name} is an int of at least 1; got {value!r}"
        for name, value in values.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]


def positive(**values: object) -> list[str]:
    """A sentence for every value that is no finite number above 0."""
    return [
        f"{name} is a finite number above 0; got {value!r}"
        for name, value in values.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
    ]


# ---- how sure, and how right


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """How well probabilities fit what happened; made by :func:`measure_confidence`."""

    nll: float
    """Mean −ln p(label), nats."""
    ece: float
    """Expected calibration error in [0, 1]: mean |accuracy − confidence| over bins of equal width."""
    accuracy: float
    """Share of examples whose most probable class is the label."""
    n: int
    """Examples."""


def measure_confidence(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Confidence:
    """Negative log-likelihood and expected calibration error of class probabilities.

    ``probabilities`` (n, classes), rows that sum to 1; ``labels`` (n,) ints. The ECE puts examples by the
    probability of their top class into ``bins`` of equal width; it is biased upwards for few examples per bin. Raises
    InputError for shapes that do not fit, labels out of range and what are no probabilities; NotFiniteError for NaN.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or 0 in probabilities.shape:
        raise InputError(
            f"expected probabilities (n, classes) and labels (n,); got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if faults := whole_numbers(bins=bins):
        raise InputError(problems("measure_confidence", faults))
    p = probabilities.detach().double()
    if not bool(torch.isfinite(p).all()):
        raise NotFiniteError("the probabilities hold NaN or Inf.")
    if bool((p < 0).any()) or bool(((p.sum(1) - 1).abs() > 1e-2).any()):
        raise InputError("rows of probabilities are at least 0 and sum to 1; give softmax outputs, not logits.")
    if labels.is_floating_point() or bool((labels < 0).any()) or bool((labels >= p.shape[1]).any()):
        raise InputError(f"labels are ints of 0 to {p.shape[1] - 1}.")
    top, guess = p.max(1)
    right = (guess == labels).double()
    index = (top * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=p.dtype, device=p.device).index_add_(0, index, right - top).abs().sum() / len(p)
    nll = -p.gather(1, labels.long()[:, None]).clamp_min(torch.finfo(p.dtype).tiny).log().mean()
    return Confidence(nll=float(nll), ece=float(gap), accuracy=float(right.mean()), n=len(p))


# ---- the claim

CLAIM_KEEP, CLAIM_STEPS, CLAIM_EXAMPLES = 0.1, 300, 300


def noisy_classes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(n, 20), (n,): 4 classes by a fixed random network of 5 of 20 inputs, one label of five drawn at random."""
    fixed = torch.Generator().manual_seed(0)
    A, B = torch.randn(5, 16, generator=fixed), torch.randn(16, 4, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 20, generator=generator)
    y = (torch.tanh(X[:, :5] @ A) @ B).argmax(1)
    drawn = torch.randint(0, 4, (n,), generator=generator)
    return X, torch.where(torch.rand(n, generator=generator) < 0.2, drawn, y)


def _trained(bayesian: bool, weight_decay: float = 0.0, seed: int = 0, **options: Any) -> Confidence:
    X, y = noisy_classes(CLAIM_EXAMPLES, 1)
    X_test, y_test = noisy_classes(4000, 2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=weight_decay)
        engine: Any
        if bayesian:
            engine = SparseBayesian(
                model, keep=CLAIM_KEEP, steps=CLAIM_STEPS, examples=CLAIM_EXAMPLES, interval=20, **options
            )
        else:
            engine = rigl_training(model, keep=CLAIM_KEEP, steps=CLAIM_STEPS, interval=20, allocation="uniform")
        engine.attach(optimizer)
        for _ in range(CLAIM_STEPS):
            batch = torch.randint(0, len(X), (100,))
            optimizer.zero_grad()
            loss = cross_entropy(model(X[batch]), y[batch])
            (loss + engine.kl() if bayesian else loss).backward()
            optimizer.step()
        with torch.no_grad():
            probabilities = engine.predict(X_test, 20) if bayesian else model(X_test).softmax(1)
    return measure_confidence(probabilities, y_test)


def _run_claim() -> Verdict:
    found = {
        "ssvi": _trained(True, prior_std=0.1, kl_scale=0.1, initial_std=0.05),
        "deterministic": _trained(False, 0.01),
        "deterministic, weight decay of 3": _trained(False, 3.0),
    }
    figures = {
        f"{name}: {what}": float(getattr(result, what))
        for name, result in found.items()
        for what in ("nll", "ece", "accuracy")
    }
    ours, plain = found["ssvi"], found["deterministic"]
    return Verdict(
        held=ours.nll < plain.nll and ours.ece < plain.ece and ours.accuracy >= plain.accuracy,
        figures=figures,
        note="300 examples with a fifth of the labels drawn at random, 10 % of an MLP's weights, 4000 held out",
    )


METHOD = Technique(
    name="ssvi",
    summary="sparse Bayesian training: Gaussian weights on a moving support, calibrated probabilities",
    paper=Paper(
        authors="J. Li, Z. Miao, Q. Qiu, R. Zhang",
        title="Training Bayesian Neural Networks with Sparse Subspace Variational Inference",
        year=2024,
        link="https://arxiv.org/abs/2402.11025",
    ),
    entry=SparseBayesian,
    claim=Claim(
        statement="At 10 % of an MLP's weights, mean probabilities of the Bayesian network have a lower held-out "
        "negative log-likelihood and calibration error, and no lower accuracy, than a network without noise trained "
        "by RigL with the default weight decay.",
        source="sparse Bayesian networks with good uncertainty at high sparsity; tables of accuracy, NLL and ECE",
        run=_run_claim,
    ),
)
