"""All decoder layers of one step in one call into C, see `cpu_layers.c`."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.native import DTYPE_CODES, Native, check
from kernels.ops_cpu import Heads, RunTable

if TYPE_CHECKING:
    from kernels.linear_cpu import PackedWeight
    from kernels.lora import LoraPool, LoraStep

_P, _L, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Step(ctypes.Structure):
    """`Step` in cpu_layers.c, field by field."""

    _fields_ = [
        *((name, _L) for name in ("layers", "num_layers", "T", "I", "F", "H", "G", "D")),
        *((name, _P) for name in ("x", "delta", "normed", "qkv", "attended", "gate_up", "hidden")),
        *((name, _P) for name in ("cos", "sin", "positions", "slots", "runs")),
        *((name, _L) for name in ("num_runs", "longest")),
        *((name, _P) for name in ("lora_weights", "lora_table")),
        *((name, _L) for name in ("lora_row_stride", "lora_layer_stride")),
        ("lora_segments", _P),
        ("num_segments", _L),
        *((name, _D) for name in ("eps", "scale")),
        *((name, _L) for name in ("dtype", "lora_dtype", "num_threads")),
    ]


@dataclass(frozen=True)
class LayerTensors:
    """One decoder layer: packed weights, what may be absent as None, cache [slots, G, D], window (None: all)."""

    input_norm: Tensor
    qkv: "PackedWeight"
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: "PackedWeight"
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: "PackedWeight"
    gate_up_bias: Tensor | None
    down: "PackedWeight"
    down_bias: Tensor | None
    keys: Tensor
    values: Tensor
    window: int | None


@dataclass(frozen=True)
class LayerTable:
    """All layers as C reads them: int64 [layers, 15]; `layers` keeps alive what it points to."""

    table: Tensor
    layers: tuple[LayerTensors, ...]


@dataclass(frozen=True)
class StepRows:
    """Where a step's tokens stand. positions, slot_mapping: int64 [T]."""

    positions: Tensor
    slot_mapping: Tensor
    runs: RunTable


def layer_table(layers: Sequence[LayerTensors]) -> LayerTable:
    """Turn layers into one table; done once per model and cache."""
    rows = [
        (
            *map(_address, (layer.input_norm, layer.qkv.data, layer.qkv_bias, layer.q_norm, layer.k_norm)),
            *map(_address, (layer.o.data, layer.o_bias, layer.post_norm, layer.gate_up.data, layer.gate_up_bias)),
            *map(_address, (layer.down.data, layer.down_bias, layer.keys, layer.values)),
            layer.window or 0,
        )
        for layer in layers
    ]
    return LayerTable(torch.tensor(rows, dtype=torch.int64), tuple(layers))


def decoder_layers_(
    x_TI: Tensor,
    table: LayerTable,
    rows: StepRows,
    *,
    native: Native,
    heads: Heads,
    intermediate_size: int,
    rope: tuple[Tensor, Tensor],
    eps: float,
    scale: float,
    lora: tuple["LoraPool", "LoraStep"],
) -> Tensor:
    """Semantics: per layer x += o(attention(rope(qkv(norm x)))), x += down(silu_mul(gate_up(norm x))), adapters added.

    The last layer's second term is not added to x but returned, [T, I]. Every operation is that of its own call in
    `kernels.ops_cpu`, `kernels.linear_cpu` and `kernels.lora`, bit for bit. x: [T, I] contiguous, in place;
    rope: cos and sin, fp32 [positions, D / 2]. Raises MemoryError.
    """
    num_tokens, hidden_size = x_TI.shape
    query_size = heads.num_heads * heads.head_dim
    qkv_size = query_size + 2 * heads.num_kv_heads * heads.head_dim
    widths = [hidden_size, hidden_size, qkv_size, query_size, 2 * intermediate_size, intermediate_size]
    scratch = [x_TI.new_empty(num_tokens, width) for width in widths]
    (pool, step), (cos, sin) = lora, rope
    assert x_TI.is_contiguous() and {x_TI.dtype, pool.data.dtype} <= set(DTYPE_CODES)
    call = _Step(
        *(table.table.data_ptr(), len(table.table), num_tokens, hidden_size, intermediate_size),
        *(heads.num_heads, heads.num_kv_heads, heads.head_dim),
        *(x_TI.data_ptr(), *(buffer.data_ptr() for buffer in scratch)),
        *(cos.data_ptr(), sin.data_ptr(), rows.positions.data_ptr(), rows.slot_mapping.data_ptr()),
        *(rows.runs.table.data_ptr(), len(rows.runs.table), rows.runs.longest),
        *(pool.data.data_ptr(), pool.host_table.data_ptr(), pool.host_table.stride(0), pool.host_table.stride(1)),
        *(step.segments.data_ptr(), len(step.segments)),
        *(eps, scale),
        *(DTYPE_CODES[x_TI.dtype], DTYPE_CODES[pool.data.dtype], torch.get_num_threads()),
    )
    check(native.layers(ctypes.byref(call)))
    return scratch[0]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
