"""Dense linears on the CPU over weights packed once at load; the layout is described in `cpu_linear.c`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.large_pages import LargePages
from kernels.native import DTYPE_CODES, Native, check

PANEL = 32


@dataclass(frozen=True)
class PackedWeight:
    """A weight [O, I] in panels: float32 [O / 32, I, 32] or bfloat16 [O / 32, I / 2, 32, 2], zeros after row O."""

    data: Tensor
    out_size: int
    in_size: int
    native: Native

    @property
    def dtype(self) -> torch.dtype:
        """The element type of weight, input and output."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return self.data.device

    def rows(self, indices_T: Tensor) -> Tensor:
        """Return rows of the weight as [T, I]: an embedding tied to the output layer needs no second copy."""
        found = self.data[indices_T // PANEL, :, indices_T % PANEL]
        return found.reshape(len(indices_T), self.in_size)


def can_pack(dtype: torch.dtype, in_size: int) -> bool:
    """Whether the packed product computes this input size and dtype."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and in_size % 2 == 0)


def pack(weight_OI: Tensor, native: Native, pages: LargePages | None = None) -> PackedWeight:
    """Copy a weight into panels, in memory from `pages`. weight: [O, I], float32 or bfloat16 (then I is even)."""
    out_size, in_size = weight_OI.shape
    assert can_pack(weight_OI.dtype, in_size)
    num_panels = -(-out_size // PANEL)
    is_paired = weight_OI.dtype == torch.bfloat16
    shape = (num_panels, in_size // 2, PANEL, 2) if is_paired else (num_panels, in_size, PANEL)
    data = (pages or LargePages(native)).empty(shape, weight_OI.dtype)
    whole = out_size // PANEL
    data[whole:] = 0
    for panels, rows in ((data[:whole], weight_OI[: whole * PANEL]), (data[whole:], weight_OI[whole * PANEL :])):
        if rows.numel():
            height = min(len(rows), PANEL)
            if is_paired:
                panels[:, :, :height] = rows.view(-1, height, in_size // 2, 2).transpose(1, 2)
            else:
                panels[:, :, :height] = rows.view(-1, height, in_size).transpose(1, 2)
    return PackedWeight(data, out_size, in_size, native)


def linear(
    x_TI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None = None,
    *,
    add_to_TO: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Semantics: y = x W^T + bias, or add_to += x W^T + bias in place, summed in fp32 in rising order of i.

    x: [T, I] contiguous, of the weight's dtype; returns [T, O] of that dtype or of `out_dtype` (float32, only without
    add_to). A row's result does not depend on the other rows. Raises MemoryError.
    """
    assert x_TI.is_contiguous() and x_TI.dtype == weight.dtype and x_TI.shape[1] == weight.in_size
    y = add_to_TO
    if y is None:
        y = x_TI.new_empty(len(x_TI), weight.out_size, dtype=out_dtype or x_TI.dtype)
    check(
        weight.native.linear(
            y.data_ptr(),
            x_TI.data_ptr(),
            weight.data.data_ptr(),
            None if bias_O is None else bias_O.data_ptr(),
            len(x_TI),
            weight.in_size,
            weight.out_size,
            add_to_TO is not None,
            DTYPE_CODES[weight.dtype],
            DTYPE_CODES[y.dtype],
            torch.get_num_threads(),
        )
    )
    return y
