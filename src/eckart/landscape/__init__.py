"""What the loss looks like around a point: intrinsic dimension, curvature, stability."""

from eckart.landscape.batch_size import (
    batch_eigenvalue,
    hessian_noise,
    learning_rate_by_batch,
    scaled_learning_rate,
)
from eckart.landscape.curvature import (
    Operator,
    gauss_newton_operator,
    hessian_operator,
    matrix_operator,
    model_hessian,
)
from eckart.landscape.intrinsic_dimension import find_dimension, intrinsic_dimension
from eckart.landscape.lanczos import Ritz, Spectrum, gauss_newton_spectrum, hessian_spectrum, lanczos, spectrum
from eckart.landscape.projections import (
    DenseProjection,
    FastfoodProjection,
    OneHotProjection,
    Projection,
    projection,
)
from eckart.landscape.said import fine_tuning_dimension
from eckart.landscape.stability import stability, stability_margins
from eckart.landscape.subspace import SubspaceModel
from eckart.landscape.table import LANDSCAPE
from eckart.landscape.trace import hessian_trace, trace

__all__ = [
    "LANDSCAPE",
    "DenseProjection",
    "FastfoodProjection",
    "OneHotProjection",
    "Operator",
    "Projection",
    "Ritz",
    "Spectrum",
    "SubspaceModel",
    "batch_eigenvalue",
    "find_dimension",
    "fine_tuning_dimension",
    "gauss_newton_operator",
    "gauss_newton_spectrum",
    "hessian_noise",
    "hessian_operator",
    "hessian_spectrum",
    "hessian_trace",
    "intrinsic_dimension",
    "lanczos",
    "learning_rate_by_batch",
    "matrix_operator",
    "model_hessian",
    "projection",
    "scaled_learning_rate",
    "spectrum",
    "stability",
    "stability_margins",
    "trace",
]
