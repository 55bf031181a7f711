"""The forward pass of the CPU over the kernels in C: one call for all layers, however many sequences and adapters.

`Model` computes the same through torch where these kernels cannot be had.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.layers_cpu import LayerTable, LayerTensors, StepRows, decoder_layers_, layer_table
from kernels.linear_cpu import PackedWeight, can_pack, linear
from kernels.native import Native
from kernels.ops_cpu import Heads, add_rms_norm, can_attend, run_table
from serve_apps.engine.architecture import ModelSpec

if TYPE_CHECKING:
    from serve_apps.engine.batch import StepBatch
    from serve_apps.engine.kv_cache import KvCache
    from serve_apps.engine.model import Layer, Linear, Weights


def can_run(spec: ModelSpec, dtype: torch.dtype) -> bool:
    """Whether the kernels compute this model's shapes in `dtype`."""
    shapes = [spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim]
    return all(can_pack(dtype, size) for size in shapes) and can_attend(spec.head_dim)


class CpuForward:
    """Weights, the RoPE table (fp32 [positions, head_dim / 2]) and the kernels."""

    def __init__(self, spec: ModelSpec, weights: "Weights", *, native: Native, cos_PD: Tensor, sin_PD: Tensor) -> None:
        self.spec, self.weights, self.native = spec, weights, native
        self.rope = (cos_PD, sin_PD)
        self._heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self._tables: tuple[KvCache, LayerTable] | None = None

    def __call__(self, batch: "StepBatch", kv: "KvCache") -> Tensor:
        """Return fp32 logits [rows asked for, vocabulary]; writes the step's keys and values into `kv`."""
        spec, weights = self.spec, self.weights
        x = _embed(weights.embedding, batch.token_ids)
        delta = decoder_layers_(
            x,
            self._table(kv),
            StepRows(batch.positions, batch.slot_mapping, run_table(batch.attention.runs)),
            native=self.native,
            heads=self._heads,
            intermediate_size=spec.intermediate_size,
            rope=self.rope,
            eps=spec.rms_norm_eps,
            scale=spec.head_dim**-0.5,
            lora=(batch.lora_pool, batch.lora),
        )
        lm_head = weights.lm_head
        assert isinstance(lm_head, PackedWeight)
        rows = x[batch.logit_rows] + delta[batch.logit_rows]
        normed = add_rms_norm(rows, weights.norm, spec.rms_norm_eps, native=self.native)
        return linear(normed, lm_head, out_dtype=torch.float32)

    def _table(self, kv: "KvCache") -> LayerTable:
        if self._tables is None or self._tables[0] is not kv:
            layers = enumerate(self.weights.layers)
            self._tables = (kv, layer_table([_tensors(layer, kv, self.spec, index) for index, layer in layers]))
        return self._tables[1]


def _tensors(layer: "Layer", kv: "KvCache", spec: ModelSpec, index: int) -> LayerTensors:
    keys, values = kv.layer(index)
    return LayerTensors(
        input_norm=layer.input_norm,
        qkv=_packed(layer.qkv),
        qkv_bias=layer.qkv.bias,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        o=_packed(layer.o),
        o_bias=layer.o.bias,
        post_norm=layer.post_norm,
        gate_up=_packed(layer.gate_up),
        gate_up_bias=layer.gate_up.bias,
        down=_packed(layer.down),
        down_bias=layer.down.bias,
        keys=keys,
        values=values,
        window=spec.windows[index],
    )


def _packed(dense: "Linear") -> PackedWeight:
    assert isinstance(dense.weight_IO, PackedWeight)
    return dense.weight_IO


def _embed(embedding: Tensor | PackedWeight, token_ids: Tensor) -> Tensor:
    if isinstance(embedding, PackedWeight):
        return embedding.rows(token_ids)
    return torch.nn.functional.embedding(token_ids, embedding)
