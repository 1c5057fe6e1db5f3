"""The ops behind the packed modules: schemas, a reference in plain torch, and faster kernels where a device has them."""

from bimos.kernels import gpu, native
from bimos.kernels.ops import int8_linear, packed_linear

__all__ = ["gpu", "int8_linear", "native", "packed_linear"]
