"""A small problem with learned weights, on which every method's claim is put to the test."""

from eckart.evidence.problem import Problem, learned_problem

__all__ = ["Problem", "learned_problem"]
