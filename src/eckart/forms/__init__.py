"""A weight in structured form. Methods return forms, layers wrap them, checkpoints store kind and tensors."""

from eckart.forms.dense import Dense
from eckart.forms.form import Form
from eckart.forms.lowrank import LowRank
from eckart.forms.pivoted import Pivoted

__all__ = ["Dense", "Form", "LowRank", "Pivoted"]
