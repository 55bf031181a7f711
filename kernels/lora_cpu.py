"""LoRA of many adapters on the CPU: one call into C per group of linears, whatever the number of adapters."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.native import DTYPE_CODES, Native, check

if TYPE_CHECKING:
    from kernels.lora import LoraPool, LoraStep


def lora_add_native_(
    y_TO: Tensor,
    x_TI: Tensor,
    *,
    native: Native,
    pool: "LoraPool",
    step: "LoraStep",
    layer: int,
    modules: range,
    out_bounds: Sequence[int],
) -> None:
    """Semantics: as `kernels.lora.lora_add_`, products summed in fp32, in one order that only the adapter decides.

    A token's result is the same bits alone and in any batch, at any number of threads. x, y: contiguous, float32 or
    bfloat16, of one dtype; pool.data: float32 or bfloat16. Raises MemoryError.
    """
    assert x_TI.is_contiguous() and y_TO.is_contiguous() and x_TI.dtype == y_TO.dtype
    segments, table = step.segments, pool.host_table
    check(
        native.lora_add(
            y_TO.data_ptr(),
            x_TI.data_ptr(),
            pool.data.data_ptr(),
            table.data_ptr() + layer * table.stride(1) * table.element_size(),
            table.stride(0),
            segments.data_ptr(),
            len(segments),
            modules.start,
            len(modules),
            _c_array(tuple(out_bounds)),
            x_TI.shape[1],
            y_TO.shape[1],
            DTYPE_CODES[y_TO.dtype],
            DTYPE_CODES[pool.data.dtype],
            torch.get_num_threads(),
        )
    )


@cache
def _c_array(values: tuple[int, ...]) -> Any:
    """Return int64 values that C reads; a model has four sets of bounds."""
    return (ctypes.c_int64 * len(values))(*values)
