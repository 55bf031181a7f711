"""One adapter as one buffer: all its A and B at true rank, layer by layer, in the layout of `kernels.lora`.

    layer 0                                                            layer 1 ...
    A of q, k, v | B of q | B of k | B of v | A of o | B of o | ...

A rows of linears that read the same input are neighbours, so that one product shrinks all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.lora import MODULES
from serve_apps.engine.architecture import GROUPS


@dataclass(frozen=True)
class LoraWeights:
    """One adapted linear: A [rank, in], B [out, rank], and the factor on B A."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class PackedAdapter:
    """data: flat [W] on the CPU; table: int64 [layers, 7, 3], offsets into data and ranks.

    Layer i's weights end at `layer_ends[i]`, so that they can be copied one layer at a time. `digest` is the name that
    the adapter goes by; `content_digest` differs whenever the files differ.
    """

    digest: str
    content_digest: str
    data: Tensor
    table: Tensor
    layer_ends: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of A and B, nothing padded."""
        return int(self.data.numel() * self.data.element_size())


def pack(
    digest: str,
    modules: Mapping[tuple[int, str], LoraWeights],
    *,
    content_digest: str,
    num_layers: int,
    dtype: torch.dtype,
    pin: bool,
) -> PackedAdapter:
    """Pack modules, named by (layer, linear), into one buffer of `dtype`, page-locked when `pin`."""
    num_elements = sum(module.a.numel() + module.b.numel() for module in modules.values())
    data = torch.empty(num_elements, dtype=dtype, pin_memory=pin)
    table = torch.zeros(num_layers, len(MODULES), 3, dtype=torch.int64)
    layer_ends: list[int] = []
    end = 0
    for layer in range(num_layers):
        for linears in GROUPS.values():
            present = [
                (MODULES.index(linear), modules[layer, linear]) for linear in linears if (layer, linear) in modules
            ]
            for index, module in present:
                table[layer, index, 0], table[layer, index, 2] = end, module.a.shape[0]
                end = _append(data, end, module.a)
            for index, module in present:
                table[layer, index, 1] = end
                end = _append(data, end, module.b.t(), scaling=module.scaling)
        layer_ends.append(end)
    return PackedAdapter(digest, content_digest, data, table, tuple(layer_ends))


def _append(data: Tensor, start: int, values: Tensor, *, scaling: float | None = None) -> int:
    """Write `values` row by row from `start` on, scaled in fp32 before the cast; return the end."""
    end = start + values.numel()
    data[start:end].view(values.shape).copy_(values if scaling is None else values.float() * scaling)
    return end
