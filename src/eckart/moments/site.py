"""What calibration knows about one matrix of a site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SiteMoments:
    """Means over calibration tokens, float64 on the CPU, for one matrix W (out × in): y = W x, g = ∂loss/∂y.

    ``loss`` is the loss summed over the units of a batch (a token for language models, a sentence for
    embedding models), so that ½ · tokens_per_unit · tr(G ΔW Σ ΔWᵀ) estimates the rise of the loss per unit.
    """

    count: int
    """Tokens behind ``mean`` and ``second``, padding left out."""
    mean: Tensor | None = None
    """(in,): E[x]."""
    second: Tensor | None = None
    """(in × in): E[x xᵀ], not centred; (in,) where only the diagonal exists (embeddings: frequencies)."""
    gradient: Tensor | None = None
    """(out × out): E[g gᵀ]."""
    gradient_scale: float | None = None
    """E‖g‖², the trace of ``gradient``; exists in the cheap mode too."""
    fisher_rows: Tensor | None = None
    """(out,): E[g_i² ‖x‖²], the row sums of the Fisher information of W."""
    fisher_columns: Tensor | None = None
    """(in,): E[‖g‖² x_j²], its column sums."""
    tokens_per_unit: float = 1.0

    @property
    def loss_scale(self) -> float:
        """½ · tokens_per_unit: what turns tr(G ΔW Σ ΔWᵀ) into a predicted rise of the loss."""
        return 0.5 * self.tokens_per_unit

    @property
    def diagonal(self) -> Tensor | None:
        """(in,): E[x_j²]."""
        if self.second is None:
            return None
        return self.second if self.second.ndim == 1 else self.second.diagonal()

    @property
    def covariance(self) -> Tensor | None:
        """(in × in): E[x xᵀ] − E[x] E[x]ᵀ."""
        if self.second is None or self.mean is None or self.second.ndim == 1:
            return None
        return self.second - self.mean.outer(self.mean)
