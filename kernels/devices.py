"""What a kernel may assume of where it runs."""

from torch import Tensor


def multiplies_natively(left: Tensor, right: Tensor) -> bool:
    """Say whether the tensor cores take both operands as they are: one 16-bit type, and a real device.

    The interpreter of triton 3.6 and 3.7 multiplies bf16 by its bit patterns, so there operands become fp32 first,
    which holds them exactly.
    """
    return left.is_cuda and left.dtype == right.dtype and left.dtype.itemsize == 2
