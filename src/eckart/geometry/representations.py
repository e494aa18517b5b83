"""What the measures of representations accept: real, finite tensors of a stated shape, in float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.errors import InputError
from eckart.linalg.exact import as_float64


def real_tensor(A: Tensor, name: str, shape: str) -> Tensor:
    """``A`` in float64 on the CPU, detached. Integers and half precision are cast, which loses nothing.

    ``shape`` names the axes: ``"samples × features"`` asks for two. A tensor with an axis of length 0 is refused.

    Raises InputError for what is no dense real tensor of as many axes, or empty; NotFiniteError for NaN or Inf.
    """
    axes = shape.count("×") + 1
    if not isinstance(A, Tensor):
        raise InputError(f"{name}: expected a tensor ({shape}); got {type(A).__name__}.")
    if A.is_quantized or A.layout is not torch.strided:
        raise InputError(f"{name}: expected a dense tensor; got {A.dtype}, {A.layout}. Dequantise or densify it first.")
    if A.is_complex() or A.ndim != axes or A.numel() == 0:
        raise InputError(f"{name}: expected a real tensor of {shape}, none of them 0; got {A.dtype}, {tuple(A.shape)}.")
    return as_float64(A, name, (axes,))
