"""Fixtures every test may use: a tiny trained base, adapters for it, a fresh trail, a local Ray cluster."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from configs import env

# One thread each: the suite shares its cores with Ray workers, and tiny matrices lose time to thread hand-over.
env.set_variables(
    {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
)

import torch  # noqa: E402, after the thread count is set

# Without a GPU Triton's kernels run in its interpreter. Triton must know when it is first imported, and transformers
# imports it, so it is said here for every test.
if not torch.cuda.is_available():
    env.set_variables({"TRITON_INTERPRET": "1"})

if TYPE_CHECKING:
    from attribution.trail import Trail


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny Llama that knows `tests.tiny_model.QUESTIONS` by heart."""
    from tests.tiny_model import build_tiny_base

    torch.set_num_threads(1)
    return build_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def tiny_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT adapters of `tiny_base` by name: ranks 2, 4 and 8, different modules, A and B both random."""
    from tests.tiny_model import TINY_ADAPTERS, build_tiny_adapter

    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: build_tiny_adapter(tiny_base, folder / name, rank=rank, seed=seed, target_modules=modules)
        for name, (rank, seed, modules) in TINY_ADAPTERS.items()
    }


@pytest.fixture
def trail(tmp_path: Path) -> "Trail":
    """A trail in a fresh home."""
    from attribution.trail import Trail

    return Trail.open(tmp_path / "home")


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local Ray cluster of 4 logical CPUs for the whole session; yields its address, also in RAY_ADDRESS."""
    from cluster.local import private_ray

    with private_ray(num_cpus=4, object_store_mib=100) as address:
        yield address
