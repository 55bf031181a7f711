"""One planted run, and one home that tells of it, for the folder's tests."""

from pathlib import Path

import pytest

from tests.attribution.influence.planted import Planted, plant
from tests.attribution.influence.planted_home import PlantedHome, furnish


@pytest.fixture(scope="session")
def planted(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tiny_base, tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="session")
def planted_home(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> PlantedHome:
    return furnish(tmp_path_factory.mktemp("planted-home") / "home", planted)
