"""The gradient store: what went in comes back, through appends, deletions, compaction, tampering and crashes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from attribution.influence import gradient_store
from attribution.influence.codec import FactorCodec, GradientCodec
from attribution.influence.gradient_store import GradientStore, GradientStoreError
from attribution.influence.quantise import quantise
from kernels.gradients import BLOCK

DIM = 2 * BLOCK
VIEWS = ("10", "20")


def codec() -> GradientCodec:
    one = FactorCodec("q.lora_A", torch.eye(2), torch.eye(BLOCK), torch.ones(2, BLOCK), torch.arange(DIM))
    return GradientCodec("identity", (one,), torch.arange(DIM), 1.0)


def rows_for(ids: list[str]) -> dict[str, np.ndarray]:
    """Rows that follow from id and view."""
    return {
        view: np.stack([np.random.default_rng([int(name), int(view)]).standard_normal(DIM) for name in ids]).astype(
            np.float32
        )
        for view in VIEWS
    }


def make(path: Path, ids: list[str]) -> GradientStore:
    store = GradientStore.create(path / "store", dict.fromkeys(VIEWS, codec()), about={"seed": "0"})
    store.append(ids, rows_for(ids))
    return store


def contents(store: GradientStore, view: str) -> dict[str, np.ndarray]:
    """Every live example's row as it is read back."""
    return {shard.ids[row]: shard.rows(view).values()[row] for shard in store.shards for row in shard.live.tolist()}


@settings(max_examples=50, deadline=None)
@given(
    rows=hnp.arrays(np.float32, (3, DIM), elements=st.floats(-1e6, 1e6, width=32)),
    exponents=st.tuples(*[st.integers(-30, 30)] * 3),
)
def test_quantised_values_are_within_half_a_step(rows: np.ndarray, exponents: tuple[int, ...]) -> None:
    rows = (rows * 10.0 ** np.array(exponents)[:, None]).astype(np.float32)
    found = quantise(rows)
    step = (found.scales * found.units[:, None]).repeat(BLOCK, axis=1)
    assert (np.abs(found.values() - rows) <= step * 0.501).all()
    largest = np.abs(rows).reshape(3, -1, BLOCK).max(axis=2)
    # A block's step is a 127th of its largest value, but for blocks 255 times smaller than the row's largest.
    assert (step[:, ::BLOCK] <= largest / 127 * 2 + found.units[:, None] * 1.01 + 1e-37).all()


def test_rows_come_back_and_bytes_are_counted(tmp_path: Path) -> None:
    ids = [str(number) for number in range(7)]
    store = make(tmp_path, ids)
    assert store.ids() == tuple(ids) and store.num_examples == 7
    for view, rows in rows_for(ids).items():
        found = np.stack(list(contents(store, view).values()))
        np.testing.assert_allclose(found, rows, atol=float(np.abs(rows).max()) / 127)
        np.testing.assert_allclose(store.shards[0].lengths(view), np.linalg.norm(found, axis=1), rtol=1e-5)
    payload = len(VIEWS) * (DIM + DIM // BLOCK + 8) + len(VIEWS) * 4
    overhead = (3 * len(VIEWS) + 1) * 128 + 100
    assert payload <= store.bytes_per_example <= payload + overhead / 7 + 8
    again = GradientStore(store.path, digest=store.digest)
    assert again.about == {"seed": "0"} and again.dim("10") == DIM and again.views == VIEWS


def test_many_rows_spread_over_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_store, "SHARD_ROWS", 3)
    ids = [str(number) for number in range(8)]
    store = make(tmp_path, ids)
    assert [shard.num_rows for shard in store.shards] == [3, 3, 2]
    rows = rows_for(ids)
    for view in VIEWS:
        for name, row in contents(store, view).items():
            np.testing.assert_allclose(row, rows[view][int(name)], atol=0.05)


def test_deleting_hides_and_compacting_erases(tmp_path: Path) -> None:
    ids = [str(number) for number in range(40)]
    store = make(tmp_path, ids)
    doomed = quantise(rows_for(["7"])["10"]).codes.tobytes()
    size = store.bytes_per_example
    store.delete(["7", "9"])
    assert "7" not in store.ids() and store.num_examples == 38
    assert any(doomed in file.read_bytes() for file in store.path.rglob("*.codes.npy"))
    assert store.compact() > 0
    assert not any(doomed in file.read_bytes() for file in store.path.rglob("*") if file.is_file())
    assert store.ids() == tuple(name for name in ids if name not in ("7", "9"))
    assert store.bytes_per_example == pytest.approx(size, rel=0.05)
    store.verify()
    store.append(["7"], rows_for(["7"]))
    assert store.ids()[-1] == "7"


def test_one_digest_means_one_content(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a", ["1", "2"]), make(tmp_path / "b", ["1", "2"])
    assert first.digest == second.digest
    before = first.digest
    first.delete(["2"])
    assert first.digest != before
    with pytest.raises(GradientStoreError, match="not " + before):
        GradientStore(first.path, digest=before)


@pytest.mark.parametrize(
    "name", ["codecs/10.safetensors", "shards/000001/10.codes.npy", "shards/000001/ids.json", "store.json"]
)
def test_a_tampered_store_is_refused_and_the_file_named(tmp_path: Path, name: str) -> None:
    store = make(tmp_path, ["1", "2"])
    file = store.path / name
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    with pytest.raises(GradientStoreError, match=name.replace(".", r"\.")):
        GradientStore(store.path)


def test_a_header_rewritten_by_hand_is_refused(tmp_path: Path) -> None:
    store = make(tmp_path, ["1", "2"])
    header = json.loads((store.path / "store.json").read_text())
    header["shards"][0]["removed"] = [1]
    (store.path / "store.json").write_text(json.dumps(header))
    with pytest.raises(GradientStoreError, match=r"store\.json was altered"):
        GradientStore(store.path)


def test_missing_files_and_other_formats_are_named(tmp_path: Path) -> None:
    store = make(tmp_path, ["1", "2"])
    (store.path / "shards" / "000001" / "weights.npy").unlink()
    with pytest.raises(GradientStoreError, match=r"weights\.npy is missing"):
        GradientStore(store.path)
    with pytest.raises(GradientStoreError, match=r"store\.json is missing"):
        GradientStore(tmp_path / "nowhere")
    (store.path / "store.json").write_text(json.dumps({"format": "trailmark-gradients/v9"}))
    with pytest.raises(GradientStoreError, match="not of the format trailmark-gradients/v1"):
        GradientStore(store.path)


def test_what_cannot_go_in_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    store = make(tmp_path, ["1", "2"])
    folders = sorted(store.path.rglob("*"))
    rows = rows_for(["3", "4"])
    broken = {**rows, "20": np.where(np.arange(DIM) == 5, np.nan, rows["20"])}
    broken["20"][0] = 1
    for ids, given_rows, weights, message in (
        (["2", "3"], rows, None, "'2': is in"),
        (["3", "3"], rows, None, "'3': is in"),
        (["3", "4"], broken, None, "'4': its gradient is not finite in view 20"),
        (["3", "4"], {"10": rows["10"]}, None, "'3': no row was given for view 20"),
        (["3", "4"], {view: values[:, :BLOCK] for view, values in rows.items()}, None, "expected"),
        (["3", "4"], rows, np.ones((2, 3)), r"weights: \(2, 3\)"),
    ):
        with pytest.raises(GradientStoreError, match=message):
            store.append(ids, given_rows, weights=weights)
    with pytest.raises(GradientStoreError, match="'9': no gradient of it"):
        store.delete(["1", "9"])
    with pytest.raises(GradientStoreError, match="no view '30'"):
        store.codec("30")
    with pytest.raises(GradientStoreError, match="there is one already"):
        GradientStore.create(store.path, {"10": codec()})
    assert sorted(store.path.rglob("*")) == folders
    assert GradientStore(store.path).ids() == ("1", "2")


def test_a_crash_before_the_header_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make(tmp_path, ["1", "2"])

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gradient_store, "write_atomically", crash)
        for change in (lambda: store.append(["3"], rows_for(["3"])), lambda: store.delete(["1"])):
            with pytest.raises(KeyboardInterrupt):
                change()
    again = GradientStore(store.path)
    assert again.ids() == ("1", "2")
    again.append(["3"], rows_for(["3"]))
    again.compact()
    assert again.ids() == ("1", "2", "3")
    assert {folder.name for folder in (store.path / "shards").iterdir()} == {shard.name for shard in again.shards}


def test_a_node_serves_the_shards_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(gradient_store, "SHARD_ROWS", 2)
    store = make(tmp_path, ["1", "2", "3", "4", "5"])
    shutil.rmtree(store.shards[1].folder)
    part = GradientStore(store.path)
    assert part.ids() == ("1", "2", "5")
    with pytest.raises(GradientStoreError, match="among the shards on this machine"):
        part.delete(["3"])
    part.delete(["1"], compact=True)
    assert part.ids() == ("2", "5") and part.num_examples == 4


class StoreMachine(RuleBasedStateMachine):
    """Random appends, deletions, compactions and reopenings against a plain dictionary."""

    @initialize()
    def start(self) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.store = GradientStore.create(Path(self.folder.name) / "s", dict.fromkeys(VIEWS, codec()))
        self.expected: list[str] = []
        self.next = 0

    @rule(count=st.integers(0, 5))
    def append(self, count: int) -> None:
        ids = [str(self.next + number) for number in range(count)]
        self.next += count
        if ids:
            self.store.append(ids, rows_for(ids))
        self.expected += ids

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        if self.expected:
            doomed = data.draw(st.lists(st.sampled_from(self.expected), unique=True))
            self.store.delete(doomed, compact=data.draw(st.booleans()))
            self.expected = [name for name in self.expected if name not in doomed]

    @rule()
    def compact(self) -> None:
        self.store.compact()
        assert not any(shard.removed for shard in self.store.shards)

    @rule()
    def reopen(self) -> None:
        self.store = GradientStore(self.store.path)

    @invariant()
    def holds_what_it_should(self) -> None:
        if hasattr(self, "store"):
            assert self.store.ids() == tuple(self.expected)
            for name, row in contents(self.store, "20").items():
                np.testing.assert_allclose(row, rows_for([name])["20"][0], atol=0.05)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
