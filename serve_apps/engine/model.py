"""Own forward of the Llama family: Llama (SmolLM too), Mistral, Qwen2, Qwen3, weights straight from safetensors.

q/k/v and gate/up are packed, so that each input is read once. Shape letters as in `kernels.ops`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from serve_apps.engine.architecture import ModelSpec

if TYPE_CHECKING:
    from serve_apps.engine.adapter import Adapter
    from serve_apps.engine.batch import StepBatch
    from serve_apps.engine.kv_cache import KvCache


@dataclass(frozen=True)
class Linear:
    """y = x weight + bias; weight [I, O] in whichever memory order the device multiplies fastest, bias [O] or None."""

    weight_IO: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight_IO) if self.bias is None else torch.addmm(self.bias, x, self.weight_IO)


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; the two norms over heads exist in Qwen3 only."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """All weights of a model; `lm_head` is `embedding` itself when they are tied."""

    embedding: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    lm_head: Tensor


class Model:
    """The forward pass over one step's tokens."""

    def __init__(self, spec: ModelSpec, weights: Weights, *, max_positions: int) -> None:
        """Own `weights` and tabulate RoPE for positions 0..max_positions-1 (in fp32, then in the model's dtype)."""
        self.spec = spec
        self.weights = weights
        dtype, device = weights.embedding.dtype, weights.embedding.device
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), spec.inverse_frequencies)
        cos, sin = angles.cos() * spec.rope_scaling, angles.sin() * spec.rope_scaling
        self._cos = torch.cat((cos, cos), -1).to(device, dtype)
        self._signed_sin = torch.cat((-sin, sin), -1).to(device, dtype)

    def forward(self, batch: "StepBatch", kv: "KvCache") -> Tensor:
        """Return fp32 logits [rows asked for, vocabulary]; writes the step's keys and values into `kv`."""
        eps = self.spec.rms_norm_eps
        cos, signed_sin = self._cos[batch.positions], self._signed_sin[batch.positions]
        x = F.embedding(batch.token_ids, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            attended = self._attention(index, ops.rms_norm(x, layer.input_norm, eps), batch, kv, cos, signed_sin)
            x = x + attended
            x = x + self._mlp(index, ops.rms_norm(x, layer.post_norm, eps), batch)
        return self._logits(x[batch.logit_rows])

    def _attention(
        self, index: int, x: Tensor, batch: "StepBatch", kv: "KvCache", cos: Tensor, signed_sin: Tensor
    ) -> Tensor:
        spec, layer = self.spec, self.weights.layers[index]
        qkv = layer.qkv(x)
        add_lora_(qkv, x, batch.adapters, batch, layer=index, group="qkv")
        heads = qkv.view(x.shape[0], -1, spec.head_dim)
        num_rotated = spec.num_heads + spec.num_kv_heads
        rotated = heads[:, :num_rotated]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = ops.rms_norm(heads[:, : spec.num_heads], layer.q_norm, spec.rms_norm_eps)
            k = ops.rms_norm(heads[:, spec.num_heads : num_rotated], layer.k_norm, spec.rms_norm_eps)
            rotated = torch.cat((q, k), 1)
        rotated = ops.rope(rotated, cos, signed_sin)
        keys, values = kv.layer(index)
        ops.kv_write_(keys, rotated[:, spec.num_heads :], batch.slot_mapping)
        ops.kv_write_(values, heads[:, num_rotated:], batch.slot_mapping)
        attended = ops.paged_attention(
            rotated[:, : spec.num_heads],
            keys,
            values,
            plan=batch.attention,
            scale=spec.head_dim**-0.5,
            window=spec.windows[index],
        ).reshape(x.shape[0], -1)
        out = layer.o(attended)
        add_lora_(out, attended, batch.adapters, batch, layer=index, group="o")
        return out

    def _mlp(self, index: int, x: Tensor, batch: "StepBatch") -> Tensor:
        layer = self.weights.layers[index]
        gate_up = layer.gate_up(x)
        add_lora_(gate_up, x, batch.adapters, batch, layer=index, group="gate_up")
        hidden = ops.silu_mul(gate_up)
        out = layer.down(hidden)
        add_lora_(out, hidden, batch.adapters, batch, layer=index, group="down")
        return out

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(ops.rms_norm(x, self.weights.norm, self.spec.rms_norm_eps), self.weights.lm_head).float()


def add_lora_(
    y: Tensor, x: Tensor, adapters: "Sequence[Adapter]", batch: "StepBatch", *, layer: int, group: str
) -> None:
    """Add every row's own adapter's share of one group of linears to `y`, in place; free when no row has an adapter."""
    if batch.segments:
        ops.lora_add_(y, x, segments=batch.segments, groups=[adapter.groups[layer][group] for adapter in adapters])
