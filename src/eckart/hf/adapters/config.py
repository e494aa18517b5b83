"""The config that PEFT stores with an adapter, and what a user chooses."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import InitVar, asdict, dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType
from torch import nn

from eckart.adaptation import ADAPTATIONS, SPREADS, Spread, adapt_options, get_adaptation
from eckart.checkpoint.spectral_cache import SpectralCache
from eckart.errors import InputError, problems, unknown
from eckart.moments import Moments
from eckart.records import Budget, Progress, silent

PEFT_TYPE = "ECKART"
WRITTEN_TYPE = "ECKART (pip install eckart, and import it before loading; the folder lora/ loads without it)"
"""What stands for the type in a saved config. PEFT looks it up in a table, so that in a process without Eckart the
KeyError says what to do; with Eckart it is another name of the same config."""

AfterSaving = Callable[["AdapterConfig", nn.Module, str], None]


@dataclass
class AdapterConfig(PeftConfig):  # type: ignore[misc]
    """Which adapter, on which layers, at which rank. Give it to ``peft.get_peft_model``.

    >>> AdapterConfig(method="pissa", r=16, target_modules="all-linear").method
    'pissa'

    Raises InputError, with everything that is wrong, when it is made. Everything but ``moments``, ``cache`` and
    ``progress`` is stored with the adapter.
    """

    method: str = "lora"
    """A name of :data:`eckart.adaptation.ADAPTATIONS`."""
    r: int | None = None
    """Rank of every layer; with a ``budget`` the most that one may get (default 64); None lets the method choose."""
    target_modules: str | list[str] | None = "all-linear"
    """Names, ends of names, a regular expression, or ``all-linear`` (all but the output head), as in all of PEFT. The
    fused experts of a mixture are named as their module (``experts``): not among ``all-linear``, each expert has the
    rank for itself."""
    exclude_modules: str | list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the method, by name or as its ``Options``."""
    budget: dict[str, Any] | None = None
    """Numbers to train, in place of ``r``: ``Budget(parameters=…)``, ``Budget(model_keep=0.005)`` as a share of the
    model, or ``Budget(keep=…)`` as a share of the adapted maps."""
    spread: Spread | None = None
    """What a budget follows: ``weight``, ``activation`` or ``gradient`` (the last two need moments). None: activation
    for methods that need the moments of inputs, else weight."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single layers by pattern, instead of ``r``."""
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    """Modules that are trained and saved whole, such as a new head."""
    dropout: float = 0.0
    """On the input of the adapter, not for embeddings, in [0, 1)."""
    seed: int = 0
    """Of the random starts; layers draw by their own names."""
    ranks: dict[str, int] = field(default_factory=dict)
    """What each layer got; filled in when the adapter is made. 0: the layer was left out."""
    saved: bool = False
    """The numbers come from a file. Set False to start afresh from the settings of a saved adapter."""
    moments: InitVar[Moments | str | os.PathLike[str] | None] = None
    """From ``eckart.calibrate`` of the same model, or their file."""
    cache: InitVar[SpectralCache | str | os.PathLike[str] | None] = None
    """Where decompositions are kept: a :class:`eckart.checkpoint.SpectralCache` or its folder."""
    progress: InitVar[Progress] = silent

    def __post_init__(self, moments: Any, cache: Any, progress: Progress) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        if isinstance(self.budget, Budget):
            self.budget = {k: v for k, v in asdict(self.budget).items() if v is not None}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        if found := self._faults():
            raise InputError(problems("AdapterConfig", found))
        self.options = asdict(adapt_options(get_adaptation(self.method), self.options))
        self._moments = Moments.load(moments) if isinstance(moments, (str, os.PathLike)) else moments
        self._cache = SpectralCache(cache) if isinstance(cache, (str, os.PathLike)) else cache
        self._progress = progress
        self._model: Callable[[], nn.Module | None] = _nobody
        self._after_saving: AfterSaving | None = None

    def _faults(self) -> list[str]:
        found = []
        if self.method not in ADAPTATIONS:
            found.append(unknown("adaptation method", str(self.method), ADAPTATIONS))
        else:
            try:
                adapt_options(get_adaptation(self.method), self.options)
            except InputError as error:
                found.append(str(error))
        ranks = {f"rank_pattern[{pattern!r}]": rank for pattern, rank in self.rank_pattern.items()}
        for name, rank in (ranks if self.r is None else {"r": self.r, **ranks}).items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                found.append(f"{name} counts directions, an int of at least 1; got {rank!r}")
        if self.budget is not None:
            try:
                Budget(**self.budget)
            except (InputError, TypeError) as error:
                found.append(f"budget is a Budget; {error}")
            if self.method in ADAPTATIONS and not get_adaptation(self.method).budgeted:
                found.append(f"the layers of method {self.method!r} share their numbers, so there is no budget; give r")
        if self.spread is not None and self.spread not in SPREADS:
            found.append(unknown("spread", str(self.spread), SPREADS))
        if self.budget is None and self.spread is not None:
            found.append("spread says how a budget is spread; there is no budget")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            found.append(f"dropout is a number in [0, 1); got {self.dropout!r}")
        if self.target_modules is None:
            found.append("target_modules names the layers; got None. Take 'all-linear' for all of them")
        return found

    def watch(self, model: nn.Module, after_saving: AfterSaving) -> None:
        """Remember the model that holds the adapter, so that what is saved can be completed from it."""
        self._model, self._after_saving = weakref.ref(model), after_saving

    def to_dict(self) -> dict[str, Any]:
        """Plain data, sets as sorted lists, so that equal configs give equal files."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and beside it the plain-LoRA copy where a live model is saved."""
        fresh, self.saved, self.peft_type = self.saved, True, WRITTEN_TYPE
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.saved, self.peft_type = fresh, PeftType(PEFT_TYPE)
        model = self._model()
        if model is not None and self._after_saving is not None:
            self._after_saving(self, model, save_directory)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterConfig:
        """Moments and cache are shared, not copied; the copy belongs to no model."""
        new = copy.copy(self)
        memo[id(self)] = new
        kept = {"_moments", "_cache", "_progress", "_model", "_after_saving"}
        for name, value in vars(self).items():
            if name not in kept:
                setattr(new, name, copy.deepcopy(value, memo))
        new._model, new._after_saving = _nobody, None
        return new

    def __getstate__(self) -> Mapping[str, Any]:
        """For other processes: without the model, the moments and the cache, which are needed once only."""
        dropped = {"_moments": None, "_cache": None, "_progress": silent, "_model": _nobody, "_after_saving": None}
        return {**vars(self), **dropped}


def _nobody() -> None:
    return None
