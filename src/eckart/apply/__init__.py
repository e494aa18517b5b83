"""A plan, carried out."""

from eckart.apply.prepare import PreparedSite, check_needs, curves_of, prepare_site, prepare_sites
from eckart.apply.run import apply_plan

__all__ = ["PreparedSite", "apply_plan", "check_needs", "curves_of", "prepare_site", "prepare_sites"]
