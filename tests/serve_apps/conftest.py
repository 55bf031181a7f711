"""A trail with the tiny base and its adapters published."""

from pathlib import Path

import pytest

from attribution.trail import Trail
from serve_apps.gateway import Base
from tests.serve_apps.published import Published, add_base, publish


@pytest.fixture(scope="session")
def published(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Published:
    trail = Trail.open(tmp_path_factory.mktemp("gateway") / "home")
    base_digest = add_base(trail, tiny_base, name="tiny")
    digests = {name: publish(trail, name, path, base_digest=base_digest) for name, path in tiny_adapters.items()}
    base = Base(str(trail.store.get_directory(base_digest)), base_digest, "tiny")
    return Published(trail, base, digests)
