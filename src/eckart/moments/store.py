"""The moments of a model: sums that add up, means on demand, one file."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eckart.errors import FileError, InputError, MismatchError, unknown
from eckart.moments.accumulators import GradientSums, InputSums
from eckart.moments.site import SiteMoments

FORMAT_VERSION = 1
POOLING = 1.0
"""c, in multiples of the in-features: an expert with n tokens keeps n / (n + c · in) of its own moments."""
_KEY = "eckart"
_HALVES = {"A": [0], "B": [1], None: [0, 1]}


class Moments:
    """Input moments by distinct input, gradient moments by site, in two halves of the data."""

    def __init__(
        self,
        fingerprint: str,
        inputs: Mapping[str, InputSums],
        gradients: Mapping[str, GradientSums],
        input_of: Mapping[str, str],
        tokens: int,
        units: float,
        meta: Mapping[str, Any],
    ) -> None:
        self.fingerprint = fingerprint
        """Of the model that they were collected on."""
        self.inputs = dict(inputs)
        self.gradients = dict(gradients)
        self.input_of = dict(input_of)
        """For each site the key of its input: sites that read one tensor share its moments."""
        self.tokens = tokens
        self.units = units
        self.meta = dict(meta)
        """What they were collected on; JSON values."""

    def names(self) -> list[str]:
        """The sites that the data reached."""
        return list(self.input_of)

    def check(self, model_fingerprint: str) -> None:
        """Raise MismatchError where these are moments of another model."""
        if self.fingerprint != model_fingerprint:
            raise MismatchError(
                f"these moments were collected on {self.meta.get('model', 'another model')} (fingerprint "
                f"{self.fingerprint[:12]}…), but this model has {model_fingerprint[:12]}…. Calibrate again."
            )

    def site(self, name: str, slice: int = 0, half: Literal["A", "B"] | None = None) -> SiteMoments:
        """The means of one matrix of a site, over half A, half B or all of the data.

        Slices of a mixture of experts are drawn to the mean of all experts where they saw few tokens: with n
        tokens and c = ``POOLING`` · in-features an expert's moments keep the weight n / (n + c).
        Raises InputError for an unknown site or slice, and for a half without tokens.
        """
        if name not in self.input_of:
            lost = self.meta.get("unreached", [])
            if name in lost:
                raise InputError(f"{name}: no calibration token reached this site. Exclude it, or use other data.")
            raise InputError(unknown("site", name, self.names()))
        inputs = self.inputs[self.input_of[name]]
        gradients = self.gradients.get(name)
        slices = inputs.count.shape[1]
        if not 0 <= slice < slices:
            raise InputError(f"{name} has slices 0 … {slices - 1}; got {slice}.")
        picked = _HALVES[half]
        if not int(inputs.count[picked].sum()):
            raise InputError(f"{name}: half {half or 'A + B'} of the calibration holds no token; use more data.")
        own = self._mean(name, picked, [slice], inputs, gradients)
        if slices == 1 or self.meta.get("pooled", {}).get(name) is None:
            return own
        pooled = self._mean(name, picked, list(range(slices)), inputs, gradients)
        return _mix(own, pooled, own.count / (own.count + POOLING * inputs.total.shape[-1]))

    def _mean(
        self, name: str, halves: list[int], slices: list[int], inputs: InputSums, gradients: GradientSums | None
    ) -> SiteMoments:
        def total(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[halves][:, slices].sum((0, 1))

        count = int(inputs.count[halves][:, slices].sum())
        n = max(count, 1)
        mean = inputs.total[halves][:, slices].sum((0, 1)) / n
        second = total(inputs.second)
        found = {
            "gradient": total(gradients.second) if gradients else None,
            "fisher_rows": total(gradients.rows) if gradients else None,
            "fisher_columns": total(gradients.columns) if gradients else None,
        }
        return SiteMoments(
            count=count,
            mean=mean,
            second=mean if second is None else second / n,
            gradient_scale=None if gradients is None else float(gradients.scale[halves][:, slices].sum()) / n,
            tokens_per_unit=self._total_count(name) / self.units if self.units else 1.0,
            **{key: None if value is None else value / n for key, value in found.items()},
        )

    def _total_count(self, name: str) -> float:
        """Tokens of a site over both halves; per slice where the slices share them (grouped convolutions)."""
        counts = self.inputs[self.input_of[name]].count.sum(0)
        return float(counts.sum()) if self.meta.get("pooled", {}).get(name) else float(counts.max())

    # Sums -------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, sums in self.inputs.items():
            found |= {f"input/{key}/count": sums.count, f"input/{key}/total": sums.total}
            if sums.second is not None:
                found[f"input/{key}/second"] = sums.second
        for key, gradient in self.gradients.items():
            found[f"gradient/{key}/scale"] = gradient.scale
            for part in ("second", "rows", "columns"):
                if (value := getattr(gradient, part)) is not None:
                    found[f"gradient/{key}/{part}"] = value
        return found

    def merge(self, other: Moments) -> Moments:
        """The moments of both data sets together. Raises MismatchError where model, sites or modes differ."""
        mine, theirs = self._tensors(), other._tensors()
        if self.fingerprint != other.fingerprint or self.input_of != other.input_of or mine.keys() != theirs.keys():
            raise MismatchError("moments can be merged where model, sites and kinds of gradients are the same.")
        merged = Moments.load_from(
            {key: value + theirs[key] for key, value in mine.items()},
            self.fingerprint,
            self.input_of,
            self.tokens + other.tokens,
            self.units + other.units,
            {**self.meta, "data": f"{self.meta.get('data', '?')} + {other.meta.get('data', '?')}"},
        )
        merged.meta["batches"] = int(self.meta.get("batches", 0)) + int(other.meta.get("batches", 0))
        return merged

    def all_reduce(self) -> None:
        """Add up, in place, the moments of all processes of the default ``torch.distributed`` group."""
        for value in self._tensors().values():
            torch.distributed.all_reduce(value)
        counts = torch.tensor(
            [float(self.tokens), self.units, float(self.meta.get("batches", 0))], dtype=torch.float64
        )
        torch.distributed.all_reduce(counts)
        self.tokens, self.units = int(counts[0]), float(counts[1])
        self.meta |= {"batches": int(counts[2]), "tokens": self.tokens, "units": self.units}

    # Files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; symmetric matrices are packed. Raises FileError."""
        target = Path(path)
        tensors = {
            key: _packed(value) if key.endswith("/second") else value.clone()
            for key, value in self._tensors().items()
        }
        header = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "input_of": self.input_of,
            "tokens": self.tokens,
            "units": self.units,
            "meta": self.meta,
        }
        beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            save_file(tensors, beside, metadata={_KEY: json.dumps(header)})
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(target)
        except (OSError, SafetensorError) as error:
            raise FileError(f"the moments could not be written to {target}: {error}.") from error
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read a file that :meth:`save` wrote. Raises FileError for anything else, cut short or damaged."""
        source = Path(path)
        if not source.is_file():
            raise FileError(f"there is no moments file {source}. Make one with: eckart calibrate MODEL --data … -o FILE")
        try:
            with safe_open(source, framework="pt") as file:
                metadata = file.metadata() or {}
                if _KEY not in metadata:
                    raise FileError(f"{source} is a safetensors file, but holds no moments of Eckart.")
                header = json.loads(metadata[_KEY])
                if header.get("format_version") != FORMAT_VERSION:
                    raise FileError(
                        f"{source} has format version {header.get('format_version')!r}; "
                        f"this Eckart reads {FORMAT_VERSION}."
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for key in list(tensors):
                if key.endswith("/second"):
                    tensors[key] = _unpacked(tensors[key], key)
            return cls.load_from(
                tensors,
                header["fingerprint"],
                header["input_of"],
                header["tokens"],
                header["units"],
                header["meta"],
            )
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(
                f"{source} is no moments file, or is cut short or damaged ({type(error).__name__}: {error}). Calibrate again."
            ) from error

    @classmethod
    def load_from(
        cls,
        tensors: Mapping[str, Tensor],
        fingerprint: str,
        input_of: Mapping[str, str],
        tokens: int,
        units: float,
        meta: Mapping[str, Any],
    ) -> Moments:
        """From named sums; raises KeyError or ValueError where one is missing or has another shape."""
        inputs, gradients = {}, {}
        for key in dict.fromkeys(input_of.values()):
            count, total = tensors[f"input/{key}/count"], tensors[f"input/{key}/total"]
            second = tensors.get(f"input/{key}/second")
            if total.shape[:2] != count.shape or (second is not None and second.shape[:-1] != total.shape):
                raise ValueError(f"the sums of {key} do not fit each other")
            sums = InputSums(count.shape[1], 0, matrix=False)
            sums.count, sums.total, sums.second = count, total, second
            inputs[key] = sums
        for key in input_of:
            if (scale := tensors.get(f"gradient/{key}/scale")) is None:
                continue
            gradient = GradientSums(scale.shape[1], 0, 0, full=False, fisher=False)
            gradient.scale = scale
            gradient.second = tensors.get(f"gradient/{key}/second")
            gradient.rows = tensors.get(f"gradient/{key}/rows")
            gradient.columns = tensors.get(f"gradient/{key}/columns")
            gradients[key] = gradient
        return cls(fingerprint, inputs, gradients, input_of, tokens, units, meta)


def _packed(stack: Tensor) -> Tensor:
    """(…, d, d) → (…, d (d + 1) / 2), the lower triangles row by row."""
    d = stack.shape[-1]
    rows, columns = torch.tril_indices(d, d)
    return stack[..., rows, columns].contiguous()


def _unpacked(packed: Tensor, key: str) -> Tensor:
    length = packed.shape[-1]
    d = int((2 * length + 0.25) ** 0.5)
    if d * (d + 1) // 2 != length:
        raise ValueError(f"{key} is no packed triangle")
    stack = packed.new_zeros(*packed.shape[:-1], d, d)
    rows, columns = torch.tril_indices(d, d)
    stack[..., rows, columns] = packed
    stack[..., columns, rows] = packed
    return stack


def _mix(own: SiteMoments, pooled: SiteMoments, share: float) -> SiteMoments:
    def mixed(name: str) -> Any:
        a, b = getattr(own, name), getattr(pooled, name)
        return None if a is None or b is None else share * a + (1 - share) * b

    names = ("mean", "second", "gradient", "gradient_scale", "fisher_rows", "fisher_columns")
    return SiteMoments(
        count=own.count, tokens_per_unit=own.tokens_per_unit, **{name: mixed(name) for name in names}
    )
