"""Tensors out of large pages: aligned, apart from each other, whole."""

from itertools import pairwise

import torch

from kernels.large_pages import CHUNK_BYTES, LINE_BYTES, PAGE_BYTES, LargePages
from kernels.native import Native


def test_tensors_do_not_overlap_and_begin_at_a_line(native: Native) -> None:
    pages = LargePages(native)
    shapes = [(3,), (0, 4), (17, 5), (1,), (CHUNK_BYTES // 8,), (2, 2)]
    tensors = [pages.empty(shape, torch.float32).fill_(index) for index, shape in enumerate(shapes)]
    for index, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape and tensor.is_contiguous() and tensor.data_ptr() % LINE_BYTES == 0
        assert bool((tensor == index).all())
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.nbytes)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_a_chunk_begins_at_a_large_page_and_a_tensor_may_be_larger_than_one(native: Native) -> None:
    tensor = LargePages(native).empty((CHUNK_BYTES + 3,), torch.uint8)
    assert tensor.data_ptr() % PAGE_BYTES == 0 and len(tensor) == CHUNK_BYTES + 3
    tensor[-1] = 7  # the last byte is ours
