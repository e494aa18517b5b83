r"""Fisher-weighted SVD (FWSVD): rows of W that matter more to the loss are kept more exactly.

*What it does.* Weights every row (or every column) of W by its Fisher information before a plain SVD.

*Formula.* I_ij = E[(∂loss/∂W_ij)²] with (∂loss/∂W_ij) = g_i x_j per token. Row side: Î_i = Σ_j I_ij, Ŵ
= D⁻¹ SVD_k(D W), D = diag(√Î). Column side: Î_j = Σ_i I_ij, Ŵ = SVD_k(W D) D⁻¹. In the terms of tr(G ΔW
Σ ΔWᵀ): G = diag(Î_i), Σ = I; or G = I, Σ = diag(Î_j).

*Cost.* As plain SVD, after a backward pass over the calibration data.

*When it does not help.* The weights see one side only and no correlation. Inputs of transformers are
strongly correlated, so `whitened` and `kfac` beat it by far at equal size. The column side loses to
plain SVD in the claim below.

*Departs from the paper in.* Gradients are those of targets sampled from the model itself (the true
Fisher information) instead of labels, and are squared per token instead of per sequence. The column
side is not in the paper. There is no fine-tuning after it.

*Reference.* Y.-C. Hsu, T. Hua, S. Chang, Q. Lou, Y. Shen, H. Jin, “Language model compression with
weighted low-rank factorization”, 2022, https://arxiv.org/abs/2207.00112.

*Example.*

>>> import torch
>>> W = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
>>> importance = torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)
>>> moments = SiteMoments(count=1, fisher_rows=importance)
>>> error = W - METHOD.cut(prepare({"weight": W}, moments, Options()), 2, "lowrank").dense()
>>> bool(error[0].norm() < 0.1 * error[1:].norm(dim=1).max())
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from torch import Tensor

from eckart.compression import svd
from eckart.compression.factorise import cut, factorise
from eckart.compression.method import CompressMethod, Prepared
from eckart.compression.needs import needed
from eckart.compression.trial import as_figures, rises
from eckart.errors import InputError
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, Site, Verdict


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which side is weighted."""

    side: Literal["rows", "columns"] = "rows"
    """``rows``: one importance per output, as in the paper; ``columns``: one per input."""

    def __post_init__(self) -> None:
        if self.side not in ("rows", "columns"):
            raise InputError(f"method 'fwsvd': the option side is 'rows' or 'columns'; got {self.side!r}.")


def fits(site: Site) -> str | None:
    """Every map fits."""
    return None


def prepare(weights: Mapping[str, Tensor], moments: SiteMoments | None, options: Options) -> Prepared:
    """The SVD of W (out, in) under ``moments.fisher_rows`` (out,) or ``fisher_columns`` (in,).

    Raises InputError where that moment is missing.
    """
    if options.side == "rows":
        return factorise(weights, gradient=needed(moments, "fisher_rows", "fwsvd"))
    return factorise(weights, second=needed(moments, "fisher_columns", "fwsvd"))


def _run_claim() -> Verdict:
    plain = rises(lambda w, m: svd.prepare(w, m, svd.Options()))
    rows = rises(lambda w, m: prepare(w, m, Options(side="rows")))
    columns = rises(lambda w, m: prepare(w, m, Options(side="columns")))
    better = fmean(columns.values()) < fmean(plain.values())
    return Verdict(
        held=all(rows[keep] < plain[keep] for keep in plain),
        figures=as_figures("svd", plain) | as_figures("rows", rows) | as_figures("columns", columns),
        note=f"the column side, not in the paper, is {'better' if better else 'worse'} than svd on average",
    )


METHOD = CompressMethod(
    name="fwsvd",
    summary="SVD weighted by the Fisher information of rows or columns",
    paper=Paper(
        authors="Y.-C. Hsu, T. Hua, S. Chang, Q. Lou, Y. Shen, H. Jin",
        title="Language model compression with weighted low-rank factorization",
        year=2022,
        link="https://arxiv.org/abs/2207.00112",
    ),
    needs=frozenset({"fisher"}),
    options=Options,
    fits=fits,
    prepare=prepare,
    cut=cut,
    loss_units=False,
    claim=Claim(
        statement="Weighting rows by Fisher information raises the held-out loss less than plain SVD at the "
        "same ranks, at 20, 40 and 60 % removed (mean of 3 calibration samples).",
        source="Hsu et al. 2022, abstract: larger reconstruction error, but task accuracy much closer",
        run=_run_claim,
    ),
)
