"""Who gets which rank: error curves and a budget in, a plan that a person can edit out."""

from eckart.planning.check import check
from eckart.planning.curve import Choice, Choices, Curve, choices_for, quantised_bytes, unit_choices, with_bits
from eckart.planning.groups import Group
from eckart.planning.make import make_plan
from eckart.planning.plan import Plan, Step
from eckart.planning.solver import Allocation, solve, solve_groups

__all__ = [
    "Allocation",
    "Choice",
    "Choices",
    "Curve",
    "Group",
    "Plan",
    "Step",
    "check",
    "choices_for",
    "make_plan",
    "quantised_bytes",
    "solve",
    "solve_groups",
    "unit_choices",
    "with_bits",
]
