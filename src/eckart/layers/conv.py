"""Drop-in layers for nn.Conv1d, Conv2d, Conv3d: a convolution to few channels, then a 1 × 1 convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eckart.layers.dense_view import dense_view
from eckart.layers.linear import INDEX_DTYPE
from eckart.records import FormKind

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class StructuredConv(nn.Module):
    """What both layers share: the geometry (stride, padding, dilation, padding mode) sits in ``a``."""

    a: Conv
    b: Conv
    form: FormKind

    def __init__(self, original: Conv, rank: int, a_bias: bool, b_bias: bool, b_out: int) -> None:
        super().__init__()
        kind = type(original)
        where: dict[str, Any] = {"device": original.weight.device, "dtype": original.weight.dtype}
        groups = original.groups
        self.in_channels = original.in_channels
        self.out_channels = original.out_channels
        self.kernel_size = original.kernel_size
        self.stride = original.stride
        self.padding = original.padding
        self.dilation = original.dilation
        self.groups = groups
        self.padding_mode = original.padding_mode
        self.rank = rank
        """Channels kept per group."""
        self.a = kind(
            original.in_channels,
            groups * rank,
            original.kernel_size,  # type: ignore[arg-type]
            stride=original.stride,  # type: ignore[arg-type]
            padding=original.padding,  # type: ignore[arg-type]
            dilation=original.dilation,  # type: ignore[arg-type]
            groups=groups,
            bias=a_bias,
            padding_mode=original.padding_mode,
            **where,
        )
        self.b = kind(groups * rank, b_out, 1, groups=groups, bias=b_bias, **where)

    @property
    def spatial(self) -> int:
        """1, 2 or 3: how many dimensions the convolution slides over."""
        return self.a.weight.ndim - 2

    def matrices(self) -> Tensor:
        """(groups, out/groups, in/groups · kernel), computed."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The kernel (out, in/groups, *kernel_size), computed."""
        return self.matrices().reshape(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def bias(self) -> Tensor | None:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense kernel. Metadata is free; computing with it multiplies the factors."""
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return dense_view(self.dense, shape, self.a.weight, self.b.weight)

    def to_dense(self) -> nn.Module:
        """The convolution with the same outputs (to rounding) in the class that it replaced."""
        weight, bias = self.dense().detach(), self.bias
        layer = type(self.a)(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
            bias=bias is not None,
            padding_mode=self.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        layer.weight = nn.Parameter(weight, requires_grad=self.b.weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=self.b.weight.requires_grad)
        return layer.train(self.training)

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        return {"kind": "conv", "form": self.form, "rank": self.rank, "bias": self.b.bias is not None}

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, rank={self.rank}, bias={self.b.bias is not None}"
        )


class FactoredConv(StructuredConv):
    """``a``: the original's geometry, in → groups · rank channels; ``b``: 1 × 1, groups · rank → out."""

    form = "lowrank"

    def __init__(self, original: Conv, rank: int, *, bias: bool) -> None:
        super().__init__(original, rank, a_bias=False, b_bias=bias, b_out=original.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out

    def matrices(self) -> Tensor:
        a = self.a.weight.reshape(self.groups, self.rank, -1)
        b = self.b.weight.reshape(self.groups, self.out_channels // self.groups, self.rank)
        return b @ a

    @property
    def bias(self) -> Tensor | None:
        return self.b.bias


class PivotedConv(StructuredConv):
    """``a`` computes ``rank`` of the output channels as they are, ``b`` (1 × 1) the others. One group."""

    form = "pivoted"
    index: Tensor

    def __init__(self, original: Conv, rank: int, *, bias: bool) -> None:
        super().__init__(original, rank, a_bias=bias, b_bias=bias, b_out=original.out_channels - rank)
        index = torch.arange(original.out_channels, dtype=INDEX_DTYPE, device=original.weight.device)
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.a(x)
        channels = -1 - self.spatial
        return torch.cat([kept, self.b(kept)], dim=channels).index_select(channels, self.index)

    def matrices(self) -> Tensor:
        a = self.a.weight.flatten(1)
        return torch.cat([a, self.b.weight.flatten(1) @ a]).index_select(0, self.index).unsqueeze(0)

    @property
    def bias(self) -> Tensor | None:
        """(out,), computed: it lies in two parts."""
        if self.a.bias is None or self.b.bias is None:
            return None
        rest = self.b.weight.flatten(1) @ self.a.bias + self.b.bias
        return torch.cat([self.a.bias, rest]).index_select(0, self.index)
