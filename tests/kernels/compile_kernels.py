"""Compiles every kernel for one NVIDIA architecture, on any machine, by the calls that launch them; nothing runs.

    python compile_kernels.py [CAPABILITY]          90: Hopper

The interpreter accepts more than the compiler does, so this shows, without a GPU, that the kernels are programs.
Prints one JSON line per compilation: kernel, bytes of shared memory, 16-byte loads.
"""

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels import kv_write, lora_gradient, lora_shrink, paged_attention, rms_norm, rope, sampling, silu_mul
from kernels.lora import LoraPool, LoraStep
from kernels.lora_triton import lora_add_triton_

BF16 = torch.bfloat16


class NoDevice:
    """Stands for a driver; knows what to compile for, and cannot launch."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(launch: Any) -> Any:
    """Turn a launch into a compilation."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        loads = kernel.asm["ptx"].count("ld.global.v4") + kernel.asm["ptx"].count("cp.async.cg")
        print(json.dumps({"kernel": self.__name__, "shared": kernel.metadata.shared, "wide_loads": loads}), flush=True)

    return run


def launch_all() -> None:
    """Call every public function once at the shapes of an 8B model, in bf16, and LoRA once more with fp32 weights."""
    x, index = torch.zeros(4, 4096, dtype=BF16), torch.zeros(4, dtype=torch.int64)
    rms_norm.rms_norm(x, x[0], 1e-5)
    rms_norm.add_rms_norm_(x, x.clone(), x[0], 1e-5)
    silu_mul.silu_mul(x)
    cache = torch.zeros(64, 8, 128, dtype=BF16)
    kv_write.kv_write_(cache, cache[:4], index)
    for norm in (None, x[0, :128]):
        rope.rope_kv_write_(
            torch.zeros(4, 48 * 128, dtype=BF16),
            cache,
            cache.clone(),
            cos_PD=cache[0],
            signed_sin_PD=cache[0],
            positions_T=index,
            slot_mapping_T=index,
            num_heads=32,
            q_norm=norm,
            k_norm=norm,
        )
    zero = torch.zeros(4)
    sampling.sample(
        torch.zeros(4, 32_000),
        temperature=zero,
        top_k=zero.int(),
        top_p=zero.double(),
        min_p=zero,
        points=zero.double(),
    )
    whole = torch.zeros(5, dtype=torch.int32)
    batch = paged_attention.PagedBatch(torch.zeros(4, 9, dtype=torch.int32), whole[:4], whole, 16, True, True)
    paged_attention.paged_attention(x.view(4, 32, 128), cache, cache, batch=batch, scale=0.1, window=100)
    for head_dim, dtype in ((64, BF16), (256, BF16), (128, torch.float32)):
        q, cache = torch.zeros(4, 8, head_dim, dtype=dtype), torch.zeros(64, 2, head_dim, dtype=dtype)
        paged_attention.paged_attention(q, cache, cache, batch=batch, scale=0.1)
    for dtype in (BF16, torch.float32):
        short, long = torch.zeros(4, 300, 16, dtype=dtype), torch.zeros(4, 300, 4096, dtype=dtype)
        lora_gradient.lora_gradient_triton(short, long, torch.zeros(4096, 64))
    table = torch.zeros(2, 1, 7, 3, dtype=torch.int64)
    for num_tokens, dtype in ((64, BF16), (4096, BF16), (1, torch.float32)):
        lora_add_triton_(
            torch.zeros(num_tokens, 6144, dtype=BF16),
            torch.zeros(num_tokens, 4096, dtype=BF16),
            pool=LoraPool(torch.zeros(64, dtype=dtype), table, table, alignment=8),
            step=LoraStep(torch.zeros(num_tokens, dtype=torch.int32), torch.zeros(0, 3, dtype=torch.int32)),
            layer=0,
            modules=range(3),
            out_bounds=(0, 4096, 5120, 6144),
        )


if __name__ == "__main__":
    driver.set_active(NoDevice(int(sys.argv[1]) if len(sys.argv) > 1 else 90))
    JITFunction.run = compile_only(JITFunction.run)
    # As on a device: 16-bit operands go to the tensor cores as they are.
    for module in (lora_gradient, lora_shrink, paged_attention):
        module.multiplies_natively = lambda left, right: left.dtype == right.dtype == BF16
    launch_all()
