r"""What changed between two weights: how much, in how many directions, and in which ones.

*What it does.* Compares a weight with that of a base model: the size and the rank of the change, whether it lies in
the directions that the base already used, and what rank a LoRA adapter needs to hold it.

*Formula.* ΔW = W − W₀. ``delta_relative`` = ‖ΔW‖_F / ‖W₀‖_F; ranks as in :func:`eckart.spectra.spectrum`. With k = the
90 % energy rank of ΔW (at most p/4) and U_k, V_k the leading singular vectors of W₀:
``delta_overlap_left`` = ‖U_kᵀ U_k(ΔW)‖²_F / k, the share of the change's output directions that the base's leading ones
hold, k/out for unrelated ones; ``delta_overlap_right`` alike for inputs. ``delta_gain`` = ‖ΔW_k‖_F / ‖UᵀW₀V‖_F with U,
V of ΔW: by how much the base's own strength in these directions is exceeded (the amplification factor of the LoRA
paper). ``delta_lora_rank`` is the least rank that holds the share ``energy`` of ‖ΔW‖².

*Cost.* One more spectrum; the overlaps two truncated decompositions, several times as much (``vectors=False`` leaves
them out).

*When it does not help.* A model saved in bfloat16 differs from its float32 self by rounding, a full-rank change of
about 0.2 %. Merged or permuted models differ in everything. Energy is not accuracy: a LoRA rank that holds 90 % of the
change may hold all or little of what it does.

*Departs from the paper in.* The paper takes r = 4, 16, 64 directions; here k comes from the change itself, and the
overlaps stand beside what unrelated subspaces have.

*Reference.* E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen, “LoRA: Low-Rank Adaptation of
Large Language Models”, 2021, https://arxiv.org/abs/2106.09685 (section 7.3).

*Example.*

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> W0 = torch.randn(40, 60, generator=generator)
>>> found = difference(W0 + torch.outer(torch.ones(40), torch.ones(60)), W0)
>>> {name: round(found[name].value, 2) for name in ("delta_relative", "delta_rank_99", "delta_lora_rank")}
{'delta_relative': 0.99, 'delta_rank_99': 1.0, 'delta_lora_rank': 1.0}
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eckart.data import read_texts
from eckart.errors import InputError
from eckart.evidence import learned_problem
from eckart.evidence.network import CONTEXT, forward
from eckart.linalg import truncated_svd
from eckart.records import Claim, Diagnostic, Finding, Paper, SiteKind, Verdict
from eckart.spectra.ranks import energy_rank, spectrum
from eckart.spectra.values import Spectrum, as_matrices, frobenius, not_finite, over_slices, singular_values

RANKS = ("stable_rank", "effective_rank", "rank_90", "rank_95", "rank_99")
"""The findings of :func:`eckart.spectra.spectrum` that are given of the change."""
VECTORS = ("delta_overlap_left", "delta_overlap_right", "delta_gain")
NAMES = ("delta_relative", *(f"delta_{name}" for name in RANKS), "delta_lora_rank", *VECTORS)
"""The findings of :func:`difference`."""


def difference(
    W: Tensor,
    base: Tensor,
    *,
    kind: SiteKind | None = None,
    groups: int = 1,
    energy: float = 0.9,
    vectors: bool = True,
) -> dict[str, Finding]:
    """What changed from ``base`` to W, both (out, in) or stacks of such, by name: ``NAMES`` of its module.

    Without ``vectors`` the overlaps and ``delta_gain`` are left out. ``energy``, in (0, 1]: the share of the change
    that ``delta_lora_rank`` keeps. Equal weights give ``delta_relative`` 0 and None for the rest. A change whose LoRA
    rank reaches the break-even rank says so in ``notes``. Raises InputError for tensors that are no weights and for a
    base of another shape.
    """
    if not 0 < energy <= 1:
        raise InputError(f"difference: energy is a share in (0, 1]; got {energy!r}.")
    one, other = as_matrices(W, "difference", kind, groups), as_matrices(base, "difference", kind, groups)
    if one.shape != other.shape:
        raise InputError(
            f"difference: expected a base of the same shape {tuple(W.shape)}; got {tuple(base.shape)}. "
            "Compare models of one architecture."
        )
    names = NAMES if vectors else tuple(name for name in NAMES if name not in VECTORS)
    if flaw := not_finite(one) or not_finite(other):
        return {name: Finding(name=name, value=None, notes=(flaw,)) for name in names}
    delta = subtract(one, other)
    s = singular_values(delta)
    notes: tuple[str, ...] = ()
    if W.dtype != base.dtype:
        coarse = max(torch.finfo(W.dtype).eps, torch.finfo(base.dtype).eps)
        notes = (
            f"{_name(base.dtype)} against {_name(W.dtype)}: includes rounding of about {coarse / 2:.1g}, relative",
        )
    parts = [
        _one(s, index, one[index], other[index], delta[index], energy, vectors, notes) for index in range(len(delta))
    ]
    return {name: over_slices(name, [part[name] for part in parts]) for name in names}


def subtract(W: Tensor, base: Tensor) -> Tensor:
    """W − base in float64 where either is, otherwise in float32."""
    dtype = torch.float64 if torch.float64 in (W.dtype, base.dtype) else torch.float32
    return W.to(dtype) - base.to(W.device, dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one(
    s: Spectrum,
    index: int,
    W: Tensor,
    base: Tensor,
    delta: Tensor,
    energy: float,
    vectors: bool,
    notes: tuple[str, ...],
) -> dict[str, Finding]:
    values = s.values[index]
    alone = Spectrum(values[None], s.out_features, s.in_features, s.resolution)
    p = values.numel()
    size, own = float(values.square().sum().sqrt()), frobenius(base)
    found = {}
    if own > 0:
        found["delta_relative"] = Finding(
            name="delta_relative", value=size / own, uncertainty=0.0, n=W.numel(), notes=notes
        )
    else:
        found["delta_relative"] = Finding(name="delta_relative", value=None, notes=("the base is zero",))
    ranks = spectrum(alone)
    for name in RANKS:
        part = ranks[name]
        reason = (*notes, "nothing changed") if size == 0 else notes
        found[f"delta_{name}"] = Finding(
            name=f"delta_{name}", value=part.value, uncertainty=part.uncertainty, n=p, notes=reason
        )
    rank = energy_rank(values, energy) if size > 0 else None
    found["delta_lora_rank"] = Finding(
        name="delta_lora_rank",
        value=None if rank is None else float(rank),
        uncertainty=None if rank is None else 0.0,
        n=p,
        notes=(*notes, *_lora_words(rank, s, energy)),
    )
    if vectors:
        found |= _overlaps(base, delta, values)
    return found


def _lora_words(rank: int | None, s: Spectrum, energy: float) -> tuple[str, ...]:
    if rank is None:
        return ("nothing changed",)
    even = s.out_features * s.in_features / (s.out_features + s.in_features)
    if rank >= even:
        return (f"a LoRA of that rank is no smaller than the change itself (break-even at {even:.0f})",)
    return (f"holds {100 * energy:g} % of the change; the next power of two is {1 << (rank - 1).bit_length()}",)


def _overlaps(base: Tensor, delta: Tensor, values: Tensor) -> dict[str, Finding]:
    m, n = delta.shape
    if not values[0] > 0 or not bool(base.any()):
        why = "the base is zero" if values[0] > 0 else "nothing changed"
        return {name: Finding(name=name, value=None, notes=(why,)) for name in VECTORS}
    k = max(1, min(energy_rank(values, 0.9), min(m, n) // 4))
    # Computed apart, since a base need not be of the change's precision.
    change, own = truncated_svd(delta.double(), k), truncated_svd(base.double(), k)
    left = float((own.U.T @ change.U).square().sum()) / k
    right = float((own.Vh @ change.Vh.T).square().sum()) / k
    inside = change.U.T @ base.to("cpu", torch.float64) @ change.Vh.T
    gain = float(change.S.square().sum().sqrt()) / max(float(inside.square().sum().sqrt()), 1e-300)
    return {
        "delta_overlap_left": Finding(
            name="delta_overlap_left", value=left, n=k, details={"unrelated": k / m, "directions": k}
        ),
        "delta_overlap_right": Finding(
            name="delta_overlap_right", value=right, n=k, details={"unrelated": k / n, "directions": k}
        ),
        "delta_gain": Finding(name="delta_gain", value=gain, n=k, details={"directions": k}),
    }


def _fine_tuned(steps: int) -> dict[str, Tensor]:
    """The learned network after ``steps`` of AdamW on docstrings instead of source."""
    texts = read_texts("stdlib:docstrings", limit=2000).texts
    stream = torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8)
    windows = stream.unfold(0, CONTEXT + 1, 1)
    parameters = {k: v.clone().requires_grad_() for k, v in learned_problem().parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        sample = windows[torch.randint(0, len(windows), (256,), generator=generator)].long()
        loss = cross_entropy(forward(parameters, sample[:, :CONTEXT]), sample[:, CONTEXT])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return {k: v.detach() for k, v in parameters.items()}


def _run_claim() -> Verdict:
    """In the directions of the change, at the paper's r = 4: W₀ against noise of its size, and its own best."""
    problem, tuned = learned_problem(), _fine_tuned(300)
    figures: dict[str, float] = {}
    held = True
    generator = torch.Generator().manual_seed(0)
    for name in ("mix", "up", "down", "head"):
        W0 = problem.weights(name)["weight"].double()
        D = tuned[f"{name}.weight"].double() - W0
        noise = torch.randn(W0.shape, dtype=torch.float64, generator=generator)
        noise *= W0.norm() / noise.norm()
        own, random, leading = _strength(W0, D), _strength(noise, D), _strength(W0, W0)
        figures |= {
            f"{name}: W₀ in the change's directions": own,
            f"{name}: noise in them": random,
            f"{name}: W₀ in its own": leading,
        }
        held = held and random < own < leading
    return Verdict(held=held, figures=figures, note="‖UᵀWV‖_F over 4 directions")


def _strength(W: Tensor, D: Tensor) -> float:
    """‖UᵀWV‖_F with the four leading directions of D."""
    found = truncated_svd(D, 4)
    return math.sqrt(float((found.U.T @ W @ found.Vh.T).square().sum()))


METHOD = Diagnostic(
    name="difference",
    summary="what changed against a base: size, rank, overlap with the base's directions, LoRA rank",
    group="weights",
    paper=Paper(
        authors="E. J. Hu, Y. Shen, P. Wallis, Z. Allen-Zhu, Y. Li, S. Wang, L. Wang, W. Chen",
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        year=2021,
        link="https://arxiv.org/abs/2106.09685",
    ),
    entry=difference,
    claim=Claim(
        statement="In the four leading directions of what fine-tuning changed, the learned maps are stronger than "
        "noise of their size and weaker than in their own leading directions.",
        source="Hu et al. 2021, section 7.3 and table 7: ΔW correlates with W more than a random matrix does, and does "
        "not repeat W's top singular directions",
        run=_run_claim,
    ),
)
