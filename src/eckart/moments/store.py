"""The moments of a model: sums that add up, and means on demand."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor

from eckart.errors import EckartWarning, InputError, MismatchError, unknown
from eckart.moments.accumulators import GradientSums, InputSums
from eckart.moments.distributed import add_up, add_up_symmetric, answers, cpu_group, gather, processes
from eckart.moments.files import read_file, write_file
from eckart.moments.site import SiteMoments

POOLING = 1.0
"""c, in multiples of the in-features: an expert with n tokens keeps n / (n + c · in) of its own moments. The error of
a second moment from n tokens falls as in/n, so that the two weigh the same where the estimate is as wrong as large."""
_HALVES: dict[str | None, list[int]] = {"A": [0], "B": [1], None: [0, 1]}
_COUNTS = ("tokens", "units", "batches")


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
        """What the loss was summed over: tokens, sentences or rows."""
        self.meta: dict[str, Any] = {**meta, "tokens": tokens, "units": units}
        """What they were collected on; JSON values."""
        self._pooled: tuple[tuple[str, str | None], SiteMoments] | None = None

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
        tokens and c = ``POOLING`` · in-features an expert's moments keep the weight n / (n + c). Their ``count``
        and ``tokens_per_unit`` stay their own, 0 where no token came.
        Raises InputError for an unknown site or slice, and for a half without tokens.
        """
        if name not in self.input_of:
            if name in self.meta.get("unreached", []):
                raise InputError(f"{name}: no calibration token reached this site. Exclude it, or use other data.")
            raise InputError(unknown("site", name, self.names()))
        if half not in _HALVES:
            raise InputError(f"half is 'A', 'B' or None; got {half!r}.")
        inputs = self.inputs[self.input_of[name]]
        slices = inputs.count.shape[1]
        if not 0 <= slice < slices:
            raise InputError(f"{name} has slices 0 … {slices - 1}; got {slice}.")
        if not int(inputs.count[_HALVES[half]].sum()):
            raise InputError(f"{name}: half {half or 'A + B'} of the calibration holds no token; use more data.")
        own = self._mean(name, _HALVES[half], [slice])
        if slices == 1 or not self.meta.get("pooled", {}).get(name):
            return own
        if self._pooled is None or self._pooled[0] != (name, half):
            self._pooled = ((name, half), self._mean(name, _HALVES[half], list(range(slices))))
        return _mix(own, self._pooled[1], own.count / (own.count + POOLING * inputs.total.shape[-1]))

    def _mean(self, name: str, halves: Sequence[int], slices: Sequence[int]) -> SiteMoments:
        """The means over ``slices``. ``tokens_per_unit`` counts both halves, as the units do."""
        inputs, gradients = self.inputs[self.input_of[name]], self.gradients.get(name)
        count = sum(int(inputs.count[half, slice_]) for half in halves for slice_ in slices)
        everything = sum(int(inputs.count[half, slice_]) for half in (0, 1) for slice_ in slices)

        def mean(sums: Tensor | None) -> Tensor | None:
            if sums is None:
                return None
            total = torch.zeros_like(sums[0, 0])
            for half in halves:
                for slice_ in slices:
                    total += sums[half, slice_]
            return total.div_(max(count, 1))

        scale = None if gradients is None else mean(gradients.scale)
        first = mean(inputs.total)
        return SiteMoments(
            count=count,
            mean=first,
            second=first if inputs.second is None else mean(inputs.second),
            gradient=None if gradients is None else mean(gradients.second),
            gradient_scale=None if scale is None else float(scale),
            fisher_rows=None if gradients is None else mean(gradients.rows),
            fisher_columns=None if gradients is None else mean(gradients.columns),
            tokens_per_unit=everything / self.units if self.units else 1.0,
        )

    def merge(self, other: Moments) -> Moments:
        """The moments of both data sets together.

        Sites that one of them did not reach are taken from the other. ``meta`` adds up what counts and keeps the rest
        of ``self``, with the names of both data. Raises MismatchError where model, sites or kinds of gradients differ.
        """
        parts = [self._structure(), other._structure()]
        input_of, shapes = _union(parts)
        mine, theirs = self._sums(), other._sums()
        merged = {name: torch.zeros(shape, dtype=_dtype(name)) for name, shape in shapes.items()}
        for sums in (mine, theirs):
            for name, value in sums.items():
                merged[name] += value
        meta = _merged_meta([part["meta"] for part in parts], input_of)
        data = list(dict.fromkeys(str(moments.meta.get("data", "?")) for moments in (self, other)))
        return _from_sums(merged, self.fingerprint, input_of, {**meta, "data": " + ".join(data)})

    def all_reduce(self) -> None:
        """Add up, in place, the moments of all processes of the default ``torch.distributed`` group.

        Alone, nothing happens. Raises MismatchError, in every process, where model, sites or kinds of gradients
        differ, and EckartError where another process ended.
        """
        if processes() == 1:
            return
        with answers("add up the moments"):
            group = cpu_group()
            parts = gather(self._structure(), group)
            input_of, shapes = _union(parts)
            sums = self._sums()
            for name in sorted(shapes):
                value = sums.setdefault(name, torch.zeros(shapes[name], dtype=_dtype(name)))
                if name.endswith("/second"):
                    add_up_symmetric(value, group)
                else:
                    add_up([value], group)
        meta = _merged_meta([part["meta"] for part in parts], input_of)
        whole = _from_sums(sums, self.fingerprint, input_of, meta)
        self.inputs, self.gradients, self.input_of = whole.inputs, whole.gradients, whole.input_of
        self.tokens, self.units, self.meta, self._pooled = whole.tokens, whole.units, whole.meta, None
        warn_about(self)

    def digest(self) -> str:
        """A sha256 over all sums and what they belong to, in hex: equal moments have equal digests."""
        structure = self._structure()
        text = json.dumps({name: structure[name] for name in ("fingerprint", "input_of", "shapes")}, sort_keys=True)
        found = sha256(f"{text} {self.tokens} {self.units}".encode())
        for _, value in sorted(self._sums().items()):
            found.update(value.contiguous().numpy().tobytes())
        return found.hexdigest()

    def _sums(self) -> dict[str, Tensor]:
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

    def _structure(self) -> dict[str, Any]:
        """Everything but the sums, as JSON."""
        return {
            "fingerprint": self.fingerprint,
            "input_of": self.input_of,
            "shapes": {name: list(value.shape) for name, value in self._sums().items()},
            "meta": self.meta,
        }

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float64) -> None:
        """Write a safetensors file, whole or not at all; symmetric matrices are packed.

        ``dtype`` float32 halves the file and rounds the sums. Raises FileError where it cannot be written.
        """
        if dtype not in (torch.float64, torch.float32):
            raise InputError(f"moments are saved as float64 or float32; got {dtype}.")
        write_file(path, self._sums(), self._structure(), dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read a file that :meth:`save` wrote. Raises FileError for anything else, cut short or damaged."""
        sums, structure = read_file(path)
        return _from_sums(sums, structure["fingerprint"], structure["input_of"], structure["meta"])


def warn_about(moments: Moments) -> None:
    """EckartWarnings for inputs with fewer tokens than features, experts or sites with none, masks that do not fit."""
    counts = {key: sums.count.sum(0) for key, sums in moments.inputs.items() if sums.second is not None}
    unseen = {key: (count == 0).nonzero().flatten().tolist() for key, count in counts.items() if len(count) > 1}
    few = [
        (key, int(count[count > 0].min()), moments.inputs[key].total.shape[-1])
        for key, count in counts.items()
        if bool((count > 0).any()) and int(count[count > 0].min()) < moments.inputs[key].total.shape[-1]
    ]
    if few:
        key, count, width = min(few, key=lambda found: found[1] / found[2])
        _warn(
            f"{len(few)} inputs were seen on fewer tokens than they have features (as {key}: {count} of {width}). "
            "Their moments are singular and fit this data too well; calibrate on more."
        )
    if lost := {key: experts for key, experts in unseen.items() if experts}:
        key = max(lost, key=lambda name: len(lost[name]))
        shown = ", ".join(map(str, lost[key][:8])) + (", …" if len(lost[key]) > 8 else "")
        _warn(
            f"no token reached {sum(map(len, lost.values()))} of the experts' matrices (as {key}: {shown}). They have "
            "the mean moments of the others; calibrate on more, or more varied, text."
        )
    if unreached := moments.meta.get("unreached"):
        _warn(f"no token reached {len(unreached)} sites, as {unreached[0]}; they have no moments.")
    if unmasked := moments.meta.get("unmasked"):
        _warn(
            f"the padding mask does not fit the input of {len(unmasked)} sites, as {unmasked[0]}; "
            "their moments count every row."
        )


def _warn(text: str) -> None:
    warnings.warn(text, EckartWarning, stacklevel=4)


def _from_sums(
    sums: Mapping[str, Tensor], fingerprint: str, input_of: Mapping[str, str], meta: Mapping[str, Any]
) -> Moments:
    inputs, gradients = {}, {}
    for key in dict.fromkeys(input_of.values()):
        found = InputSums(1, 0, matrix=False)
        found.count, found.total = sums[f"input/{key}/count"], sums[f"input/{key}/total"]
        found.second = sums.get(f"input/{key}/second")
        inputs[key] = found
    for key in input_of:
        if (scale := sums.get(f"gradient/{key}/scale")) is not None:
            gradient = GradientSums(1, 0, 0, full=False, fisher=False)
            gradient.scale, gradient.second = scale, sums.get(f"gradient/{key}/second")
            gradient.rows = sums.get(f"gradient/{key}/rows")
            gradient.columns = sums.get(f"gradient/{key}/columns")
            gradients[key] = gradient
    return Moments(fingerprint, inputs, gradients, input_of, int(meta["tokens"]), float(meta["units"]), meta)


def _dtype(name: str) -> torch.dtype:
    return torch.int64 if name.endswith("/count") else torch.float64


def _union(parts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Sites and shapes of all parts together. Raises MismatchError where they do not add up."""
    first = parts[0]
    input_of: dict[str, str] = {}
    shapes: dict[str, list[int]] = {}
    for part in parts:
        if part["fingerprint"] != first["fingerprint"]:
            raise MismatchError("moments of two different models cannot be added up.")
        for what in ("gradients", "loss", "fisher"):
            if part["meta"].get(what) != first["meta"].get(what):
                raise MismatchError(
                    f"moments with {what} {first['meta'].get(what)!r} and {part['meta'].get(what)!r} cannot be "
                    "added up."
                )
        known = set(part["input_of"]) | set(part["meta"].get("unreached", []))
        if known != set(first["input_of"]) | set(first["meta"].get("unreached", [])):
            raise MismatchError("moments of two different selections of sites cannot be added up.")
        for site, key in part["input_of"].items():
            if input_of.setdefault(site, key) != key:
                raise MismatchError(f"{site} read the input {input_of[site]} in one part and {key} in another.")
        for name, shape in part["shapes"].items():
            if shapes.setdefault(name, shape) != shape:
                raise MismatchError(f"{name} has shape {shapes[name]} in one part and {shape} in another.")
    return input_of, shapes


def _merged_meta(metas: Sequence[Mapping[str, Any]], reached: Mapping[str, str]) -> dict[str, Any]:
    return {
        **metas[0],
        **{name: sum(meta.get(name, 0) for meta in metas) for name in _COUNTS},
        "unreached": [name for name in metas[0].get("unreached", []) if name not in reached],
        "unmasked": sorted({name for meta in metas for name in meta.get("unmasked", [])}),
    }


def _mix(own: SiteMoments, pooled: SiteMoments, share: float) -> SiteMoments:
    def mixed(name: str) -> Any:
        a, b = getattr(own, name), getattr(pooled, name)
        return None if a is None or b is None else share * a + (1 - share) * b

    names = ("mean", "second", "gradient", "gradient_scale", "fisher_rows", "fisher_columns")
    return SiteMoments(count=own.count, tokens_per_unit=own.tokens_per_unit, **{name: mixed(name) for name in names})
