"""The Triton body of `kernels.lora.lora_add_`: a work list per step, then shrink and expand per group of linears."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.lora import LoraPool, LoraStep, LoraWork
from kernels.lora_expand import lora_expand_
from kernels.lora_shrink import lora_shrink_
from kernels.lora_work import allocate_work, build_work_


def with_work(step: LoraStep, work: LoraWork | None = None) -> LoraStep:
    """Return `step` with its work list built on the device (two launches), in `work`'s buffers where given.

    Call it once per forward pass, and inside the captured function where the pass is a CUDA graph: each replay then
    lists what `adapter_rows` holds by then.
    """
    buffers = work or allocate_work(step.adapter_rows.shape[0], device=step.adapter_rows.device)
    build_work_(buffers, step.adapter_rows)
    return replace(step, work=buffers)


def lora_add_triton_(
    y_TO: Tensor,
    x_TI: Tensor,
    *,
    pool: LoraPool,
    step: LoraStep,
    layer: int,
    modules: range,
    out_bounds: Sequence[int],
) -> None:
    """Semantics: as `kernels.lora.lora_add_`: y[t, bounds[i]:bounds[i+1]] += B_m A_m x[t] in place.

    x: [T, I], y: [T, O] contiguous on the pool's device. Reads `step.adapter_rows` only, never `segments` or
    `host_table`: the launches are the same whatever adapters are active, and tokens may lie in any order. Without
    `step.work` the list is built for this call alone.
    """
    if step.work is None:
        step = with_work(step)
    assert step.work is not None
    lora_shrink_(step.work, x_TI.contiguous(), pool=pool, layer=layer, modules=modules)
    lora_expand_(y_TO, step.work, pool=pool, layer=layer, modules=modules, out_bounds=out_bounds)


def linear_with_lora(
    linear: Callable[[Tensor], Tensor],
    x_TI: Tensor,
    *,
    pool: LoraPool,
    step: LoraStep,
    layer: int,
    modules: range,
    out_bounds: Sequence[int],
    side: torch.cuda.Stream | None = None,
) -> Tensor:
    """Semantics: y = linear(x), then y += B A x per token; with `side` the shrink runs beside the base product.

    `step.work` must be there. Shrink and the base product both only read x; expand waits for both. Inside a CUDA graph
    the fork and the join become edges of the graph.
    """
    assert step.work is not None, "call with_work once per pass"
    if side is None:
        y = linear(x_TI)
        lora_shrink_(step.work, x_TI, pool=pool, layer=layer, modules=modules)
    else:
        main = torch.cuda.current_stream(x_TI.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            lora_shrink_(step.work, x_TI, pool=pool, layer=layer, modules=modules)
        y = linear(x_TI)
        main.wait_stream(side)
    lora_expand_(y, step.work, pool=pool, layer=layer, modules=modules, out_bounds=out_bounds)
    return y
