"""What a kernel may assume of where it runs, and how small tensors get there."""

import torch
from torch import Tensor


def multiplies_natively(left: Tensor, right: Tensor) -> bool:
    """Say whether the tensor cores take both operands as they are: one 16-bit type, and a real device.

    The interpreter of triton 3.6 and 3.7 multiplies bf16 by its bit patterns, so there operands become fp32 first,
    which holds them exactly.
    """
    return left.is_cuda and left.dtype == right.dtype and left.dtype.itemsize == 2


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on `device`; the host waits neither for the copy nor for what the device has queued.

    A copy from pageable memory would have it wait for both.
    """
    if device.type != "cuda" or not values.numel():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
