"""Every pruning method by name. A new one is one file and one line here."""

from __future__ import annotations

from eckart.prune.alps import METHOD as ALPS
from eckart.prune.cric import METHOD as CRIC
from eckart.prune.dsl import METHOD as DSL
from eckart.prune.envelope import METHOD as ENVELOPE
from eckart.prune.ftwt import METHOD as FTWT
from eckart.prune.global_magnitude import METHOD as GLOBAL_MAGNITUDE
from eckart.prune.gradient_flow import METHOD as GRADIENT_FLOW
from eckart.prune.gradual import METHOD as GRADUAL
from eckart.prune.heads import METHOD as HEADS
from eckart.prune.hesso import METHOD as HESSO
from eckart.prune.iss import METHOD as ISS
from eckart.prune.kfac import METHOD as KFAC
from eckart.prune.magnitude import METHOD as MAGNITUDE
from eckart.prune.mfac import METHOD as MFAC
from eckart.prune.owl import METHOD as OWL
from eckart.prune.quick_selection import METHOD as QUICK_SELECTION
from eckart.prune.refit import METHOD as REFIT
from eckart.prune.rigl import METHOD as RIGL
from eckart.prune.soups import METHOD as SOUPS
from eckart.prune.sparse_ift import METHOD as SPARSE_IFT
from eckart.prune.sparse_lowrank import METHOD as SPARSE_LOWRANK
from eckart.prune.sparsegpt import METHOD as SPARSEGPT
from eckart.prune.ssvi import METHOD as SSVI
from eckart.prune.turbo_vbi import METHOD as TURBO_VBI
from eckart.prune.wanda import METHOD as WANDA
from eckart.records import Technique

_ALL: tuple[Technique, ...] = (
    MAGNITUDE,
    WANDA,
    SPARSEGPT,
    KFAC,
    ALPS,
    MFAC,
    REFIT,
    SPARSE_LOWRANK,
    OWL,
    HEADS,
    GRADUAL,
    GLOBAL_MAGNITUDE,
    ISS,
    HESSO,
    CRIC,
    RIGL,
    ENVELOPE,
    GRADIENT_FLOW,
    DSL,
    SOUPS,
    SPARSE_IFT,
    QUICK_SELECTION,
    SSVI,
    TURBO_VBI,
    FTWT,
)

PRUNING: dict[str, Technique] = {method.name: method for method in _ALL}
"""In the order in which they are shown."""
