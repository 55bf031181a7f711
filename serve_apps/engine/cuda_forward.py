"""The forward pass of the GPU over the Triton kernels: eleven launches and four base products a layer.

It reads device tensors only, so a decode step can be captured in a CUDA graph (`graphs`). Imported only where there is
a GPU, because it loads Triton; `Model` computes the same through torch.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cpu import PackedWeight
from kernels.lora import LoraStep
from kernels.lora_triton import linear_with_lora, with_work
from kernels.paged_attention import paged_attention
from kernels.rms_norm import add_rms_norm_, rms_norm
from kernels.rope import rope_kv_write_
from kernels.silu_mul import silu_mul
from serve_apps.engine.architecture import ModelSpec

if TYPE_CHECKING:
    from serve_apps.engine.batch import StepBatch
    from serve_apps.engine.kv_cache import KvCache
    from serve_apps.engine.model import Layer, Linear, LoraPlaces, Weights


class CudaForward:
    """Weights and the RoPE tables [positions, head_dim], in the model's dtype."""

    def __init__(
        self, spec: ModelSpec, weights: "Weights", lora_places: "LoraPlaces", cos_PD: Tensor, signed_sin_PD: Tensor
    ) -> None:
        """Make the side stream on which LoRA's shrink runs beside the base product, where there are streams."""
        self._spec = spec
        self._weights = weights
        self._lora_places = lora_places
        self._cos = cos_PD
        self._signed_sin = signed_sin_PD
        self._side = torch.cuda.Stream(cos_PD.device) if cos_PD.is_cuda else None

    def __call__(self, batch: "StepBatch", kv: "KvCache") -> Tensor:
        """Return fp32 logits [rows asked for, vocabulary]; writes the step's keys and values into `kv`.

        Without segments no LoRA kernel is launched, so steps of the base model cost nothing for being able to.
        """
        weights, eps = self._weights, self._spec.rms_norm_eps
        assert isinstance(weights.embedding, Tensor) and isinstance(weights.lm_head, Tensor)
        step = with_work(batch.lora) if len(batch.lora.segments) else None
        x = F.embedding(batch.token_ids, weights.embedding)
        normed = rms_norm(x, weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            for copies in batch.lora_copies:
                copies.wait(index)
            attended = self._attention(index, layer, normed, batch, kv, step)
            normed = add_rms_norm_(attended, x, layer.post_norm, eps)
            gate_up = self._linear(layer.gate_up, normed, batch, step, layer=index, group="gate_up")
            delta = self._linear(layer.down, silu_mul(gate_up), batch, step, layer=index, group="down")
            is_last = index + 1 == len(weights.layers)
            normed = add_rms_norm_(delta, x, weights.norm if is_last else weights.layers[index + 1].input_norm, eps)
        return F.linear(normed[batch.logit_rows], weights.lm_head).float()

    def _attention(
        self, index: int, layer: "Layer", x: Tensor, batch: "StepBatch", kv: "KvCache", step: LoraStep | None
    ) -> Tensor:
        spec, paged = self._spec, batch.attention.paged
        assert paged is not None, "the batch was built without block tables"
        keys, values = kv.layer(index)
        queries = rope_kv_write_(
            self._linear(layer.qkv, x, batch, step, layer=index, group="qkv"),
            keys,
            values,
            cos_PD=self._cos,
            signed_sin_PD=self._signed_sin,
            positions_T=batch.positions,
            slot_mapping_T=batch.slot_mapping,
            num_heads=spec.num_heads,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=spec.rms_norm_eps,
        )
        attended = paged_attention(
            queries, keys, values, batch=paged, scale=spec.head_dim**-0.5, window=spec.windows[index]
        )
        return self._linear(layer.o, attended.flatten(1), batch, step, layer=index, group="o")

    def _linear(
        self, linear: "Linear", x: Tensor, batch: "StepBatch", step: LoraStep | None, *, layer: int, group: str
    ) -> Tensor:
        assert not isinstance(linear.weight_IO, PackedWeight), "weights packed for the CPU"
        if step is None:
            return linear(x)
        modules, out_bounds = self._lora_places[group]
        return linear_with_lora(
            linear,
            x,
            pool=batch.lora_pool,
            step=step,
            layer=layer,
            modules=modules,
            out_bounds=out_bounds,
            side=self._side,
        )
