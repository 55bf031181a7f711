"""LoRA of many adapters: their weights in one flat buffer at true rank, and the op that adds them to linear outputs.

The buffer belongs to the engine's adapter pool, which moves adapters about in it; the table says where modules lie:

    table[adapter row, layer, module] = (offset of A, offset of B, rank)      rank 0: the adapter leaves it alone
    A: [rank, I] from `offset of A` on; B: [rank, O] (transposed, scaling folded in) from `offset of B` on

Nothing is padded to a common rank, so bytes and products follow the true ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.lora_cpu import lora_add_native_
from kernels.native import DTYPE_CODES, Native

if TYPE_CHECKING:
    from kernels.lora_work import Tiling

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The table's third axis. Neighbours that read the same input are computed together: 0..2, 3, 4..5, 6."""
MAX_RANK = 512
"""The largest rank of one module. CUDA buffers are laid out for it, so an adapter beyond it must be refused at load."""


@dataclass(frozen=True)
class LoraPool:
    """data: flat [W], float32 or the model's dtype; table: int64 [adapter rows, layers, 7, 3] on the same device.

    `host_table` holds the same numbers on the CPU (on the CPU it is `table` itself). Every offset in the table is a
    multiple of `alignment` elements; 8 lets CUDA load 16 bytes at a time, 1 promises nothing. `native`: the
    compiled kernels that compute on the CPU; None leaves it to torch.
    """

    data: Tensor
    table: Tensor
    host_table: Tensor
    alignment: int = 1
    native: Native | None = None


@dataclass(frozen=True)
class LoraWork:
    """Device buffers that list one step's work, see `kernels.lora_work`: int32 [T] but num_tiles int32 [1].

    partials: fp32 [splits, T, rank rows], what shrink leaves for expand. The buffers are the same for every step of T
    tokens, so a CUDA graph may hold them.
    """

    order: Tensor
    sorted_rows: Tensor
    index_in_segment: Tensor
    tile_starts: Tensor
    num_tiles: Tensor
    partials: Tensor
    tiling: "Tiling"
    num_programs: int


@dataclass(frozen=True)
class LoraStep:
    """Which token belongs to which adapter in one step.

    adapter_rows: int32 [T] on the device, -1 for the base model. segments: int32 [N, 3] on the CPU, one row (adapter
    row, start, end) per run of neighbouring tokens of one adapter, base-model tokens left out, in order of start.
    work: what CUDA reads instead of `segments`, see `kernels.lora_triton.with_work`; None builds it call by call.
    """

    adapter_rows: Tensor
    segments: Tensor
    work: LoraWork | None = None


def lora_add_(
    y_TO: Tensor,
    x_TI: Tensor,
    *,
    pool: LoraPool,
    step: LoraStep,
    layer: int,
    modules: range,
    out_bounds: Sequence[int],
) -> None:
    """Semantics: y[t, bounds[i]:bounds[i+1]] += B_m A_m x[t] in place, m = modules[i], for every token with an adapter.

    x: [T, I], y: [T, O] contiguous, of the model's dtype; products are summed in fp32 at least. Tokens of the base
    model and columns of modules that their adapter leaves alone are not touched.
    On CUDA `kernels.lora_triton` computes the same.
    """
    if y_TO.is_cuda:
        from kernels.lora_triton import lora_add_triton_

        lora_add_triton_(y_TO, x_TI, pool=pool, step=step, layer=layer, modules=modules, out_bounds=out_bounds)
        return
    native = pool.native
    if native is not None and not y_TO.is_cuda and {y_TO.dtype, pool.data.dtype} <= set(DTYPE_CODES):
        lora_add_native_(
            y_TO, x_TI, native=native, pool=pool, step=step, layer=layer, modules=modules, out_bounds=out_bounds
        )
        return
    for adapter_row, start, end in step.segments.tolist():
        for index, module in enumerate(modules):
            a_offset, b_offset, rank = pool.host_table[adapter_row, layer, module].tolist()
            if not rank:
                continue
            columns = slice(out_bounds[index], out_bounds[index + 1])
            a_RI = pool.data[a_offset : a_offset + rank * x_TI.shape[1]].view(rank, -1)
            b_RO = pool.data[b_offset : b_offset + rank * (columns.stop - columns.start)].view(rank, -1)
            dtype = torch.promote_types(pool.data.dtype, x_TI.dtype)
            shrunk = x_TI[start:end].to(dtype) @ a_RI.to(dtype).t()
            y_TO[start:end, columns] = (y_TO[start:end, columns].to(dtype) + shrunk @ b_RO.to(dtype)).to(y_TO.dtype)
