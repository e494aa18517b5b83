"""Optimizers that use low-dimensional and orthogonal structure."""

from eckart.optim.adamp import AdamP
from eckart.optim.apollo import Apollo
from eckart.optim.auon import AuON
from eckart.optim.coordinate import (
    Descent,
    Logistic,
    Quadratic,
    coordinate_descent,
    forest_block,
    least_squares,
    logistic,
    solve_forest,
)
from eckart.optim.dct_adamw import DCTAdamW
from eckart.optim.diffgrad import DiffGrad
from eckart.optim.dion import Dion
from eckart.optim.feedback import Feedback
from eckart.optim.fira import Fira
from eckart.optim.for_trainer import for_trainer
from eckart.optim.frugal import Frugal
from eckart.optim.galore import GaLore
from eckart.optim.guards import GUARDS, Clip, Growth, Radial, Rms
from eckart.optim.lanczos_rates import LanczosRates, batch_scaled_rate, lanczos_rates, operator_rates
from eckart.optim.matrices import SCALES
from eckart.optim.mfac import MFAC
from eckart.optim.muon import Muon
from eckart.optim.report import LayerReport, Report
from eckart.optim.residuals import RESIDUALS, ChannelResidual, Drop, ScaledResidual, SignResidual
from eckart.optim.routing import ParamGroups, param_groups
from eckart.optim.rules import (
    RULES,
    Adam,
    AuONRule,
    DiffGradRule,
    Hybrid,
    Momentum,
    NewtonSchulz,
    Normalize,
    Sign,
    UnitRows,
)
from eckart.optim.scaling import SCALING_RULES, ScalingRule, layerwise_scaling, match_top_singular_values
from eckart.optim.sgdp import SGDP
from eckart.optim.subspace import Subspace
from eckart.optim.subspaces import DCT, SUBSPACES, SVD, Gaussian, Power, Randomized, Rows
from eckart.optim.table import OPTIMIZERS
from eckart.optim.trion import Trion

__all__ = [
    "DCT",
    "GUARDS",
    "MFAC",
    "OPTIMIZERS",
    "RESIDUALS",
    "RULES",
    "SCALES",
    "SCALING_RULES",
    "SGDP",
    "SUBSPACES",
    "SVD",
    "Adam",
    "AdamP",
    "Apollo",
    "AuON",
    "AuONRule",
    "ChannelResidual",
    "Clip",
    "DCTAdamW",
    "Descent",
    "DiffGrad",
    "DiffGradRule",
    "Dion",
    "Drop",
    "Feedback",
    "Fira",
    "Frugal",
    "GaLore",
    "Gaussian",
    "Growth",
    "Hybrid",
    "LanczosRates",
    "LayerReport",
    "Logistic",
    "Momentum",
    "Muon",
    "NewtonSchulz",
    "Normalize",
    "ParamGroups",
    "Power",
    "Quadratic",
    "Radial",
    "Randomized",
    "Report",
    "Rms",
    "Rows",
    "ScaledResidual",
    "ScalingRule",
    "Sign",
    "SignResidual",
    "Subspace",
    "Trion",
    "UnitRows",
    "batch_scaled_rate",
    "coordinate_descent",
    "for_trainer",
    "forest_block",
    "lanczos_rates",
    "layerwise_scaling",
    "least_squares",
    "logistic",
    "match_top_singular_values",
    "operator_rates",
    "param_groups",
    "solve_forest",
]
