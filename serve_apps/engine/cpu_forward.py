"""The forward pass of the CPU over the kernels in C: ten calls a layer, however many sequences and adapters there are.

`Model` computes the same through torch where these kernels cannot be had.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels import ops_cpu
from kernels.linear_cpu import PackedWeight, can_pack, linear
from kernels.lora import lora_add_
from kernels.native import Native
from kernels.ops_cpu import Heads
from serve_apps.engine.architecture import ModelSpec

if TYPE_CHECKING:
    from serve_apps.engine.batch import StepBatch
    from serve_apps.engine.kv_cache import KvCache
    from serve_apps.engine.model import Layer, Linear, LoraPlaces, Weights


def can_run(spec: ModelSpec, dtype: torch.dtype) -> bool:
    """Whether the kernels compute this model's shapes in `dtype`."""
    shapes = [spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim]
    return all(can_pack(dtype, size) for size in shapes) and ops_cpu.can_attend(spec.head_dim)


@dataclass(frozen=True)
class CpuForward:
    """Weights, the RoPE table (fp32 [positions, head_dim / 2]) and the kernels."""

    spec: ModelSpec
    weights: "Weights"
    lora_places: "LoraPlaces"
    native: Native
    cos_PD: Tensor
    sin_PD: Tensor

    def __call__(self, batch: "StepBatch", kv: "KvCache") -> Tensor:
        """Return fp32 logits [rows asked for, vocabulary]; writes the step's keys and values into `kv`."""
        spec, weights, native = self.spec, self.weights, self.native
        runs = ops_cpu.run_table(batch.attention.runs)
        x, delta = _embed(weights.embedding, batch.token_ids), None
        for index, layer in enumerate(weights.layers):
            normed = ops_cpu.add_rms_norm(x, layer.input_norm, spec.rms_norm_eps, native=native, delta=delta)
            attended = self._attention(index, layer, normed, batch, kv, runs)
            normed = ops_cpu.add_rms_norm(x, layer.post_norm, spec.rms_norm_eps, native=native, delta=attended)
            gate_up = self._linear(layer.gate_up, normed, batch, layer=index, group="gate_up")
            hidden = ops_cpu.silu_mul(gate_up, native=native)
            delta = self._linear(layer.down, hidden, batch, layer=index, group="down")
        rows = x[batch.logit_rows] if delta is None else x[batch.logit_rows] + delta[batch.logit_rows]
        lm_head = weights.lm_head
        assert isinstance(lm_head, PackedWeight)
        normed = ops_cpu.add_rms_norm(rows, weights.norm, spec.rms_norm_eps, native=native)
        return linear(normed, lm_head, out_dtype=torch.float32)

    def _attention(
        self,
        index: int,
        layer: "Layer",
        x: Tensor,
        batch: "StepBatch",
        kv: "KvCache",
        runs: ops_cpu.RunTable,
    ) -> Tensor:
        spec, native = self.spec, self.native
        heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        qkv = self._linear(layer.qkv, x, batch, layer=index, group="qkv")
        keys, values = kv.layer(index)
        has_norms = layer.q_norm is not None and layer.k_norm is not None
        ops_cpu.rope_kv_(
            qkv,
            keys,
            values,
            native=native,
            heads=heads,
            cos_PD=self.cos_PD,
            sin_PD=self.sin_PD,
            positions=batch.positions,
            slot_mapping=batch.slot_mapping,
            norms=(layer.q_norm, layer.k_norm) if has_norms else None,  # type: ignore[arg-type]
            eps=spec.rms_norm_eps,
        )
        window, scale = spec.windows[index], spec.head_dim**-0.5
        attended = ops_cpu.attention(
            qkv, keys, values, native=native, heads=heads, runs=runs, scale=scale, window=window
        )
        return self._linear(layer.o, attended, batch, layer=index, group="o")

    def _linear(self, dense: "Linear", x: Tensor, batch: "StepBatch", *, layer: int, group: str) -> Tensor:
        """Return one group's linears with every row's own adapter on top."""
        y = dense(x)
        if len(batch.lora.segments):
            modules, out_bounds = self.lora_places[group]
            lora_add_(y, x, pool=batch.lora_pool, step=batch.lora, layer=layer, modules=modules, out_bounds=out_bounds)
        return y


def _embed(embedding: Tensor | PackedWeight, token_ids: Tensor) -> Tensor:
    if isinstance(embedding, PackedWeight):
        return embedding.rows(token_ids)
    return torch.nn.functional.embedding(token_ids, embedding)
