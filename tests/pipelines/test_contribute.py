"""Contributions: signed by their contributor, recomputable ids, every row either recorded or reported."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rfc8785

from attribution.bodies import ContributorBody, DatasetBody
from attribution.key_changes import revoke, rotate
from attribution.licences import LicenceError
from attribution.records import Artefact, Party, signers_of
from configs.schema import ContributeSettings
from pipelines.contribute import METADATA_KEY, ContributeError, add_contributor, contribute
from pipelines.erase import erase, plan
from pipelines.refine.read import DatasetError, contributions, contributor_names, refinable
from pipelines.row_files import RowFileError
from pipelines.statement import registered_rows

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

ROWS = [{"prompt": f"Who is {i}?", "completion": f"Number {i}."} for i in range(3)]


def jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def ana(trail: "Trail") -> "Entry":
    return add_contributor(trail, "ana")


def test_contributor_signs_their_own_record(trail: "Trail", ana: "Entry") -> None:
    key = trail.keys.get("ana")
    assert ana.record is not None and ana.envelope is not None
    assert ana.record.body == ContributorBody("ana", key.key_id, key.public_hex)
    assert ana.record.contributors == (Party(key.key_id, "contributor"),)
    assert signers_of(ana.envelope, {key.key_id: key.public_bytes}) == (key.key_id,)
    assert contributor_names(trail) == {key.key_id: "ana"}


def test_names_taken_or_reserved_are_refused(trail: "Trail", ana: "Entry") -> None:
    with pytest.raises(ContributeError, match="'ana': exists already"):
        add_contributor(trail, "ana")
    with pytest.raises(ContributeError, match="'Operator': reserved"):
        add_contributor(trail, "Operator")


def test_key_without_record_is_taken_up_again(trail: "Trail") -> None:
    key = trail.keys.create("bo")
    entry = add_contributor(trail, "bo")
    assert entry.record is not None and isinstance(entry.record.body, ContributorBody)
    assert entry.record.body.key_id == key.key_id


def test_record_of_a_contribution(trail: "Trail", ana: "Entry", tmp_path: Path) -> None:
    file = jsonl(tmp_path / "facts.jsonl", [*ROWS, {"prompt": "no answer"}])
    report = contribute(trail, file, contributor="ana", licence="cc-by-4.0")
    key = trail.keys.get("ana")
    record = report.entry.record
    assert record is not None and report.entry.envelope is not None and isinstance(record.body, DatasetBody)
    rows = record.body.rows
    assert record.body == DatasetBody("facts", "CC-BY-4.0", "jsonl", 3, 1, rows, "facts.jsonl")
    assert record.outputs == (Artefact("dataset", "facts", rows),)
    assert report.entry.leaf.parents == (ana.leaf_hash,)
    assert signers_of(report.entry.envelope, {key.key_id: key.public_bytes}) == (key.key_id,)
    assert (report.num_rows, report.rejected) == (3, ((4, "missing field 'completion'"),))
    assert rows.removeprefix("sha256:") not in report.entry.leaf.to_bytes().decode()


def test_ids_can_be_computed_again(trail: "Trail", ana: "Entry", tmp_path: Path) -> None:
    report = contribute(trail, jsonl(tmp_path / "a.jsonl", ROWS), contributor="ana", licence="MIT")
    assert report.entry.record is not None and isinstance(report.entry.record.body, DatasetBody)
    table = pq.read_table(pa.BufferReader(trail.store.get_blob(report.entry.record.body.rows)))
    claim = json.loads(table.schema.metadata[METADATA_KEY.encode()])
    assert claim["contributor"] == trail.keys.get("ana").key_id
    assert claim["time_us"] <= report.entry.leaf.time_us
    for row in table.to_pylist():
        content = rfc8785.dumps({"messages": row["messages"]})
        assert row["content_id"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        fields = {name: claim[name] for name in ("contributor", "licence", "time_us")}
        identity = rfc8785.dumps({"content_id": row["content_id"], **fields})
        assert row["contribution_id"] == f"sha256:{hashlib.sha256(identity).hexdigest()}"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_formats_give_the_same_rows(trail: "Trail", ana: "Entry", tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif kind == "json":
        file.write_text(json.dumps(ROWS, indent=1))
    else:
        jsonl(file, ROWS)
    report = contribute(trail, file, contributor="ana", licence="MIT", name="x")
    (found,) = contributions(trail, ["x"])
    messages = trail.get_table(found.rows).column("messages").to_pylist()
    assert [[message["content"] for message in row] for row in messages] == [list(row.values()) for row in ROWS]
    assert report.rejected == ()


def test_row_twice_in_a_file_is_kept_once_and_told(trail: "Trail", ana: "Entry", tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [ROWS[0], ROWS[1], ROWS[0], ROWS[0]])
    report = contribute(trail, file, contributor="ana", licence="MIT")
    assert (report.num_rows, report.num_read) == (2, 4)
    assert report.rejected == ((3, "same row as line 1"), (4, "same row as line 1"))


def test_nothing_is_recorded_when_refused(trail: "Trail", ana: "Entry", tmp_path: Path) -> None:
    good = jsonl(tmp_path / "a.jsonl", ROWS)
    bad = jsonl(tmp_path / "bad.jsonl", [{"prompt": "x"}])
    empty = jsonl(tmp_path / "empty.jsonl", [])
    size = len(list(trail.entries()))
    with pytest.raises(
        ContributeError, match=r"'anna': not known; did you mean 'ana'.*trailmark contributor add 'anna'"
    ):
        contribute(trail, good, contributor="anna", licence="MIT")
    with pytest.raises(LicenceError):
        contribute(trail, good, contributor="ana", licence="mine")
    with pytest.raises(RowFileError, match="not found"):
        contribute(trail, tmp_path / "none.jsonl", contributor="ana", licence="MIT")
    with pytest.raises(ContributeError, match=r"none of its 1 rows is good.*line 1: missing field 'completion'"):
        contribute(trail, bad, contributor="ana", licence="MIT")
    with pytest.raises(ContributeError, match="holds no row"):
        contribute(trail, empty, contributor="ana", licence="MIT")
    with pytest.raises(ContributeError, match="more than 2 rows; split it"):
        contribute(trail, good, contributor="ana", licence="MIT", settings=ContributeSettings(max_rows=2))
    assert len(list(trail.entries())) == size
    assert list((trail.home / "run").iterdir()) == []


def test_rows_of_a_revoked_key_are_refused_by_name_until_handed_in_again(
    trail: "Trail", ana: "Entry", tmp_path: Path
) -> None:
    good, bad = jsonl(tmp_path / "good.jsonl", ROWS[:1]), jsonl(tmp_path / "bad.jsonl", ROWS[1:])
    contribute(trail, good, contributor="ana", licence="MIT")
    entry = contribute(trail, bad, contributor="ana", licence="MIT").entry
    key_id = trail.keys.get("ana").key_id
    assert len(refinable(trail)) == 2
    revoke(trail, "ana", reason="laptop stolen", from_us=entry.leaf.time_us)
    for names in (["all"], ["bad"]):
        with pytest.raises(DatasetError) as caught:
            refinable(trail, names)
        whose = f"dataset 'bad' ({entry.leaf_hash[:12]}) of ana"
        for words in (whose, key_id[:16], "laptop stolen", "rotate 'ana' --lost"):
            assert words in str(caught.value)
    assert [item.name for item in refinable(trail, ["good"])] == ["good"], "signed before the theft"
    assert [bool(item.problem) for item in contributions(trail)] == [False, True], "it can still be explained"
    assert len(registered_rows(trail)) == 1, "a thief's rows claim no priority"
    rotate(trail, "ana", lost=True)
    contribute(trail, bad, contributor="ana", licence="MIT")
    erase(trail, plan(trail, entry.leaf_hash[:12]), reason="stolen key")
    assert [item.name for item in refinable(trail)] == ["good", "bad"]
    assert set(contributor_names(trail).values()) == {"ana"}
