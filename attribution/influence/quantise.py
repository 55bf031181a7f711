"""Rows of floats as int8 codes: a scale per row and block of columns.

value[i, j] ~ codes[i, j] * scales[i, j // BLOCK] * units[i]. A block's scale is a byte, a row's unit a float32: 1.6 %
on top of the codes. Columns come by falling energy, so that a block's values are alike in size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.gradients import BLOCK

LARGEST_CODE, LARGEST_SCALE = 127, 255
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Quantised:
    """codes int8 [n, d], scales uint8 [n, d / BLOCK], units float32 [n]."""

    codes: NDArray[np.int8]
    scales: NDArray[np.uint8]
    units: NDArray[np.float32]

    def values(self) -> NDArray[np.float32]:
        """Return float32 [n, d]."""
        blocks = self.codes.reshape(len(self.codes), -1, BLOCK).astype(np.float32)
        blocks *= (self.scales * self.units[:, None])[:, :, None]
        return blocks.reshape(self.codes.shape)

    def take(self, rows: NDArray[np.int64]) -> "Quantised":
        """Return some rows."""
        return Quantised(self.codes[rows], self.scales[rows], self.units[rows])

    def lengths(self) -> NDArray[np.float32]:
        """Return float32 [n]: the Euclidean length of each row's `values`."""
        blocks = self.codes.reshape(len(self.codes), -1, BLOCK).astype(np.float32)
        squares = np.einsum("nbk,nbk->nb", blocks, blocks)
        return np.sqrt((squares * np.square(self.scales, dtype=np.float32)).sum(axis=1)) * self.units


def quantise(rows: NDArray[np.float32]) -> Quantised:
    """Return the codes of rows [n, d], d a multiple of BLOCK. Raises ValueError for a value that is not finite."""
    if not np.isfinite(rows).all():
        row = int(np.argmax(~np.isfinite(rows).all(axis=1)))
        raise ValueError(f"row {row} holds a value that is not finite")
    blocks = rows.reshape(len(rows), -1, BLOCK)
    largest = torch.from_numpy(blocks).abs().amax(dim=2).numpy()  # a third of NumPy's time
    units = (largest.max(axis=1, initial=0) / (LARGEST_CODE * LARGEST_SCALE)).astype(np.float32)
    units = np.maximum(units, TINY)
    # Rounded up, so that no code passes 127; a row's largest block has the scale 255.
    scales = np.clip(np.ceil(largest / (LARGEST_CODE * units[:, None])), 1, LARGEST_SCALE)
    codes = blocks / (scales * units[:, None])[:, :, None]
    np.clip(np.rint(codes, out=codes), -LARGEST_CODE, LARGEST_CODE, out=codes)
    return Quantised(codes.reshape(rows.shape).astype(np.int8), scales.astype(np.uint8), units)
