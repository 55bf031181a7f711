"""Where the kernels run: C compiled once for all tests, Triton on the GPU if there is one, else in its interpreter."""

import pytest
import torch

from configs import env
from kernels.native import Native, load


@pytest.fixture
def device() -> str:
    """The device whose tensors the Triton kernels take here; `tests/conftest.py` turns the interpreter on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def native() -> Native:
    """The library in the user's cache, as the engine opens it; a machine without a compiler skips what needs it."""
    library = load(env.cache_home())
    if library is None:
        pytest.skip("no C compiler here")
    return library
