"""Texts to calibrate and to measure on, with their hash."""

from eckart.data.read import read_texts
from eckart.data.textdata import TextData

__all__ = ["TextData", "read_texts"]
