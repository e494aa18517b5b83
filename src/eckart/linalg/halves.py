"""Where products of bfloat16 and float16 are worth it."""

from __future__ import annotations

import functools

import torch


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What matrix products of ``dtype`` are quickest in on ``device``: float32 for halves on a CPU that lacks them.

    There torch falls back to plain loops: 1024 × 4096 numbers times their transpose take 8 to 60 times as long as in
    float32. Anything else is given back as it is.
    """
    if dtype in (torch.bfloat16, torch.float16) and device.type == "cpu" and not _has_products(dtype):
        return torch.float32
    return dtype


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return bool(supported is not None and supported())
