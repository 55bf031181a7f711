"""Erase a row, a record or a contributor: every table that holds the rows is written anew without them.

A row's gradients and in-run scores go with its text, for text can be told from gradients. What weights learnt from a
row is not undone here (`forget` trains again): `Erasing.descendants` names what stands on it, adapters among them, and
the recorded optimizer states, sums over all rows of a batch, stay.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from attribution.bodies import AdapterBody, KeyRevocationBody, RowRedactionBody, TableRewrite
from attribution.erasure import (
    ErasureError,
    finish_erasures,
    parties_of,
    redactions,
    remaining,
    removal_of,
    remove,
    remove_rewritten,
    require_erasable,
)
from attribution.key_changes import key_ids_of_name
from attribution.lineage import Lineage
from attribution.pages.show import find_entry
from attribution.records import Artefact, Party, key_ids_of
from attribution.store import StoreError
from attribution.trust_file import OPERATOR
from configs.errors import UserError
from pipelines.refine.read import contributor_entries, load_decisions, load_refined
from pipelines.refine.table import DECISIONS_FILE, ROWS_FILE, write_table
from pipelines.refine.why import ExampleError, find_example
from pipelines.trace_rows import remove_rows

if TYPE_CHECKING:
    from attribution.trail import Draft, Entry, Trail

EXAMPLES_FILE, STEPS_FILE = "examples.parquet", "steps.parquet"
TOKEN_COLUMNS = ("input_ids", "labels")
SCRATCH_FOLDER = "run"


@dataclass(frozen=True)
class Erasing:
    """What an erasure takes. `rows`: row id -> line, by contribution; `tables`: (part, record's leaf, digest)."""

    what: Literal["row", "record", "contributor"]
    name: str
    leaves: tuple[str, ...] = ()
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    tables: tuple[tuple[str, str, str], ...] = ()
    digests: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    descendants: "tuple[Entry, ...]" = ()

    @property
    def row_ids(self) -> frozenset[str]:
        """The ids of all rows that go."""
        return frozenset(row_id for rows in self.rows.values() for row_id in rows)


def plan(trail: "Trail", target: str) -> Erasing:
    """Return what erasing `target` takes: a contributor's name, a row's id, or a record (name, digest or leaf hash).

    Raises:
        ErasureError: nothing of that name, or something that must stand.
    """
    if target in contributor_entries(trail):
        leaves = list(_records_of(trail, target))
        return _planned(trail, "contributor", target, leaves, _rows_of(trail, leaves))
    try:
        entry = trail.entry(trail.leaf_hash(target)) if target.isdigit() else find_entry(trail, target)
    except UserError as error:
        return _plan_row(trail, target, str(error))
    require_erasable(entry)
    return _planned(trail, "record", entry.leaf_hash, [entry.leaf_hash], _rows_of(trail, [entry.leaf_hash]))


def _plan_row(trail: "Trail", target: str, no_record: str) -> Erasing:
    try:
        example = find_example(trail, target)
    except ExampleError as error:
        raise ErasureError(f"{target!r}: no contributor, row or record; {no_record}") from error
    rows = {example.contribution.origin.dataset: {example.example_id: example.line_number}}
    return _planned(trail, "row", example.example_id, [], rows)


def erase(trail: "Trail", erasing: Erasing, *, reason: str, requester: str = OPERATOR) -> "list[Entry]":
    """Carry out a plan and return the redactions. The redactions are durable before anything goes; safe to repeat.

    Raises:
        ErasureError: the requester is neither the operator nor who signed all that goes.
    """
    party = _requester(trail, erasing, requester)
    finish_erasures(trail)
    (trail.home / SCRATCH_FOLDER).mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="erase-", dir=trail.home / SCRATCH_FOLDER))
    try:
        drafts = _row_redactions(trail, erasing, folder, reason=reason, parties=parties_of(trail, party))
    finally:
        shutil.rmtree(folder)
    drafts += redactions(trail, erasing.leaves, reason=reason, parties=parties_of(trail, party))
    entries = trail.record_many(drafts)
    remove(trail, erasing.leaves)
    remove_rewritten(trail)
    return entries


def _planned(
    trail: "Trail",
    what: Literal["row", "record", "contributor"],
    name: str,
    leaves: list[str],
    rows: Mapping[str, Mapping[str, int]],
) -> Erasing:
    removal = removal_of(trail, leaves)
    row_ids = {row_id for found in rows.values() for row_id in found}
    tables = tuple(_tables_with(trail, row_ids, set(leaves), set(rows)))
    lineage = Lineage(trail)
    starts = list(dict.fromkeys([*leaves, *rows]))
    below = {entry.leaf_hash: entry for leaf in starts for entry in lineage.descendants(leaf)}
    descendants = tuple(sorted((below[leaf] for leaf in below.keys() - set(leaves)), key=lambda entry: entry.index))
    return Erasing(what, name, tuple(leaves), rows, tables, removal.digests, removal.shared, descendants)


def _records_of(trail: "Trail", contributor: str) -> Iterator[str]:
    """Every record that a contributor signed, and what says that a key of theirs was revoked."""
    keys = set(key_ids_of_name(trail, contributor))
    for entry in trail.entries():
        if entry.record is None or entry.envelope is None:
            continue
        body = entry.record.body
        is_theirs = not keys.isdisjoint(key_ids_of(entry.envelope))
        if is_theirs or (isinstance(body, KeyRevocationBody) and body.key_id in keys):
            yield entry.leaf_hash


def _rows_of(trail: "Trail", leaves: Iterable[str]) -> dict[str, dict[str, int]]:
    """The rows of the contributions among some records: row id -> line."""
    found = {}
    for leaf in leaves:
        entry = trail.entry(leaf)
        if entry.leaf.kind == "dataset" and entry.record is not None:
            digest = remaining(trail, entry.record.outputs[0].digest)
            table = trail.get_table(digest) if trail.store.has(digest) else None
            if table is not None and "contribution_id" in table.column_names:
                columns = (table.column(name).to_pylist() for name in ("contribution_id", "line_number"))
                found[leaf] = dict(zip(*columns, strict=True))
    return found


def _tables_with(
    trail: "Trail", row_ids: set[str], leaves: set[str], contributions: set[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield (part, record, digest) of each table that holds one of the rows and whose record stays."""
    ids = pa.array(sorted(row_ids), pa.string())
    for entry in trail.entries() if row_ids else ():
        if entry.record is None or entry.leaf_hash in leaves:
            continue
        body, digest = (
            entry.record.body,
            remaining(trail, entry.record.outputs[0].digest) if entry.record.outputs else "",
        )
        if entry.leaf_hash in contributions:
            yield "dataset", entry.leaf_hash, digest
        elif entry.leaf.kind == "refinement" and trail.store.has(digest):
            if holds_any(trail.store.path_of(digest) / DECISIONS_FILE, ids):
                yield "refined", entry.leaf_hash, digest
        elif isinstance(body, AdapterBody):
            trace = remaining(trail, body.trace)
            if trail.store.has(trace) and holds_any(trail.store.path_of(trace) / EXAMPLES_FILE, ids):
                yield "trace", entry.leaf_hash, trace


def holds_any(file: Path, ids: pa.Array) -> int:
    """Return how many lines of a Parquet table are of these example ids; 0 for no file."""
    if not file.is_file():
        return 0
    found = pc.is_in(pq.read_table(file, columns=["example_id"]).column(0), value_set=ids)
    return int(pc.sum(found).as_py() or 0)


def _requester(trail: "Trail", erasing: Erasing, name: str) -> Party:
    """Who asks: the operator for anything, a contributor for what they signed."""
    key = trail.keys.get(name)
    if name != OPERATOR:
        theirs = set(_records_of(trail, name))
        others = [leaf for leaf in [*erasing.leaves, *erasing.rows] if leaf not in theirs]
        if others:
            raise ErasureError(f"--as {name}: record {others[0][:12]} is not theirs; only the operator may erase it")
    return Party(key.key_id, "requester")


def _row_redactions(
    trail: "Trail", erasing: Erasing, folder: Path, *, reason: str, parties: tuple[Party, ...]
) -> "list[Draft]":
    """Write the tables anew and return one redaction per contribution; the first names the shared tables."""
    from attribution.trail import Draft

    rewritten: list[TableRewrite] = []
    outputs: list[Artefact] = []
    for part, leaf, digest in erasing.tables:
        found, output = _rewrite(trail, part, leaf, digest, folder=folder / digest[-12:], row_ids=erasing.row_ids)
        rewritten += found
        outputs.append(output)
    drafts = []
    for number, (contribution, rows) in enumerate(erasing.rows.items()):
        lines = tuple(sorted(rows.values())) if erasing.what == "row" else ()
        shown = tuple(rewritten) if number == 0 else ()
        body = RowRedactionBody(contribution, lines, shown, reason)
        parents = list(dict.fromkeys([contribution, *(rewrite.leaf for rewrite in shown)]))
        made = outputs if number == 0 else []
        drafts.append(Draft("row_redaction", body, outputs=made, contributors=parties, parents=parents))
    return drafts if rewritten else []


def _rewrite(
    trail: "Trail", part: str, leaf: str, digest: str, *, folder: Path, row_ids: frozenset[str]
) -> tuple[list[TableRewrite], Artefact]:
    folder.mkdir(parents=True)
    ids = pa.array(sorted(row_ids), pa.string())
    match part:
        case "dataset":
            return _rewrite_contribution(trail, leaf, digest, folder, ids)
        case "refined":
            return _rewrite_refined(trail, leaf, digest, folder, ids)
    return _rewrite_trace(trail, leaf, digest, folder, ids)


def _rewrite_contribution(
    trail: "Trail", leaf: str, digest: str, folder: Path, ids: pa.Array
) -> tuple[list[TableRewrite], Artefact]:
    table = trail.get_table(digest)
    left = _without(table, "contribution_id", ids)
    after = _store_table(trail, folder / ROWS_FILE, left)
    name = _name_of(trail, leaf)
    return [TableRewrite("dataset", leaf, digest, after, left.num_rows)], Artefact("dataset", name, after)


def _rewrite_refined(
    trail: "Trail", leaf: str, digest: str, folder: Path, ids: pa.Array
) -> tuple[list[TableRewrite], Artefact]:
    rows, decisions = load_refined(trail, digest), load_decisions(trail, digest)
    source = trail.store.get_directory(digest)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "manifest.json").unlink()
    left = _without(rows, "example_id", ids)
    kept = _without(decisions, "example_id", ids)
    hidden = pc.if_else(pc.is_in(kept.column("see_also"), value_set=ids), pa.scalar(""), kept.column("see_also"))
    kept = kept.set_column(kept.column_names.index("see_also"), kept.schema.field("see_also"), hidden)
    old_rows, old_decisions = (_blob_digest(source / name) for name in (ROWS_FILE, DECISIONS_FILE))
    new_rows, new_decisions = (
        _store_table(trail, folder / name, table) for name, table in ((ROWS_FILE, left), (DECISIONS_FILE, kept))
    )
    manifest = trail.store.manifest(digest)
    after = trail.store.put_directory(folder, kind=manifest.kind, meta={**manifest.meta, "num_rows": left.num_rows})
    pairs = [("refined", digest, after), ("rows", old_rows, new_rows), ("decisions", old_decisions, new_decisions)]
    found = [TableRewrite(part, leaf, old, new, left.num_rows) for part, old, new in pairs if old != new]  # type: ignore[arg-type]
    return found, Artefact("refined", _name_of(trail, leaf), after)


def _rewrite_trace(
    trail: "Trail", leaf: str, digest: str, folder: Path, ids: pa.Array
) -> tuple[list[TableRewrite], Artefact]:
    """Take a row's text, tokens and id out of a training trace; its gradients and in-run scores go too."""
    try:
        source = trail.store.get_directory(digest)
    except StoreError as error:
        raise ErasureError(
            f"{error}; nothing was erased: restore the trace from a copy, or erase the adapter's record first "
            f"(`trailmark erase {leaf[:16]}`), with which its whole trace goes"
        ) from error
    shutil.copytree(source, folder, dirs_exist_ok=True)
    (folder / "manifest.json").unlink()
    remove_rows(folder, set(ids.to_pylist()))
    aliases = {row_id: _alias() for row_id in ids.to_pylist()}
    examples, steps = pq.read_table(folder / EXAMPLES_FILE), pq.read_table(folder / STEPS_FILE)
    plain = examples.to_pylist()
    for row in plain:
        if row["example_id"] in aliases:
            row.update(example_id=aliases[row["example_id"]], text="")
            row.update({name: [] for name in TOKEN_COLUMNS if name in row})
    pq.write_table(pa.Table.from_pylist(plain, schema=examples.schema), folder / EXAMPLES_FILE)
    taken = steps.to_pylist()
    for step in taken:
        step["example_ids"] = [aliases.get(row_id, row_id) for row_id in step["example_ids"]]
    pq.write_table(pa.Table.from_pylist(taken, schema=steps.schema), folder / STEPS_FILE)
    manifest = trail.store.manifest(digest)
    after = trail.store.put_directory(folder, kind=manifest.kind, meta=manifest.meta)
    left = sum(row["text"] != "" for row in plain)
    return [TableRewrite("trace", leaf, digest, after, left)], Artefact("trace", _name_of(trail, leaf), after)


def _alias() -> str:
    import secrets

    return f"sha256:{secrets.token_hex(32)}"


def _without(table: pa.Table, column: str, ids: pa.Array) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table.column(column), value_set=ids)))


def _store_table(trail: "Trail", path: Path, table: pa.Table) -> str:
    path.unlink(missing_ok=True)
    write_table(path, table.schema, [table])
    return trail.store.put_blob(path)


def _blob_digest(path: Path) -> str:
    from attribution.store import digest_of

    return digest_of(path.read_bytes())


def _name_of(trail: "Trail", leaf: str) -> str:
    record = trail.entry(leaf).record
    assert record is not None
    return record.outputs[0].name
