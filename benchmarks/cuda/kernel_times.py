"""Every kernel but LoRA's at the shapes of Llama-3.1-8B, against its bytes or FLOPs and against torch's own ops.

python -m benchmarks.cuda.kernel_times [--quick] [--check] [--out FILE]

64 tokens stand for a decode step, 2048 for a prefill, in bf16. The roofline is every byte read and written once at the
rate of a copy, or the FLOPs at the rate of a large product, both measured in this run. The peer of paged attention is
torch's scaled_dot_product_attention over keys and values that are gathered first, and again with the gather left out.
Times are medians of CUDA graph replays with cold caches. No floor is asked of these; at toy shapes ours and the peers
are held against each other. The last line is one JSON object.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cuda.device import Rates, graph_time_s, measure_rates
from benchmarks.cuda.random_llama import LLAMA_8B, TOY, Shape
from benchmarks.cuda.report import Figure, Options, run
from kernels import gradients, kv_write, lora_gradient, ops, paged_attention, rms_norm, rope, sampling, silu_mul
from kernels.ops import PagedBatch

EPS, BLOCK_SIZE = 1e-5, 16
MAX_TOY_DIFFERENCE = 1e-4
# Temperature, top_k, top_p of the rows that are drawn.
LAWS = {"greedy": (0.0, 0, 1.0), "temperature": (1.0, 0, 1.0), "top_k 40": (1.0, 40, 1.0), "top_p 0.9": (1.0, 0, 0.9)}


@dataclass(frozen=True)
class Case:
    """One launch: ours, what torch would do with the same inputs, and what it must move and compute."""

    name: str
    ours: Callable[[], Tensor]
    peers: dict[str, Callable[[], Tensor]]
    num_bytes: int
    flops: int = 0


def figures(options: Options) -> Iterator[Figure]:
    """Yield the figures."""
    with torch.inference_mode():
        if options.is_toy:
            for case in cases(TOY, (3,), ((3, 1, 21), (2, 5, 12)), dtype=torch.float32, device=options.device):
                yield from differences(case)
            return
        rates = measure_rates()
        yield Figure("copy on the device", rates.copy_bytes_per_s / 1e12, "TB/s")
        attention = ((64, 1, 1024), (64, 1, 4096), (8, 1, 16_384), (1, 2048, 2048), (4, 512, 4096))
        for case in cases(
            LLAMA_8B,
            (64,) if options.is_quick else (64, 2048),
            attention[:1] if options.is_quick else attention,
            dtype=torch.bfloat16,
            device=options.device,
        ):
            yield from timed(case, rates)


def cases(
    shape: Shape,
    tokens: Sequence[int],
    attention: Sequence[tuple[int, int, int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Case]:
    """Yield every case; `attention`: (sequences, new rows of each, tokens of each)."""
    for num_tokens in tokens:
        yield from row_cases(shape, num_tokens, dtype=dtype, device=device)
    yield from sampling_cases(shape, min(tokens), device=device)
    for num_tokens in tokens:
        yield gradient_case(shape, num_tokens, dtype=dtype, device=device)
    for num_sequences, num_rows, context_len in attention:
        yield attention_case(shape, num_sequences, num_rows, context_len, dtype=dtype, device=device)


def row_cases(shape: Shape, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Yield the kernels that go over each token's row."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype, device=device)

    hidden, inner, head_dim = shape.hidden, shape.intermediate, shape.head_dim
    x, residual, weight, gate_up = (
        *(normal(num_tokens, hidden) for _ in range(2)),
        normal(hidden),
        normal(num_tokens, 2 * inner),
    )
    yield Case(
        f"rms_norm, {num_tokens} tokens",
        lambda: rms_norm.rms_norm(x, weight, EPS),
        {"torch": lambda: F.rms_norm(x, (hidden,), weight, EPS)},
        2 * x.nbytes,
    )
    yield Case(
        f"add + rms_norm, {num_tokens} tokens",
        lambda: rms_norm.add_rms_norm_(x, residual, weight, EPS),
        {"torch": lambda: F.rms_norm(residual + x, (hidden,), weight, EPS)},
        4 * x.nbytes,
    )
    yield Case(
        f"silu_mul, {num_tokens} tokens",
        lambda: silu_mul.silu_mul(gate_up),
        {"torch": lambda: F.silu(gate_up[:, :inner]) * gate_up[:, inner:]},
        gate_up.nbytes // 2 * 3,
    )
    cache, other = (normal(2 * num_tokens, shape.kv_heads, head_dim) for _ in range(2))
    new, slots = normal(num_tokens, shape.kv_heads, head_dim), 2 * torch.arange(num_tokens, device=device)
    yield Case(
        f"kv_write, {num_tokens} tokens",
        lambda: written(cache, new, slots),
        {"torch": lambda: cache.index_copy(0, slots, new)},
        2 * new.nbytes,
    )
    num_heads = shape.heads + 2 * shape.kv_heads
    qkv, table = normal(num_tokens, num_heads * head_dim), normal(num_tokens, head_dim // 2).repeat(1, 2)
    positions = torch.arange(num_tokens, device=device)
    signed = torch.cat((-table[:, : head_dim // 2], table[:, head_dim // 2 :]), -1)
    yield Case(
        f"rope + kv_write, {num_tokens} tokens",
        lambda: rope.rope_kv_write_(
            qkv,
            cache,
            other,
            cos_PD=table,
            signed_sin_PD=signed,
            positions_T=positions,
            slot_mapping_T=slots,
            num_heads=shape.heads,
        ),
        {"torch": lambda: rotated(qkv, cache, other, table, signed, slots, num_heads=shape.heads)},
        2 * qkv.nbytes + 2 * table.nbytes,
    )


def gradient_case(shape: Shape, num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> Case:
    """Return 8 examples' gradients of one rank-16 factor whose long side is projected to 64."""
    short = torch.randn(8, num_tokens, 16, dtype=dtype, device=device)
    long = torch.randn(8, num_tokens, shape.hidden, dtype=dtype, device=device) / num_tokens
    # Signs are the same numbers in bf16, to which the kernel rounds the basis.
    basis = torch.randn(shape.hidden, 64, device=device).sign() / 8
    num_bytes = short.nbytes + long.nbytes + basis.nbytes
    flops = 2 * 8 * num_tokens * 64 * (shape.hidden + 16)
    return Case(
        f"lora_gradient, 8 x {num_tokens} tokens",
        lambda: lora_gradient.lora_gradient_triton(short, long, basis),
        {"torch": lambda: gradients.lora_gradient_torch(short, long, basis)},
        num_bytes,
        flops,
    )


def written(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """Write by the kernel; return the cache."""
    kv_write.kv_write_(cache, new, slots)
    return cache


def rotated(
    qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, signed_sin: Tensor, slots: Tensor, *, num_heads: int
) -> Tensor:
    """Rotate and write by torch's ops; return the queries."""
    heads = qkv.view(len(qkv), -1, cos.shape[-1])
    num_rotated = num_heads + keys.shape[1]
    turned = ops.rope(heads[:, :num_rotated], cos, signed_sin)
    keys.index_copy_(0, slots, turned[:, num_heads:])
    values.index_copy_(0, slots, heads[:, num_rotated:])
    return turned[:, :num_heads]


def sampling_cases(shape: Shape, num_rows: int, *, device: torch.device) -> Iterator[Case]:
    """Yield the draw of one token per row; torch has none that draws the same token."""
    logits = torch.randn(num_rows, shape.vocabulary, device=device) * 3
    for law, (temperature, top_k, top_p) in LAWS.items():
        knobs = {
            "temperature": torch.full((num_rows,), temperature, device=device),
            "top_k": torch.full((num_rows,), top_k, dtype=torch.int32, device=device),
            "top_p": torch.full((num_rows,), top_p, dtype=torch.float64, device=device),
            "min_p": torch.zeros(num_rows, device=device),
            "points": torch.linspace(0, 0.99, num_rows, dtype=torch.float64, device=device),
        }
        peers = {"torch": lambda: logits.argmax(-1)} if law == "greedy" else {}
        yield Case(
            f"sampling, {law}, {num_rows} rows",
            lambda knobs=knobs: sampling.sample(logits, **knobs),  # type: ignore[misc]
            peers,
            logits.nbytes,
        )


def attention_case(
    shape: Shape, num_sequences: int, num_rows: int, context_len: int, *, dtype: torch.dtype, device: torch.device
) -> Case:
    """Return paged attention over blocks in random order, and torch's with and without gathering them."""
    num_blocks = -(-context_len // BLOCK_SIZE)
    tables = torch.randperm(num_sequences * num_blocks, device=device).view(num_sequences, -1).int()
    keys, values = (
        torch.randn(num_sequences * num_blocks * BLOCK_SIZE, shape.kv_heads, shape.head_dim, dtype=dtype, device=device)
        for _ in range(2)
    )
    q = torch.randn(num_sequences * num_rows, shape.heads, shape.head_dim, dtype=dtype, device=device)
    batch = PagedBatch(
        tables,
        torch.full((num_sequences,), context_len, dtype=torch.int32, device=device),
        torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * num_rows,
        BLOCK_SIZE,
        has_decode=num_rows == 1,
        has_chunks=num_rows > 1,
    )
    scale = shape.head_dim**-0.5
    place = torch.arange(context_len, device=device)
    slots = (tables.long()[:, place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE).flatten()

    def gathered() -> tuple[Tensor, Tensor]:
        shaped = (num_sequences, context_len, shape.kv_heads, shape.head_dim)
        return keys[slots].view(shaped).transpose(1, 2), values[slots].view(shaped).transpose(1, 2)

    mask = None
    if 1 < num_rows < context_len:
        mask = place[None, :] <= torch.arange(context_len - num_rows, context_len, device=device)[:, None]
    queries = q.view(num_sequences, num_rows, shape.heads, shape.head_dim).transpose(1, 2)

    def attend(together: tuple[Tensor, Tensor]) -> Tensor:
        out = F.scaled_dot_product_attention(
            queries, *together, attn_mask=mask, is_causal=num_rows == context_len, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(q.shape)

    together = gathered()
    num_pairs = num_sequences * sum(range(context_len - num_rows + 1, context_len + 1))
    return Case(
        f"paged_attention, {num_sequences} x {num_rows} rows of {context_len}",
        lambda: paged_attention.paged_attention(q, keys, values, batch=batch, scale=scale),
        {"gather + torch": lambda: attend(gathered()), "torch, gathered before": lambda: attend(together)},
        2 * keys.nbytes + 2 * q.nbytes,
        4 * num_pairs * shape.heads * shape.head_dim,
    )


def differences(case: Case) -> Iterator[Figure]:
    """Hold ours against the peers; those go first, for ours may write over its inputs."""
    expected = {name: peer().clone() for name, peer in case.peers.items()}
    actual = case.ours()
    for name, each in expected.items():
        worst = float((actual.float() - each.float()).abs().max())
        yield Figure(f"{case.name}: difference", worst, f"max |ours - {name}|", MAX_TOY_DIFFERENCE, is_ceiling=True)


def timed(case: Case, rates: Rates) -> Iterator[Figure]:
    """Time ours against the roofline and the peers."""
    ours_s = graph_time_s(case.ours)
    yield Figure(case.name, ours_s * 1e6, "us")
    yield Figure(f"{case.name}: of the roofline", rates.floor_s(case.num_bytes, case.flops) / ours_s, "ratio")
    for name, peer in case.peers.items():
        yield Figure(f"{case.name}: {name} / ours", graph_time_s(peer) / ours_s, "ratio")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    return run(__doc__ or "", figures, arguments, peer=f"torch {torch.__version__}")


if __name__ == "__main__":
    sys.exit(main())
