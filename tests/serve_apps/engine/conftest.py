"""Adapters strong enough to change every answer, and the oracle over them."""

from pathlib import Path

import pytest

from tests.serve_apps.engine.engine_cases import Oracle
from tests.tiny_model import LINEAR_MODULES, build_tiny_adapter

STRONG = {
    "strong-r1-qv": (1, 11, ("q_proj", "v_proj")),
    "strong-r2-mlp": (2, 12, ("gate_proj", "up_proj", "down_proj")),
    "strong-r8-all": (8, 13, LINEAR_MODULES),
    "strong-r3-some": (3, 14, ("k_proj", "o_proj", "up_proj")),
}


@pytest.fixture(scope="session")
def strong_adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of odd ranks and module subsets, B of scale 1.5, by name."""
    folder = tmp_path_factory.mktemp("strong")
    return {
        name: build_tiny_adapter(tiny_base, folder / name, rank=rank, seed=seed, target_modules=modules, scale=1.5)
        for name, (rank, seed, modules) in STRONG.items()
    }


@pytest.fixture(scope="session")
def oracle(tiny_base: Path) -> Oracle:
    """transformers and PEFT over the tiny base."""
    return Oracle(tiny_base)
