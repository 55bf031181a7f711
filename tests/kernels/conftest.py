"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    """The device whose tensors the Triton kernels take here; `tests/conftest.py` turns the interpreter on."""
    return "cuda" if torch.cuda.is_available() else "cpu"
