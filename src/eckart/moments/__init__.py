"""Second moments of a model, collected once and used everywhere."""

from eckart.moments.collect import collect
from eckart.moments.losses import Batch, LossFn, gauss_newton, sampled_targets
from eckart.moments.observe import Gradients
from eckart.moments.site import SiteMoments
from eckart.moments.store import Moments

__all__ = [
    "Batch",
    "Gradients",
    "LossFn",
    "Moments",
    "SiteMoments",
    "collect",
    "gauss_newton",
    "sampled_targets",
]
