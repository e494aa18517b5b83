r"""LoRA norms against √ln L: whether attention with an adapter is in the range where fast algorithms can exist.

*What it does.* Compares the largest entries of what enters an attention (through the frozen weight, through the
adapter, and both together) with √ln L, L the number of tokens. It gives the ratios and no verdict.

*Formula.* ‖XWᵀ‖_max, ‖X(αBA/r)ᵀ‖_max and ‖X(W + αBA/r)ᵀ‖_max, each divided by √ln L (natural logarithm; 2.88 at
L = 4096). The theorem, under the strong exponential time hypothesis: where these norms are o(√ln L) the update of
the adapter can be computed to 1/poly(L) in almost linear time in L; where they are larger, no algorithm does it in
truly subquadratic time.

*Cost.* Two products of X with a weight, O(L · in · out).

*When it does not help.* To choose a rank, a learning rate or a kernel. The threshold is asymptotic and has no
constant: a ratio of 0.5 or 2 at one L decides nothing, and no library holds the fast algorithm. Use it to compare:
adapters of one model with each other, or one adapter at several L. The scale (d, 1/√d or none) within the exponential
moves the ratio; here it is not applied.

*Departs from the paper in.* The paper multiplies from the right (X W, X ∈ L × d); W here is (out, in), so XWᵀ.

*Reference.* J. Y.-C. Hu, M. Su, E.-J. Kuo, Z. Song, H. Liu, “Computational limits of low-rank adaptation (LoRA)
fine-tuning for transformer models”, ICLR 2025, https://arxiv.org/abs/2406.03136; the claim: J. Alman, Z. Song, “Fast
attention requires bounded entries”, NeurIPS 2023, https://arxiv.org/abs/2302.13214.

*Example.*

>>> import torch
>>> X, W = torch.ones(4096, 2), torch.tensor([[1.0, 1.0], [0.0, 0.5]])
>>> A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])
>>> {name: round(float(finding), 3) for name, finding in lora_norms(X, W, A, B, alpha=2).items()}
{'frozen_norm_ratio': 0.693, 'adapter_norm_ratio': 0.693, 'adapted_norm_ratio': 0.867}
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from eckart.errors import InputError, problems
from eckart.geometry.representations import real_tensor
from eckart.records import Claim, Diagnostic, Finding, Paper, Verdict


def lora_norms(inputs: Tensor, weight: Tensor, A: Tensor, B: Tensor, *, alpha: float) -> dict[str, Finding]:
    """Findings ``frozen_norm_ratio``, ``adapter_norm_ratio``, ``adapted_norm_ratio``: largest entry over √ln L.

    ``inputs`` (L, in) of one sequence of L ≥ 2 tokens; ``weight`` (out, in); ``A`` (r, in), ``B`` (out, r) and
    ``alpha`` of the adapter, whose update is alpha/r · BA. Each finding has the norm and √ln L in ``details``.

    Raises InputError for shapes that do not belong together, one token, an alpha that is no finite number;
    NotFiniteError for NaN or Inf.
    """
    X, W = real_tensor(inputs, "inputs", "tokens × in"), real_tensor(weight, "weight", "out × in")
    A, B = real_tensor(A, "A", "rank × in"), real_tensor(B, "B", "out × rank")
    L, r = X.shape[0], A.shape[0]
    found = []
    if L < 2:
        found.append("a sequence has two tokens or more, since ln 1 = 0")
    if W.shape[1] != X.shape[1] or A.shape[1] != X.shape[1] or B.shape != (W.shape[0], r):
        shapes = ", ".join(str(tuple(t.shape)) for t in (X, W, A, B))
        found.append(f"expected (L, in), (out, in), (r, in), (out, r); got {shapes}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        found.append(f"alpha is a number; got {alpha!r}")
    if found:
        raise InputError(problems("lora_norms", found))
    frozen, update = X @ W.T, (alpha / r) * (X @ A.T) @ B.T
    root = math.sqrt(math.log(L))
    return {
        name: Finding(
            name=name,
            value=float(product.abs().max()) / root,
            uncertainty=0.0,
            n=L,
            notes=("the threshold is asymptotic and has no constant: compare, do not judge",),
            details={"norm": float(product.abs().max()), "root_log_tokens": root, "rank": r},
        )
        for name, product in (
            ("frozen_norm_ratio", frozen),
            ("adapter_norm_ratio", update),
            ("adapted_norm_ratio", frozen + update),
        )
    }


CLAIM_TOKENS, CLAIM_WIDTH = 512, 8
CLAIM_RATIOS = (0.25, 0.5, 1.0, 2.0)


def _rank_needed(P: Tensor, error: float) -> int:
    """Least rank at which the truncated SVD of P has no entry off by more than ``error``."""
    U, S, Vh = torch.linalg.svd(P)
    rest = P.clone()
    for k in range(len(S)):
        if rest.abs().max() <= error:
            return k
        rest -= S[k] * torch.outer(U[:, k], Vh[k])
    return len(S)


def _run_claim() -> Verdict:
    generator = torch.Generator().manual_seed(0)
    shape = (CLAIM_TOKENS, CLAIM_WIDTH)
    Q = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    K = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    ranks = []
    for ratio in CLAIM_RATIOS:
        scale = ratio * math.sqrt(math.log(CLAIM_TOKENS))
        attention = (scale**2 * (Q @ K.T) / CLAIM_WIDTH).softmax(dim=1)
        ranks.append(float(_rank_needed(attention, CLAIM_TOKENS**-2.0)))
    figures = {f"ratio {ratio:g}: rank of the attention": rank for ratio, rank in zip(CLAIM_RATIOS, ranks, strict=True)}
    return Verdict(
        held=all(a < b for a, b in itertools.pairwise(ranks)),
        figures=figures,
        note=f"{CLAIM_TOKENS} tokens, uniform queries and keys; an ordering, no threshold",
    )


METHOD = Diagnostic(
    name="lora-norms",
    summary="largest entries of what frozen weight and adapter send into attention, as a ratio to √ln L",
    group="representations",
    paper=Paper(
        authors="J. Y.-C. Hu, M. Su, E.-J. Kuo, Z. Song, H. Liu",
        title="Computational limits of low-rank adaptation (LoRA) fine-tuning for transformer models",
        year=2025,
        link="https://arxiv.org/abs/2406.03136",
    ),
    entry=lora_norms,
    claim=Claim(
        statement="The rank that the attention matrix needs for an error of at most 1/L² in every entry rises with the "
        "ratio of the largest entries of queries and keys to √ln L (0.25, 0.5, 1, 2).",
        source="sections 3 and 5: the fast algorithms are chains of low-rank approximations, below the threshold only",
        run=_run_claim,
    ),
)
