"""Pools of random adapters and the token layouts that the LoRA tests share."""

import torch

from kernels.lora import LoraPool, LoraStep

IN_SIZE, NUM_LAYERS = 40, 2
# Linears computed together: first module, their output sizes.
GROUPS = {"qkv": (0, (24, 8, 8)), "o": (3, (21,)), "gate_up": (4, (33, 33)), "down": (6, (17,))}
# Per adapter the ranks of the seven modules; 0: the adapter leaves the module alone.
RANKS = (
    (2, 2, 2, 2, 2, 2, 2),
    (8, 0, 8, 0, 0, 0, 0),
    (1, 5, 0, 33, 0, 3, 0),
    (0, 0, 0, 0, 0, 0, 0),
    (16, 16, 16, 16, 16, 16, 16),
    (0, 0, 7, 1, 4, 0, 40),
)
# Any order: a CUDA graph's tokens are not sorted by adapter.
POPULARITY = {
    "none": [],
    "base only": [-1] * 6,
    "one": [4] * 7,
    "one token": [2],
    "distinct": [5, 0, 2, 1, 4, 3],
    "uniform": [0, 1, 2, 3, 4, 5] * 4,
    "zipf with base": [0] * 20 + [-1, 1, 4, 1, -1, 2, 1, 4, 1] + [0] * 3 + [1, 5, -1, 2],
    "long segment": [-1] + [4] * 37 + [2, 2, 2, 2, 2],
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Normal numbers that are the same for the same arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def random_pool(
    *, dtype: torch.dtype, device: str, ranks: tuple[tuple[int, ...], ...] = RANKS, in_size: int = IN_SIZE
) -> LoraPool:
    """Adapters packed one after the other at true rank, after a gap of NaN that nobody may read."""
    table = torch.zeros(len(ranks), NUM_LAYERS, 7, 3, dtype=torch.int64)
    pieces = [torch.full((5,), float("nan"))]
    end = 5
    widths = {first + index: size for first, sizes in GROUPS.values() for index, size in enumerate(sizes)}
    for adapter_row, module_ranks in enumerate(ranks):
        for layer in range(NUM_LAYERS):
            for module, rank in enumerate(module_ranks):
                offsets = []
                for side, size in enumerate((in_size, widths[module])):
                    seed = 1000 * adapter_row + 100 * layer + 10 * module + side
                    values = random(rank * size, seed=seed) / (in_size**0.5 if side == 0 else 2)
                    pieces.append(values)
                    offsets.append(end if rank else 10**12)
                    end += rank * size
                table[adapter_row, layer, module] = torch.tensor([*offsets, rank])
    data = torch.cat(pieces).to(device, dtype)
    return LoraPool(data, table.to(device), table)


def step_of(adapter_rows: list[int], device: str) -> LoraStep:
    """A step with tokens in the order given; its segments are in layout order, as the CPU wants them."""
    segments = []
    for token, row in enumerate(adapter_rows):
        if row >= 0 and segments and segments[-1][0] == row and segments[-1][2] == token:
            segments[-1][2] = token + 1
        elif row >= 0:
            segments.append([row, token, token + 1])
    rows = torch.tensor(adapter_rows, dtype=torch.int32, device=device)
    return LoraStep(rows, torch.tensor(segments, dtype=torch.int32).view(-1, 3))
