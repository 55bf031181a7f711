"""The LoRA op against its token-by-token oracle: adapter popularity, module subsets, mixed ranks, dtypes."""

from itertools import accumulate

import pytest
import torch

from kernels import reference
from kernels.lora import MODULES, LoraPool, lora_add_
from kernels.segments import BASE_ROW, build_step

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
CPU = torch.device("cpu")
NUM_LAYERS, LAYER, IN_SIZE = 2, 1, 13
SIZES = {"q_proj": 6, "k_proj": 3, "v_proj": 5, "o_proj": 7, "gate_proj": 4, "up_proj": 8, "down_proj": 9}
GROUPS = {"qkv": range(0, 3), "o": range(3, 4), "gate_up": range(4, 6), "down": range(6, 7)}
# Ranks by adapter row and module; row 3 has no LoRA at all, row 4 is no adapter's.
RANKS = [[2, 0, 3, 1, 1, 2, 4], [0, 5, 0, 0, 0, 3, 0], [1, 1, 1, 8, 2, 0, 1], [0] * 7, [0] * 7]
POPULARITY = {
    "none": [],
    "base only": [(BASE_ROW, 6)],
    "one": [(0, 7)],
    "distinct": [(row, 1) for row in range(4)],
    "uniform": [(0, 2), (1, 2), (2, 2), (3, 2)],
    "zipf with base": [(BASE_ROW, 3), (2, 9), (0, 4), (3, 1), (BASE_ROW, 2)],
}


def random_pool(dtype: torch.dtype) -> LoraPool:
    """Return adapters of `RANKS`, their modules scattered over the buffer in another order than the table's."""
    generator = torch.Generator().manual_seed(3)
    table = torch.zeros(len(RANKS), NUM_LAYERS, len(MODULES), 3, dtype=torch.int64)
    parts: list[torch.Tensor] = []
    end = 5
    for row in reversed(range(len(RANKS))):
        for module, name in enumerate(MODULES):
            rank = RANKS[row][module]
            a = torch.randn(rank, IN_SIZE, generator=generator) / IN_SIZE**0.5
            b = torch.randn(rank, SIZES[name], generator=generator)
            if rank:
                table[row, LAYER, module] = torch.tensor([end, end + a.numel(), rank])
            parts += [a.flatten(), b.flatten()]
            end += a.numel() + b.numel()
    data = torch.cat([torch.full((5,), float("nan")), *parts]).to(dtype)
    return LoraPool(data, table, table)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("group", GROUPS)
def test_lora_add(group: str, popularity: str, dtypes: tuple[str, str]) -> None:
    """The model's dtype and the adapters' dtype, which may be wider."""
    dtype, adapter_dtype = (getattr(torch, name) for name in dtypes)
    runs, modules = POPULARITY[popularity], GROUPS[group]
    out_bounds = (0, *accumulate(SIZES[MODULES[module]] for module in modules))
    num_tokens = sum(count for _, count in runs)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, IN_SIZE, generator=generator).to(dtype)
    y = torch.randn(num_tokens, out_bounds[-1], generator=generator).to(dtype)
    call = {
        "pool": random_pool(adapter_dtype),
        "step": build_step(runs, device=CPU),
        "layer": LAYER,
        "modules": modules,
        "out_bounds": out_bounds,
    }
    expected = reference.lora_add(y, x, **call)
    before = y.clone()
    lora_add_(y, x, **call)
    torch.testing.assert_close(y.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for token, adapter_row in enumerate(call["step"].adapter_rows.tolist()):
        for module, start, end in zip(modules, out_bounds, out_bounds[1:], strict=False):
            if adapter_row == BASE_ROW or not RANKS[adapter_row][module]:
                assert torch.equal(y[token, start:end], before[token, start:end])


def test_a_layer_without_lora_stays_as_it_is() -> None:
    x, y = torch.ones(2, IN_SIZE), torch.ones(2, SIZES["o_proj"])
    step = build_step([(0, 2)], device=CPU)
    lora_add_(y, x, pool=random_pool(torch.float32), step=step, layer=0, modules=range(3, 4), out_bounds=(0, 7))
    assert torch.equal(y, torch.ones_like(y))
