"""The lineage index against the plain graph, and as a view: it may be lost, damaged, old or another log's."""

import itertools
import logging
import os
import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attribution.bodies import ApprovalBody, CompletionsBody, PromptBody, RedactionBody
from attribution.lineage_graph import LineageGraph, count, page_of
from attribution.lineage_index import LineageIndex
from attribution.lineage_layout import TABLES, LineageError
from attribution.log.sequencer import LogError
from attribution.private_records import PrivateRecords
from attribution.records import Artefact
from attribution.trail import Draft, Trail
from tests.attribution.lineage_oracle import PlainGraph
from tests.attribution.lineage_story import erase
from tests.attribution.story import tell

KINDS = ("prompt", "approval", "completions")


@dataclass(frozen=True)
class Plan:
    """A graph to record: per record its kind and the positions of its parents; and where the log is cut in two."""

    kinds: tuple[str, ...]
    parents: tuple[tuple[int, ...], ...]
    cut: int


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    size = draw(st.integers(1, 24))
    kinds = tuple(draw(st.sampled_from(KINDS)) for _ in range(size))
    parents = tuple(
        tuple(draw(st.sets(st.integers(0, position - 1), max_size=4))) if position else () for position in range(size)
    )
    return Plan(kinds, parents, draw(st.integers(0, size)))


def draft(plan: Plan, position: int, leaves: list[str]) -> Draft:
    digest = f"sha256:{sha256(str(position).encode()).hexdigest()}"
    body = {
        "prompt": PromptBody(f"p{position}", digest),
        "approval": ApprovalBody(digest, "approved", ""),
        "completions": CompletionsBody("r", digest[7:], 1, 1, 1, digest),
    }[plan.kinds[position]]
    return Draft(plan.kinds[position], body, parents=[leaves[parent] for parent in plan.parents[position]])


def record_plan(trail: Trail, plan: Plan, positions: range, leaves: list[str]) -> None:
    for position in positions:
        leaves.append(trail.record_many([draft(plan, position, leaves)])[0].leaf_hash)


def index_of(trail: Trail, **options: Path) -> LineageIndex:
    return LineageIndex(trail.home, trail.log.key, **options)


def tables(index: LineageIndex) -> dict[str, list[tuple[object, ...]]]:
    """Everything the index holds, in order."""
    return index.ask(lambda db: {name: sorted(db.execute(f"SELECT * FROM {name}").fetchall()) for name in TABLES})


@given(plan=plans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_walks_equal_those_of_the_plain_graph(plan: Plan) -> None:
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync", lambda descriptor: None):
        trail, leaves = Trail.open(Path(folder) / "home"), []
        index = index_of(trail)
        with (
            mock.patch("attribution.lineage_index.CHUNK_LEAVES", 5),
            mock.patch("attribution.lineage_intake.BLOCK_IDS", 3),
        ):
            record_plan(trail, plan, range(plan.cut), leaves)
            index.ask(lambda db: None)  # takes in the first part; the second comes later
            record_plan(trail, plan, range(plan.cut, len(plan.kinds)), leaves)
            compare(trail, index, leaves)
            fresh = index_of(trail, path=Path(folder) / "fresh.sqlite")
            assert tables(fresh) == tables(index)


def compare(trail: Trail, index: LineageIndex, leaves: list[str]) -> None:
    plain = PlainGraph(trail)

    def check(database: sqlite3.Connection) -> None:
        graph = LineageGraph(index, database)
        number = {leaf: graph.number(leaf) for leaf in leaves}
        assert list(number.values()) == list(range(len(leaves)))
        for leaf in leaves:
            ancestors = set(graph.leaf_hashes(graph.up([number[leaf]]))) - {leaf}
            assert ancestors == plain.ancestors([leaf])
            below = graph.down([number[leaf]])
            assert count(below) == {
                kind: sum(plain.kinds[other] == kind for other in plain.descendants([leaf])) for kind in count(below)
            }
            assert {leaves[n] for ids in below.values() for n in ids} == plain.descendants([leaf])
        pair = [number[leaf] for leaf in leaves[:2]]
        assert {leaves[n] for ids in graph.down(pair).values() for n in ids} == plain.descendants(leaves[:2])
        for first in leaves[::3]:
            for last in leaves[::2]:
                chain = graph.leaf_hashes(graph.path([number[first]], [number[last]]))
                distance = plain.distance(first, last)
                assert len(chain) == (0 if distance is None else distance + 1)
                assert all(up in plain.parents[down] for up, down in itertools.pairwise(chain))

    index.ask(check)


@pytest.fixture
def index(trail: Trail) -> LineageIndex:
    tell(trail)
    return index_of(trail)


def damage_by_deleting(path: Path) -> None:
    path.unlink()


def damage_by_noise(path: Path) -> None:
    path.write_bytes(os.urandom(8192))


def damage_within(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = os.urandom(64)
    path.write_bytes(bytes(data))


def damage_the_layout(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE child")
        database.commit()


@pytest.mark.parametrize("damage", [damage_by_deleting, damage_by_noise, damage_within, damage_the_layout])
def test_a_damaged_index_is_made_anew(index: LineageIndex, damage, caplog: pytest.LogCaptureFixture) -> None:
    before = tables(index)
    with closing(sqlite3.connect(index.path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(index.path)
    with caplog.at_level(logging.WARNING):
        assert tables(index) == before
    assert damage is damage_by_deleting or "made anew from the log" in caplog.text


def test_an_old_layout_is_made_anew(index: LineageIndex) -> None:
    before = tables(index)
    with closing(sqlite3.connect(index.path)) as database:
        database.execute("DELETE FROM record")
        database.execute("CREATE TABLE relic (x)")
        database.execute("PRAGMA user_version=99")
        database.commit()
    assert tables(index) == before
    assert index.ask(lambda db: db.execute("SELECT name FROM sqlite_master WHERE name = 'relic'").fetchone()) is None


def test_an_index_of_another_log_or_of_a_history_that_is_gone_is_made_anew(trail: Trail, tmp_path: Path) -> None:
    tell(trail)
    stale = index_of(trail)
    stale_tables = tables(stale)
    other = Trail.open(tmp_path / "other")
    tell(other, num_receipts=3)
    (other.home / "views" / "lineage.sqlite").write_bytes(b"")
    (other.home / "views" / "lineage.sqlite").unlink()
    index = index_of(other)
    for suffix in ("", "-wal"):
        source = stale.path.with_name(stale.path.name + suffix)
        if source.exists():
            index.path.with_name(index.path.name + suffix).write_bytes(source.read_bytes())
    assert tables(index) == tables(index_of(other, path=tmp_path / "fresh.sqlite")) != stale_tables


def test_a_log_that_was_rolled_back_is_followed_back(trail: Trail) -> None:
    tell(trail)
    index = index_of(trail)
    earlier = {name: (trail.home / "log" / name).read_bytes() for name in ("entries.bin", "checkpoint")}
    before = tables(index)
    trail.record("approval", ApprovalBody("sha256:" + "ab" * 32, "approved", ""))
    assert tables(index) != before
    for name, data in earlier.items():
        (trail.home / "log" / name).write_bytes(data)
    assert tables(index) == before


def test_an_altered_log_is_refused(index: LineageIndex) -> None:
    entries = index.home / "log" / "entries.bin"
    data = bytearray(entries.read_bytes())
    data[data.index(b'"time_us":') + 12] ^= 1
    entries.write_bytes(bytes(data))
    with pytest.raises(LogError, match="do not lead to the signed checkpoint"):
        index.ask(lambda db: None)
    with pytest.raises(LogError, match="do not lead to the signed checkpoint"):
        index.rebuild()
    entries.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(LogError, match="ends at leaf"):
        index.rebuild()


def test_an_altered_record_is_named(trail: Trail) -> None:
    story = tell(trail)
    altered = b'{"envelope":{},"salt":"' + b"00" * 32 + b'"}'
    message = f"record {story.base.leaf_hash}: altered on disk"
    with mock.patch.object(PrivateRecords, "read", lambda *_: altered), pytest.raises(LineageError, match=message):
        index_of(trail).ask(lambda db: None)


def test_erased_records_keep_their_edges_and_nothing_else(trail: Trail, tmp_path: Path) -> None:
    story = tell(trail)
    index = index_of(trail)
    before = tables(index)
    redact(trail, story.refinement.leaf_hash)
    after = tables(index)
    assert after["child"] != before["child"], "the redaction itself is there"
    assert {row[0] for row in before["name"]} - {row[0] for row in after["name"]} == {"facts", "length"}
    compare(trail, index, [leaf for _, leaf, _ in trail.leaves()])
    assert tables(index_of(trail, path=tmp_path / "fresh.sqlite")) == after


def redact(trail: Trail, leaf_hash: str) -> None:
    """Record the redaction and remove the private half, as an operator's command does."""
    trail.record("redaction", RedactionBody(leaf_hash, "asked for"), parents=[leaf_hash])
    erase(trail, leaf_hash)


def test_many_take_in_the_same_log_at_once(trail: Trail) -> None:
    tell(trail)
    expected = tables(index_of(trail, path=trail.home / "views" / "alone.sqlite"))
    with mock.patch("attribution.lineage_index.CHUNK_LEAVES", 2), ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: tables(index_of(trail)), range(12)))
    assert all(one == expected for one in found)


def test_rebuild_says_how_many(index: LineageIndex) -> None:
    assert index.rebuild() == 9
    assert index.rebuild() == 9


def test_an_input_that_no_record_made_leaves_no_edge(trail: Trail) -> None:
    story = tell(trail)
    made = Artefact("prompt", "x", "sha256:" + "cd" * 32)
    entry = trail.record("approval", ApprovalBody(made.digest, "approved", ""), inputs=[made])
    below = index_of(trail).ask(lambda db: LineageGraph(index_of(trail), db).down([story.base.index]))
    assert entry.index not in {n for ids in below.values() for n in ids.tolist()}


def test_pages_come_newest_first_and_end() -> None:
    import numpy as np

    found = {"a": np.array([1, 4, 9], np.uint32), "b": np.array([2, 3], np.uint32)}
    assert page_of(found, limit=2) == ([9, 4], 4)
    assert page_of(found, limit=2, before=4) == ([3, 2], 2)
    assert page_of(found, limit=2, before=2) == ([1], None)
    assert page_of(found, kinds=["b"], limit=2) == ([3, 2], None)
    assert page_of({}, limit=2) == ([], None)
