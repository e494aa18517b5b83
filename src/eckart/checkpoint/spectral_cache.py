"""Decompositions kept on disk: one safetensors file per weight, found again by the weight itself.

A file is written whole or not at all, and names the weight (a sha256 of its numbers), the seed and the algorithm, so
that a run that was interrupted goes on where it stopped, two models that share a weight share its file, and a changed
weight is a new one. Nothing in a file is trusted beyond that: shapes and numbers are checked when it is read.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eckart.errors import FileError, InputError
from eckart.linalg import SVD, leading_svd
from eckart.records import Progress, silent

ALGORITHM = "krylov-2"
"""Names what :func:`eckart.linalg.leading_svd` does; a change of its results changes this name."""
_KEY = "eckart"


class SpectralCache:
    """The leading singular triplets of weights, in a folder.

    ``cache(W, rank)`` gives the triplets from the folder where it holds at least as many, and otherwise computes and
    keeps them. Stored in float32, in which they are returned too (as float64), so that a run with a cold cache and one
    with a warm cache get the same numbers. A file of rank r takes 4 r (m + n + 1) bytes.
    """

    def __init__(self, folder: str | os.PathLike[str], *, seed: int = 0) -> None:
        self.folder = Path(folder)
        self.seed = seed
        if self.folder.exists() and not self.folder.is_dir():
            raise FileError(f"a spectral cache is a folder; {self.folder} is a file.")

    def __call__(self, W: Tensor, rank: int) -> SVD:
        """The leading ``rank`` triplets of W (m, n). Raises as ``leading_svd`` does, FileError for a full disk."""
        if W.ndim != 2 or not 1 <= rank <= min(W.shape):
            raise InputError(f"SpectralCache: expected a matrix and a rank up to its smaller side; got {rank}.")
        path = self.path(W)
        found = self._read(path, W, rank)
        if found is None:
            found = leading_svd(W, rank, seed=self.seed)
            found = SVD(found.U.float(), found.S.float(), found.Vh.float(), found.method, found.error_bound)
            self._write(path, found, W)
        return SVD(
            found.U[:, :rank].double(),
            found.S[:rank].double(),
            found.Vh[:rank].double(),
            found.method,
            found.error_bound,
        )

    def fill(self, weights: Mapping[str, Tensor], rank: int, *, progress: Progress = silent) -> None:
        """Decompose all of them (m, n) now, up to ``rank``; those that are there cost a read of their header."""
        for done, (name, W) in enumerate(weights.items()):
            progress("decompose", done, len(weights))
            try:
                self(W, min(rank, *W.shape))
            except InputError as error:
                raise InputError(f"{name}: {error}") from error
        progress("decompose", len(weights), len(weights))

    def path(self, W: Tensor) -> Path:
        """The file of this weight. Cost: one hash over its bytes, about 1 s per GB."""
        plain = W.detach().cpu().contiguous()
        digest = sha256(f"{tuple(plain.shape)} {plain.dtype} {self.seed} {ALGORITHM} ".encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:40]}.safetensors"

    def _read(self, path: Path, W: Tensor, rank: int) -> SVD | None:
        """None where there is none, or one of fewer triplets, or a damaged one: all are made anew."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get(_KEY, "null"))
                U, S, Vh = (file.get_tensor(name) for name in ("U", "S", "Vh"))
        except (SafetensorError, OSError, json.JSONDecodeError):
            return None
        k = S.shape[0] if S.ndim == 1 else 0
        fits = U.shape == (W.shape[0], k) and Vh.shape == (k, W.shape[1]) and k >= rank
        if not fits or not isinstance(facts, dict) or not all(bool(t.isfinite().all()) for t in (U, S, Vh)):
            return None
        return SVD(U, S, Vh, facts.get("method", "krylov"), float(facts.get("error_bound", 0.0)))

    def _write(self, path: Path, found: SVD, W: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        facts = {
            "method": found.method,
            "error_bound": found.error_bound,
            "energy": float(W.double().square().sum()),
            "shape": list(W.shape),
        }
        tensors = {"U": found.U.contiguous(), "S": found.S.contiguous(), "Vh": found.Vh.contiguous()}
        try:
            save_file(tensors, beside, metadata={_KEY: json.dumps(facts)})
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            raise FileError(f"the decomposition could not be kept in {self.folder}: {error}.") from error
        finally:
            beside.unlink(missing_ok=True)
