"""One example log for all exports, and a copy of its home for whoever changes it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from attribution.signed_models import sign
from attribution.trail import Trail
from tests.attribution.records_example import ExampleLog, build_example_log, digest_of


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> ExampleLog:
    """Ten contributors, a refinement, a base, facts@1 with a benchmark and a model signature. Not to be changed."""
    folder = tmp_path_factory.mktemp("example")
    log = build_example_log(Trail.open(folder / "home"), folder / "scratch")
    assert sign(log.trail, digest_of(log.adapter))
    return log


@pytest.fixture
def copy(example: ExampleLog, tmp_path: Path) -> Callable[[], Trail]:
    """Opens a copy of the example's home, anew at each call."""
    home = tmp_path / "copy"
    shutil.copytree(example.trail.home, home)
    return lambda: Trail.open(home, create=False)
