"""Second moments of a model, collected once and used everywhere."""

from eckart.moments.site import SiteMoments

__all__ = ["SiteMoments"]
