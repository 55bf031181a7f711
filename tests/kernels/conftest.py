"""Where the kernels run: C compiled once for all tests, Triton on the GPU if there is one, else in its interpreter."""

import platform
from pathlib import Path

import pytest
import torch

import kernels.native
from configs import env
from kernels.native import Native, cpu_flags, load


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


@pytest.fixture(scope="session")
def avx2_native(native: Native, tmp_path_factory: pytest.TempPathFactory) -> Native:
    """The library that a processor with AVX2, but without AVX-512 and bfloat16 products, compiles for itself."""
    if platform.machine() != "x86_64" or " avx2 " not in cpu_flags():
        pytest.skip("not a processor with AVX2")
    with pytest.MonkeyPatch.context() as patch:
        flags = ["-march=x86-64-v3" if flag == "-march=native" else flag for flag in kernels.native.FLAGS]
        patch.setattr(kernels.native, "FLAGS", tuple(flags))
        library = load(Path(tmp_path_factory.mktemp("avx2")))
    assert library is not None and not library.has_bf16_dot
    return library


@pytest.fixture(params=["native", "avx2"])
def any_native(request: pytest.FixtureRequest) -> Native:
    """The library as it is compiled here, and as it is compiled on a lesser processor."""
    library: Native = request.getfixturevalue("native" if request.param == "native" else "avx2_native")
    return library
