"""Own forward of the Llama family: Llama (SmolLM too), Mistral, Qwen2, Qwen3, weights straight from safetensors.

q/k/v and gate/up are packed, so that each input is read once. Shape letters as in `kernels.ops`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops
from kernels.linear_cpu import PackedWeight, linear
from kernels.lora import MODULES, lora_add_
from kernels.native import Native
from serve_apps.engine.architecture import GROUPS, ModelSpec
from serve_apps.engine.cpu_forward import CpuForward

if TYPE_CHECKING:
    from serve_apps.engine.batch import StepBatch
    from serve_apps.engine.cuda_forward import CudaForward
    from serve_apps.engine.kv_cache import KvCache

# Per group of linears: where they stand in `kernels.lora.MODULES`, and the bounds of their outputs.
LoraPlaces = Mapping[str, tuple[range, tuple[int, ...]]]


@dataclass(frozen=True)
class Linear:
    """y = x weight + bias; weight [I, O] in whichever memory order the device multiplies fastest, bias [O] or None."""

    weight_IO: Tensor | PackedWeight
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.weight_IO, PackedWeight):
            return linear(x, self.weight_IO, self.bias)
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
    """All weights of a model; `lm_head` is `embedding` itself when they are tied.

    Linears and `lm_head` (so a tied embedding too) are packed where the forward runs on the C kernels of the CPU.
    """

    embedding: Tensor | PackedWeight
    layers: tuple[Layer, ...]
    norm: Tensor
    lm_head: Tensor | PackedWeight


class Model:
    """The forward pass over one step's tokens."""

    def __init__(self, spec: ModelSpec, weights: Weights, *, max_positions: int, native: Native | None = None) -> None:
        """Own `weights` and tabulate RoPE for positions 0..max_positions-1 (in fp32, then in the model's dtype).

        The long frequencies' rows, where the model has some, follow from `max_positions` on.
        With `native` the weights are packed and its kernels compute the whole forward.
        """
        self.spec = spec
        self.weights = weights
        self._lora_groups = {group: _lora_group(spec, linears) for group, linears in GROUPS.items()}
        dtype, device = weights.embedding.dtype, weights.embedding.device
        sets = (spec.inverse_frequencies, spec.long_inverse_frequencies)
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.cat([torch.outer(positions, frequencies) for frequencies in sets if frequencies is not None])
        cos, sin = angles.cos() * spec.rope_scaling, angles.sin() * spec.rope_scaling
        self._cos = torch.cat((cos, cos), -1).to(device, dtype)
        self._signed_sin = torch.cat((-sin, sin), -1).to(device, dtype)
        self._cpu_forward: CpuForward | None = None
        if native is not None:
            self._cpu_forward = CpuForward(spec, weights, native=native, cos_PD=cos, sin_PD=sin)
        self.cuda_forward: CudaForward | None = None
        if device.type == "cuda":
            self.cuda_forward = self.build_cuda_forward()

    def build_cuda_forward(self) -> "CudaForward":
        """Return the forward over the Triton kernels, which are loaded now."""
        from serve_apps.engine.cuda_forward import CudaForward

        return CudaForward(self.spec, self.weights, self._lora_groups, self._cos, self._signed_sin)

    def forward(self, batch: "StepBatch", kv: "KvCache") -> Tensor:
        """Return fp32 logits [rows asked for, vocabulary]; writes the step's keys and values into `kv`."""
        if self._cpu_forward is not None:
            return self._cpu_forward(batch, kv)
        if self.cuda_forward is not None:
            return self.cuda_forward(batch, kv)
        eps = self.spec.rms_norm_eps
        cos, signed_sin = self._cos[batch.positions], self._signed_sin[batch.positions]
        x = F.embedding(batch.token_ids, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            for copies in batch.lora_copies:
                copies.wait(index)
            attended = self._attention(index, ops.rms_norm(x, layer.input_norm, eps), batch, kv, cos, signed_sin)
            x = x + attended
            x = x + self._mlp(index, ops.rms_norm(x, layer.post_norm, eps), batch)
        return self._logits(x[batch.logit_rows])

    def _attention(
        self, index: int, x: Tensor, batch: "StepBatch", kv: "KvCache", cos: Tensor, signed_sin: Tensor
    ) -> Tensor:
        spec, layer = self.spec, self.weights.layers[index]
        qkv = layer.qkv(x)
        self._add_lora_(qkv, x, batch, layer=index, group="qkv")
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
        self._add_lora_(out, attended, batch, layer=index, group="o")
        return out

    def _mlp(self, index: int, x: Tensor, batch: "StepBatch") -> Tensor:
        layer = self.weights.layers[index]
        gate_up = layer.gate_up(x)
        self._add_lora_(gate_up, x, batch, layer=index, group="gate_up")
        hidden = ops.silu_mul(gate_up)
        out = layer.down(hidden)
        self._add_lora_(out, hidden, batch, layer=index, group="down")
        return out

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(ops.rms_norm(x, self.weights.norm, self.spec.rms_norm_eps), self.weights.lm_head).float()

    def _add_lora_(self, y: Tensor, x: Tensor, batch: "StepBatch", *, layer: int, group: str) -> None:
        """Add every row's own adapter's share of one group of linears to `y`, in place; free for the base alone."""
        if len(batch.lora.segments):
            modules, out_bounds = self._lora_groups[group]
            lora_add_(y, x, pool=batch.lora_pool, step=batch.lora, layer=layer, modules=modules, out_bounds=out_bounds)


def _lora_group(spec: ModelSpec, linears: tuple[str, ...]) -> tuple[range, tuple[int, ...]]:
    """Return where linears packed side by side stand in `kernels.lora.MODULES`, and the bounds of their outputs."""
    first = MODULES.index(linears[0])
    sizes = [spec.linear_shape(linear)[0] for linear in linears]
    return range(first, first + len(linears)), (0, *accumulate(sizes))
