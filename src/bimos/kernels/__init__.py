"""The ops behind the packed modules: schemas, a reference in plain torch, and faster kernels where a device has them."""

from bimos.kernels import native
from bimos.kernels.ops import int8_linear, packed_linear

__all__ = ["int8_linear", "native", "packed_linear"]
