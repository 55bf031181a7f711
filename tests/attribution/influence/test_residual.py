"""What a question's row is cleared of: against an explicit ridge inverse, and through changes of the store."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from attribution.influence import gradient_store
from attribution.influence.codec import FactorCodec, GradientCodec
from attribution.influence.gradient_store import GradientStore, GradientStoreError
from attribution.influence.residual import STRENGTH
from kernels.gradients import BLOCK

VIEWS = ("10", "20")
NUM, DIM = 12, 2 * BLOCK


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GradientStore:
    """Twelve examples in shards of five; the first eight agree in much."""
    monkeypatch.setattr(gradient_store, "SHARD_ROWS", 5)
    one = FactorCodec("q.lora_A", torch.eye(1), torch.eye(DIM), torch.ones(1, DIM), torch.arange(DIM))
    codec = GradientCodec("identity", (one,), torch.arange(DIM), 1.0)
    generator = np.random.default_rng(0)
    rows = {view: generator.standard_normal((NUM, DIM)).astype(np.float32) for view in VIEWS}
    for values in rows.values():
        values[:8] += 2 * generator.standard_normal(DIM).astype(np.float32)
    made = GradientStore.create(tmp_path / "store", dict.fromkeys(VIEWS, codec), has_residual=True)
    made.append([f"e{row:02}" for row in range(NUM)], rows, weights=generator.random((NUM, len(VIEWS))))
    return made


def ridge(store: GradientStore, query: np.ndarray) -> np.ndarray:
    """(1 + A^T A / s)^-1 q in float64, with A example by example."""
    summed = []
    for shard in store.shards:
        for row in shard.live.tolist():
            units = [shard.rows(view).values()[row].astype(np.float64) for view in VIEWS]
            parts = zip(shard.weights[row], units, strict=True)
            summed.append(sum(weight * unit / np.linalg.norm(unit) for weight, unit in parts))
    a = np.stack(summed)
    s = STRENGTH * np.square(a).sum(axis=1).mean()
    found: np.ndarray = np.linalg.solve(np.eye(DIM) + a.T @ a / s, query)
    return found


def test_a_row_is_cleared_as_ridge_regression_would(store: GradientStore) -> None:
    query = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    assert store.residual is not None
    np.testing.assert_allclose(store.residual.take_from(query), ridge(store, query), rtol=1e-3, atol=1e-4)
    again = GradientStore(store.path).residual
    assert again is not None and np.array_equal(again.take_from(query), store.residual.take_from(query))


def test_what_was_deleted_is_not_in_it(store: GradientStore) -> None:
    query = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    store.delete(["e03", "e09"], compact=True)
    assert store.residual is not None
    np.testing.assert_allclose(store.residual.take_from(query), ridge(store, query), rtol=1e-3, atol=1e-4)
    store.delete(list(store.ids()))
    assert GradientStore(store.path).residual is None
    assert not list(store.path.glob("residual*"))
    store.append(["e03"], {view: np.ones((1, DIM), np.float32) for view in VIEWS})
    assert store.residual is not None


def test_what_was_added_is_in_it(store: GradientStore) -> None:
    generator = np.random.default_rng(2)
    before = next(store.path.glob("residual*"))
    store.append(["f0", "f1"], {view: generator.standard_normal((2, DIM)).astype(np.float32) for view in VIEWS})
    query = generator.standard_normal(DIM).astype(np.float32)
    assert store.residual is not None and not before.exists()
    np.testing.assert_allclose(store.residual.take_from(query), ridge(store, query), rtol=1e-3, atol=1e-4)


def test_a_change_that_dies_half_way_leaves_the_one_before(
    store: GradientStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    digest = store.digest
    with monkeypatch.context() as patch:
        patch.setattr(gradient_store, "write_atomically", die)
        with pytest.raises(KeyboardInterrupt):
            store.delete(["e03"])
    again = GradientStore(store.path)
    assert again.digest == digest and again.residual is not None
    again.delete(["e03"])
    assert len(list(store.path.glob("residual*"))) == 1
    GradientStore(store.path)


def test_a_store_whose_residual_has_its_old_name_is_read_and_changed(store: GradientStore) -> None:
    (found,) = store.path.glob("residual*")
    found.rename(store.path / "residual.npy")
    old = GradientStore(store.path)
    assert old.residual is not None
    old.delete(["e03"])
    query = np.random.default_rng(1).standard_normal(DIM).astype(np.float32)
    assert old.residual is not None and not (store.path / "residual.npy").exists()
    np.testing.assert_allclose(old.residual.take_from(query), ridge(old, query), rtol=1e-3, atol=1e-4)


def test_a_change_without_all_shards_drops_it_until_one_with_all(store: GradientStore, tmp_path: Path) -> None:
    shutil.copytree(store.shards[2].folder, tmp_path / "elsewhere")
    shutil.rmtree(store.shards[2].folder)
    store.delete(["e03"])
    assert GradientStore(store.path).residual is None
    shutil.copytree(tmp_path / "elsewhere", store.shards[2].folder)
    store.delete(["e04"])
    assert GradientStore(store.path).residual is not None


def test_only_the_leading_directions_are_kept(store: GradientStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attribution.influence.residual.NUM_DIRECTIONS", 2)
    monkeypatch.setattr("attribution.influence.residual.NUM_SAMPLED", 9)
    store.delete(["e11"])
    assert store.residual is not None
    directions = store.residual.directions
    np.testing.assert_allclose(directions @ directions.T, np.eye(2), atol=1e-4)
    assert store.residual.shrink[0] > store.residual.shrink[1] > 0


def test_an_altered_one_is_refused(store: GradientStore) -> None:
    (file,) = store.path.glob("residual*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(GradientStoreError, match=r"residual-[0-9a-f]{16}\.npy was altered"):
        GradientStore(store.path)
