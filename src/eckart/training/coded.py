"""What layers with coded weights share, and the report on a model that got them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from eckart.layers.dense_view import dense_view


def bits_of(tensors: Iterable[Tensor]) -> int:
    """Bits that the tensors take as they are stored."""
    return sum(8 * tensor.nbytes for tensor in tensors)


class CodedLayer(nn.Module):
    """A layer whose weight is decoded in every forward pass: small to keep, not faster to run.

    Its tensors are ordinary parameters and buffers, so ``state_dict``, safetensors, ``deepcopy`` and ``.to``
    work; codes are integers, which ``.to(dtype)`` leaves alone. Eckart's checkpoint loader does not know it:
    build the layer with the same sizes and load its state dict.
    """

    shape: tuple[int, ...]
    """Of the weight that it stands for."""
    bias: nn.Parameter | None

    def matrix(self) -> Tensor:
        """The weight as the matrix (out, in), decoded; gradients reach what is trained."""
        raise NotImplementedError

    def levels(self) -> Tensor:
        """The parameter that has the weight's dtype and device."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The decoded weight. Its metadata is free; computing with it decodes."""
        like = self.levels()
        return dense_view(lambda: self.matrix().reshape(self.shape), self.shape, like, like)

    def stored_bits(self) -> int:
        """Bits of all that stands for the weight, in the dtypes held now; the bias left out."""
        return bits_of(tensor for name, tensor in self.state_dict().items() if name != "bias")


@dataclass(frozen=True, kw_only=True)
class CodedSite:
    """What became of one map."""

    name: str
    weights: int
    bits_before: int
    bits_after: int
    """As stored: codes in whole integers, levels in the model's dtype; biases left out of both."""
    error: float
    """tr(ΔW M ΔWᵀ) / tr(W M Wᵀ) with the metric M that the codes were fitted in."""


@dataclass(frozen=True, kw_only=True)
class CodedReport:
    """All of it: sizes over the coded maps only, never mixed with the rest of the model."""

    sites: tuple[CodedSite, ...]
    skipped: tuple[tuple[str, str], ...]
    """(map, reason) of those left dense."""

    @property
    def bits_before(self) -> int:
        return sum(site.bits_before for site in self.sites)

    @property
    def bits_after(self) -> int:
        return sum(site.bits_after for site in self.sites)

    @property
    def bits_per_weight(self) -> float:
        return self.bits_after / sum(site.weights for site in self.sites)
