"""The C kernels, compiled once for all tests; a machine without a compiler skips what needs them."""

import pytest

from configs import env
from kernels.native import Native, load


@pytest.fixture(scope="session")
def native() -> Native:
    """The library in the user's cache, as the engine opens it."""
    library = load(env.cache_home())
    if library is None:
        pytest.skip("no C compiler here")
    return library
