"""Attention, RoPE, norms and SiLU of the CPU forward, in C; `kernels.ops` is the same in torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.native import DTYPE_CODES, Native, check
from kernels.ops import AttentionRun

# Below this many values one thread is done before a second has woken up, and waits for nobody on a busy machine.
MIN_THREADED_VALUES = 1 << 15


@dataclass(frozen=True)
class RunTable:
    """A step's attention runs as C reads them: int64 [runs, 5]; `slots` keeps alive the lists that it points into."""

    table: Tensor
    slots: tuple[Tensor, ...]
    longest: int


@dataclass(frozen=True)
class Heads:
    """Numbers of query and key/value heads, and their size, a multiple of 16 up to 256."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def can_attend(head_dim: int) -> bool:
    """Whether these kernels compute heads of this size."""
    return head_dim % 16 == 0 and head_dim <= 256


def run_table(runs: Sequence[AttentionRun]) -> RunTable:
    """Turn a plan's runs, in row order, into one table; done once per step."""
    rows = [
        (run.row_start, run.num_rows, run.context_len, run.slot_start, 0 if run.slots is None else run.slots.data_ptr())
        for run in runs
    ]
    return RunTable(
        torch.tensor(rows, dtype=torch.int64).view(-1, 5),
        tuple(run.slots for run in runs if run.slots is not None),
        max((run.context_len for run in runs), default=0),
    )


def rope_kv_(
    qkv_TO: Tensor,
    keys_SGD: Tensor,
    values_SGD: Tensor,
    *,
    native: Native,
    heads: Heads,
    cos_PD: Tensor,
    sin_PD: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
) -> None:
    """Semantics: q, k = rope(norm(q)), rope(norm(k)); cache[slot_mapping[t]] = k[t], v[t]; q in place.

    qkv: [T, (H + 2G) D]; keys, values: [S, G, D] of one dtype; cos, sin: fp32 [positions, D / 2]; norms: RMS-norm
    weights [D] of q and k heads, where the architecture has them. positions, slot_mapping: int64 [T].
    """
    q_norm, k_norm = norms or (None, None)
    native.rope_kv(
        qkv_TO.data_ptr(),
        keys_SGD.data_ptr(),
        values_SGD.data_ptr(),
        cos_PD.data_ptr(),
        sin_PD.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        None if q_norm is None else q_norm.data_ptr(),
        None if k_norm is None else k_norm.data_ptr(),
        len(qkv_TO),
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        eps,
        DTYPE_CODES[qkv_TO.dtype],
        _num_threads(qkv_TO),
    )


def attention(
    qkv_TO: Tensor,
    keys_SGD: Tensor,
    values_SGD: Tensor,
    *,
    native: Native,
    heads: Heads,
    runs: RunTable,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Semantics: as `kernels.ops.paged_attention`, queries read from packed q/k/v -> [T, H D]. Raises MemoryError.

    Every row is computed alone, in fp32, so it is the same bits whatever else is in the step.
    """
    out = qkv_TO.new_empty(len(qkv_TO), heads.num_heads * heads.head_dim)
    check(
        native.attention(
            out.data_ptr(),
            qkv_TO.data_ptr(),
            keys_SGD.data_ptr(),
            values_SGD.data_ptr(),
            runs.table.data_ptr(),
            len(runs.table),
            runs.longest,
            len(qkv_TO),
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            scale,
            window or 0,
            DTYPE_CODES[qkv_TO.dtype],
            torch.get_num_threads(),
        )
    )
    return out


def add_rms_norm(x: Tensor, weight: Tensor, eps: float, *, native: Native, delta: Tensor | None = None) -> Tensor:
    """Semantics: x += delta in place, then y = x / sqrt(mean(x^2) + eps) * weight, in fp32, rounded once.

    x, delta: [T, I] contiguous, weight: [I], of one dtype. Returns a new tensor like x.
    """
    y = torch.empty_like(x)
    native.add_rms_norm(
        y.data_ptr(),
        x.data_ptr(),
        None if delta is None else delta.data_ptr(),
        weight.data_ptr(),
        len(x),
        x.shape[1],
        eps,
        DTYPE_CODES[x.dtype],
        _num_threads(x),
    )
    return y


def silu_mul(gate_up: Tensor, *, native: Native) -> Tensor:
    """Semantics: y = silu(x[:, :n]) * x[:, n:] in fp32, rounded once. x: [T, 2n] contiguous -> [T, n]."""
    half = gate_up.shape[1] // 2
    y = gate_up.new_empty(len(gate_up), half)
    native.silu_mul(
        y.data_ptr(), gate_up.data_ptr(), len(gate_up), half, DTYPE_CODES[gate_up.dtype], _num_threads(gate_up)
    )
    return y


def _num_threads(x: Tensor) -> int:
    return 1 if x.numel() < MIN_THREADED_VALUES else torch.get_num_threads()
