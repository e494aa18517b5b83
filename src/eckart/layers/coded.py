"""What layers share whose weight is decoded out of integers and a few trained numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from eckart.layers.dense_view import dense_view


def bits_of(tensors: Iterable[Tensor]) -> int:
    """Bits that the tensors take as they are stored."""
    return sum(8 * tensor.nbytes for tensor in tensors)


def code_dtype(values: int) -> torch.dtype:
    """The smallest integer type for 0 … ``values`` − 1."""
    return torch.uint8 if values <= 2**8 else torch.int16 if values <= 2**15 else torch.int32


class CodedLayer(nn.Module):
    """A layer whose weight is decoded in every forward pass: small to keep, not faster to run.

    Its tensors are ordinary parameters and buffers, so ``state_dict``, safetensors, ``deepcopy`` and ``.to``
    work; codes are integers, which ``.to(dtype)`` leaves alone.
    """

    bias: nn.Parameter | None

    def matrix(self) -> Tensor:
        """The weight as the matrix (out, in), decoded; gradients reach what is trained."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """W (out, in), or (out, in · height · width), decoded."""
        return self.matrix().detach()

    def levels(self) -> Tensor:
        """The parameter that has the weight's dtype and device."""
        raise NotImplementedError

    def stored(self) -> Tensor:
        """The decoded weight in the layout of the layer that was replaced."""
        raise NotImplementedError

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of :meth:`stored`."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The decoded weight. Its metadata is free; computing with it decodes."""
        like = self.levels()
        return dense_view(self.stored, self.stored_shape, like, like)

    @property
    def own_macs(self) -> int:
        """Multiply-adds with the decoded weight, per token or output position; decoding is not counted."""
        return math.prod(self.stored_shape)

    def stored_bits(self) -> int:
        """Bits of all that stands for the weight, in the dtypes held now; the bias left out."""
        return bits_of(tensor for name, tensor in self.state_dict().items() if name != "bias")
