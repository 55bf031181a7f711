"""Every kernel but LoRA's against its plain oracle, on whatever device is here.

python -m benchmarks.cuda.kernel_checks [--check] [--out FILE]
"""

import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.cuda.report import Figure, Options, run
from kernels import kv_write, lora_gradient, paged_attention, reference, rms_norm, rope, sampling, silu_mul
from kernels.ops import AttentionRun, PagedBatch

MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
BLOCK_SIZE = 16
# Per sequence: tokens in all, new rows.
MIX = ((40, 1), (33, 33), (17, 1), (90, 50))


def figures(options: Options) -> Iterator[Figure]:
    """Yield the worst difference of each kernel in fp32 and bf16, and the share of tokens drawn alike."""
    for dtype, limit in MAX_DIFFERENCE.items():
        for name, (actual, expected) in pairs(options.device, dtype):
            worst = float((actual.float().cpu() - expected.float().cpu()).abs().max())
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield Figure(label, worst, "max |kernel - oracle|", limit, is_ceiling=True)
    yield Figure("sampling", same_draws(options.device), "of draws alike", 1.0)


def pairs(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield (kernel, (its result, the oracle's))."""
    x, weight = normal(5, 96, dtype=dtype, device=device), normal(96, dtype=dtype, device=device)
    yield "rms_norm", (rms_norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    residual = normal(5, 96, dtype=dtype, device=device)
    expected = reference.add_rms_norm(x, residual, weight, 1e-5)[1]
    yield "add_rms_norm", (rms_norm.add_rms_norm_(x, residual, weight, 1e-5), expected)
    yield "silu_mul", (silu_mul.silu_mul(x), reference.silu_mul(x))
    cache, new = normal(64, 2, 32, dtype=dtype, device=device), normal(3, 2, 32, dtype=dtype, device=device)
    slots = torch.tensor([60, 0, 31], device=device)
    expected = reference.kv_write(cache, new, slots)
    kv_write.kv_write_(cache, new, slots)
    yield "kv_write", (cache, expected)
    short, long = normal(3, 40, 8, dtype=dtype, device=device), normal(3, 40, 96, dtype=dtype, device=device)
    basis = normal(96, 33, dtype=torch.float32, device=device).sign() / 16
    expected = reference.lora_gradient(short, long, basis)
    yield "lora_gradient", (lora_gradient.lora_gradient_triton(short, long, basis), expected)
    yield "rope", rotated(dtype, device)
    for window in (None, 24):
        yield f"paged_attention, window {window}", attended(dtype, device, window)


def normal(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return random numbers, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def rotated(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return queries rotated by the kernel and by the oracle."""
    angles = normal(16, 16, dtype=torch.float32, device=device) * 10
    cos, sin = (torch.cat((half, half), -1).to(dtype) for half in (angles.cos(), angles.sin()))
    positions = torch.tensor([3, 0, 15], device=device)
    qkv = normal(3, 8 * 32, dtype=dtype, device=device)
    caches = [normal(8, 2, 32, dtype=dtype, device=device) for _ in range(2)]
    actual = rope.rope_kv_write_(
        qkv,
        *caches,
        cos_PD=cos,
        signed_sin_PD=torch.cat((-sin[:, :16], sin[:, 16:]), -1),
        positions_T=positions,
        slot_mapping_T=torch.tensor([1, 7, 2], device=device),
        num_heads=4,
    )
    return actual, reference.rope(qkv.view(3, 8, 32)[:, :4], cos[positions], sin[positions])


def attended(dtype: torch.dtype, device: torch.device, window: int | None) -> tuple[Tensor, Tensor]:
    """Return attention over scattered blocks, decode and chunks in one step."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    runs, tables, starts = [], torch.zeros(len(MIX), 6, dtype=torch.int32), [0]
    for index, (context_len, num_rows) in enumerate(MIX):
        blocks = [order.pop() for _ in range(-(-context_len // BLOCK_SIZE))]
        tables[index, : len(blocks)] = torch.tensor(blocks)
        slots = [blocks[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE for place in range(context_len)]
        runs.append(AttentionRun(starts[-1], num_rows, context_len, 0, torch.tensor(slots)))
        starts.append(starts[-1] + num_rows)
    batch = PagedBatch(
        tables.to(device),
        torch.tensor([context_len for context_len, _ in MIX], dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        BLOCK_SIZE,
        has_decode=True,
        has_chunks=True,
    )
    q = normal(starts[-1], 4, 32, dtype=dtype, device=device)
    keys, values = (normal(256, heads, 32, dtype=dtype, device=device) for heads in (2, 2))
    values = values.flip(0).contiguous()
    actual = paged_attention.paged_attention(q, keys, values, batch=batch, scale=0.2, window=window)
    expected = reference.paged_attention(q.cpu(), keys.cpu(), values.cpu(), runs=runs, scale=0.2, window=window)
    return actual, expected


def same_draws(device: torch.device) -> float:
    """Return the share of rows, those at a border between two tokens left out, that draw the oracle's token."""
    knobs = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 12, 1.0, 0.0), (1.2, 0, 0.7, 0.0), (1.0, 40, 0.9, 0.05)]
    logits = normal(len(knobs), 500, dtype=torch.float32, device=torch.device("cpu")) * 3
    points = [0.1, 0.35, 0.5, 0.75, 0.9]
    columns = [torch.tensor(values, device=device) for values in zip(*knobs, strict=True)]
    tokens = sampling.sample(
        logits.to(device),
        temperature=columns[0],
        top_k=columns[1].int(),
        top_p=columns[2].double(),
        min_p=columns[3],
        points=torch.tensor(points, dtype=torch.float64, device=device),
    ).tolist()
    alike = []
    for row, (temperature, top_k, top_p, min_p) in enumerate(knobs):
        expected, gap = reference.sample(
            logits[row], temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, point=points[row]
        )
        alike += [tokens[row] == expected] if gap > 1e-6 else []
    return sum(alike) / len(alike)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    return run(__doc__ or "", figures, arguments, peer="plain fp32 oracles")


if __name__ == "__main__":
    sys.exit(main())
