"""Eckart's adapters inside PEFT: one external tuner, any method of :mod:`eckart.adaptation`."""

# Before anything of this package: eckart.hooks imports the tuner as soon as peft is there, and must not do so half-way
# through the import of the tuner itself.
import peft  # noqa: F401
