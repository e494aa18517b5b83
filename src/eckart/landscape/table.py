"""Every diagnostic of the landscape by name. A new one is one file and one line here."""

from __future__ import annotations

from eckart.landscape.batch_size import METHOD as BATCH_SIZE
from eckart.landscape.intrinsic_dimension import METHOD as INTRINSIC_DIMENSION
from eckart.landscape.lanczos import METHOD as LANCZOS
from eckart.landscape.said import METHOD as SAID
from eckart.landscape.stability import METHOD as STABILITY
from eckart.landscape.trace import METHOD as TRACE
from eckart.records import Diagnostic

# Under names of their own: the package exports functions that are called as their files are.
LANDSCAPE: dict[str, Diagnostic] = {
    method.name: method for method in (INTRINSIC_DIMENSION, SAID, LANCZOS, TRACE, STABILITY, BATCH_SIZE)
}
"""In the order in which they are shown."""
