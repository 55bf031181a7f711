"""Lays one step's sequences into the flat tensors that the forward reads.

rows       0    1    2 | 3 | 4 | 5    6        one sequence after the other, equal adapters next to each other
token_ids  a0   a1   a2  b7  c4  d3   d4
positions  0    1    2   7   4   3    4
runs       [0, 3)      [3,4) [4,5) [5, 7)      attention; a sequence's newest tokens
logit_rows           2   3   4        6        last row of each sequence whose next token can be chosen
"""

from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from kernels.devices import to_device
from kernels.lora import LoraPool, LoraStep
from kernels.ops import AttentionPlan, AttentionRun, PagedBatch
from kernels.segments import BASE_ROW, build_step
from serve_apps.engine.lora_memory import LayerCopies
from serve_apps.engine.scheduler import Scheduled
from serve_apps.engine.sequence import Sequence


@dataclass(frozen=True)
class StepBatch:
    """One step. token_ids, positions, slot_mapping: int64 [T]; logit_rows: int64 [sequences that get a token]."""

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    logit_rows: Tensor
    attention: AttentionPlan
    lora_pool: LoraPool
    lora: LoraStep
    lora_copies: tuple[LayerCopies, ...]


def build_batch(
    plan: list[Scheduled],
    *,
    lora_pool: LoraPool,
    block_size: int,
    device: torch.device,
    is_paged: bool = False,
    long_positions: int = 0,
) -> StepBatch:
    """Lay out `plan`, which is sorted by adapter; `lora_pool` holds the weights that its leases name.

    `is_paged` gives the block tables that the Triton kernels read, in place of the runs that the CPU reads.
    `long_positions`: where in the RoPE table the positions of sequences with `is_long` begin.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slot_mapping: list[int] = []
    logit_rows: list[int] = []
    runs: list[AttentionRun] = []
    adapter_runs: list[tuple[int, int]] = []
    for item in plan:
        sequence, row_start = item.sequence, len(token_ids)
        context_len = sequence.num_computed + item.num_tokens
        token_ids += sequence.token_ids[sequence.num_computed : context_len]
        first = long_positions if sequence.is_long else 0
        positions += range(first + sequence.num_computed, first + context_len)
        slot_mapping += _slots(sequence, sequence.num_computed, context_len, block_size)
        if not is_paged:
            runs.append(_attention_run(sequence, item.num_tokens, row_start, block_size=block_size, device=device))
        adapter_runs.append((BASE_ROW if sequence.lease is None else sequence.lease.adapter_row, item.num_tokens))
        if item.gives_token:
            logit_rows.append(len(token_ids) - 1)
    # One copy to the device for the three.
    per_token = to_device(torch.tensor([token_ids, positions, slot_mapping], dtype=torch.int64), device)
    return StepBatch(
        token_ids=per_token[0],
        positions=per_token[1],
        slot_mapping=per_token[2],
        logit_rows=to_device(torch.tensor(logit_rows, dtype=torch.int64), device),
        attention=AttentionPlan(
            tuple(runs), paged=_paged(plan, block_size=block_size, device=device) if is_paged else None
        ),
        lora_pool=lora_pool,
        lora_copies=_copies(plan),
        lora=build_step(adapter_runs, device=device),
    )


def _paged(plan: list[Scheduled], *, block_size: int, device: torch.device) -> PagedBatch:
    """Return block tables, context lengths and first rows, in one copy to the device."""
    width = max(len(item.sequence.blocks) for item in plan)
    tables = [[*item.sequence.blocks, *[0] * (width - len(item.sequence.blocks))] for item in plan]
    lengths = [item.sequence.num_computed + item.num_tokens for item in plan]
    starts = [0, *accumulate(item.num_tokens for item in plan)]
    packed = to_device(torch.tensor([*chain(*tables), *lengths, *starts], dtype=torch.int32), device)
    table_TB, context_lens, row_starts = packed.split([len(plan) * width, len(plan), len(plan) + 1])
    return PagedBatch(
        block_tables=table_TB.view(len(plan), width),
        context_lens=context_lens,
        row_starts=row_starts,
        block_size=block_size,
        has_decode=any(item.num_tokens == 1 for item in plan),
        has_chunks=any(item.num_tokens > 1 for item in plan),
    )


def _copies(plan: list[Scheduled]) -> tuple[LayerCopies, ...]:
    """Return the copies that the step's adapters are still waiting for; none on the CPU."""
    leases = {lease.digest: lease for item in plan if (lease := item.sequence.lease) is not None}
    return tuple(copies for lease in leases.values() if (copies := lease.copies) is not None)


def _slots(sequence: Sequence, start: int, end: int, block_size: int) -> list[int]:
    """Return the KV slots of positions [start, end)."""
    blocks = sequence.blocks
    return [blocks[position // block_size] * block_size + position % block_size for position in range(start, end)]


def _attention_run(
    sequence: Sequence, num_rows: int, row_start: int, *, block_size: int, device: torch.device
) -> AttentionRun:
    """Describe where a sequence's keys lie: as one run of slots where its blocks are neighbours, else as a list."""
    context_len = sequence.num_computed + num_rows
    blocks = sequence.blocks[: -(-context_len // block_size)]
    slots = None
    if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
        slots = torch.tensor(_slots(sequence, 0, context_len, block_size), dtype=torch.int64, device=device)
    return AttentionRun(row_start, num_rows, context_len, blocks[0] * block_size, slots)
