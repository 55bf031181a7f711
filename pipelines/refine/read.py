"""Which contributions a refinement reads, in the order in which they were registered, cut into blocks of rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from attribution.bodies import ContributorBody, DatasetBody
from attribution.erasure import maker_of, remaining, rewrites
from attribution.log.proved import VerifyError
from attribution.people import People
from attribution.trust_file import OPERATOR
from attribution.void_records import CHECKS, VoidRecord, void_of
from configs.errors import UserError
from pipelines.refine.annotate import Origin
from pipelines.refine.table import CONTRIBUTED, DECISIONS_FILE, ROWS_FILE

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail

ALL = "all"
MIN_HASH_PREFIX = 8
"""Hex digits of a leaf hash that a user may give instead of all 64."""


class DatasetError(UserError):
    """A contribution or refined dataset that is not there, was erased, or is not what it says."""


@dataclass(frozen=True)
class Contribution:
    """One registered contribution; `rows` is the digest of its rows.parquet.

    `void`: why its signature does not count any more, None where it does.
    """

    name: str
    rows: str
    num_rows: int
    origin: Origin
    void: VoidRecord | None = None

    @property
    def problem(self) -> str:
        """Whose signature does not count, why, and what to do; '' where it does."""
        return "" if self.void is None else self.void.told


@dataclass(frozen=True)
class Block:
    """Rows first_row .. first_row + num_rows of the file at `path`; what one Ray Data task reads."""

    index: int
    path: Path
    origin: Origin
    first_row: int
    num_rows: int


def contributor_entries(trail: "Trail") -> "dict[str, Entry]":
    """Return the newest contributor record by contributor name."""
    found: dict[str, Entry] = {}
    for entry in trail.entries(kind="contributor"):
        if entry.record is not None:
            assert isinstance(entry.record.body, ContributorBody)
            found[entry.record.body.name] = entry
    return found


def contributor_names(trail: "Trail") -> dict[str, str]:
    """Return contributor names by key id."""
    return {key_id: name for key_id, name in People(trail).names.items() if name != OPERATOR}


def contributions(trail: "Trail", names: Sequence[str] = (ALL,)) -> list[Contribution]:
    """Return the contributions that `names` mean, each once, in order of registration.

    A name is a dataset's name (every contribution of that name), the digest of its rows, its leaf hash or at least
    8 digits of it, or `all`. The order of `names` does not matter. What a revoked key signed is among them, with its
    `problem`: other records may stand on it; `refinable` is for new ones.

    Raises:
        DatasetError: a name that means nothing (with the nearest), an erased record, one not signed by its contributor.
    """
    entries = list(trail.entries(kind="dataset"))
    wanted = {entry.index for name in names for entry in _matching(entries, name)}
    if not wanted:
        raise DatasetError(
            "no dataset to refine: contribute one first, `trailmark contribute FILE --as NAME --licence ID`"
        )
    people = People(trail)
    return [_contribution(trail, entry, people) for entry in entries if entry.index in wanted]


def refinable(trail: "Trail", names: Sequence[str] = (ALL,)) -> list[Contribution]:
    """Return the contributions that `names` mean, for something new to be made of them.

    Raises:
        DatasetError: as `contributions`; one signed with a revoked key, or with one that another had replaced.
    """
    chosen = contributions(trail, names)
    if problems := [contribution.problem for contribution in chosen if contribution.problem]:
        raise DatasetError("\n".join(problems))
    return chosen


def require_refinable(trail: "Trail", digest: str) -> None:
    """Raise DatasetError when a refined dataset holds rows of a contribution that would be refused by now."""
    maker, people = maker_of(trail, digest), People(trail)
    for leaf_hash in maker.leaf.parents if maker is not None else ():
        entry = trail.entry(leaf_hash)
        is_there = entry.leaf.kind == "dataset" and entry.record is not None
        if is_there and (problem := _contribution(trail, entry, people).problem):
            raise DatasetError(f"{problem}; then refine again")


def verified_rows(trail: "Trail", contribution: Contribution) -> Path:
    """Return the file of a contribution's rows after hashing it again. Raises StoreError when it was altered."""
    trail.store.get_blob(contribution.rows)
    return trail.store.path_of(contribution.rows)


def blocks(paths: Sequence[tuple[Contribution, Path]], *, block_rows: int) -> list[Block]:
    """Cut the rows of all contributions into blocks of at most `block_rows`, in order of registration."""
    cut: list[Block] = []
    for contribution, path in paths:
        for first in range(0, contribution.num_rows, block_rows):
            size = min(block_rows, contribution.num_rows - first)
            cut.append(Block(len(cut), path, contribution.origin, first, size))
    return cut


def read_block(block: Block) -> pa.Table:
    """Return the block's rows (CONTRIBUTED); reads only the row groups that hold them."""
    with pq.ParquetFile(block.path) as file:
        pieces = list(_pieces(file, block.first_row, block.first_row + block.num_rows))
    rows = pa.concat_tables(pieces).cast(CONTRIBUTED)
    assert rows.num_rows == block.num_rows, "the record's num_rows is the file's"
    return rows


def load_refined(trail: "Trail", digest: str) -> pa.Table:
    """Return the rows (table.REFINED) of a refined dataset, verified. Raises StoreError when missing or altered."""
    return pq.read_table(_refined_directory(trail, digest) / ROWS_FILE)


def load_decisions(trail: "Trail", digest: str) -> pa.Table:
    """Return the decisions (table.DECISIONS) behind a refined dataset, one per example and rule asked, verified."""
    return pq.read_table(_refined_directory(trail, digest) / DECISIONS_FILE)


def _refined_directory(trail: "Trail", digest: str) -> Path:
    digest = remaining(trail, digest)
    kind = trail.store.manifest(digest).kind
    if kind != "refined":
        raise DatasetError(f"{digest} is of kind {kind!r}, not a refined dataset; `trailmark dataset list` shows them")
    return trail.store.get_directory(digest)


def _pieces(file: pq.ParquetFile, first: int, last: int) -> Iterator[pa.Table]:
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        low, high = max(first, start), min(last, end)
        if low < high:
            yield file.read_row_group(group).slice(low - start, high - low)
        start = end


def _matching(entries: "Sequence[Entry]", name: str) -> "list[Entry]":
    if name == ALL:
        return [entry for entry in entries if entry.record is not None]
    found = [entry for entry in entries if _means(entry, name)]
    if not found:
        known = sorted({_dataset_body(entry).name for entry in entries if entry.record is not None})
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known[:10]) or 'none yet'}"
        raise DatasetError(f"dataset {name!r}: no contribution of that name, digest or leaf hash; {hint}")
    return found


def _means(entry: "Entry", name: str) -> bool:
    if len(name) >= MIN_HASH_PREFIX and entry.leaf_hash.startswith(name.lower()):
        return True
    return entry.record is not None and name in (_dataset_body(entry).name, _dataset_body(entry).rows)


def _dataset_body(entry: "Entry") -> DatasetBody:
    assert entry.record is not None and isinstance(entry.record.body, DatasetBody)
    return entry.record.body


def _contribution(trail: "Trail", entry: "Entry", people: People) -> Contribution:
    if entry.record is None or entry.envelope is None:
        raise DatasetError(f"dataset {entry.leaf_hash[:12]}: its record was erased; leave it out")
    body = _dataset_body(entry)
    contributor = next((party.key_id for party in entry.record.contributors if party.role == "contributor"), "")
    known = people.history.keys.get(contributor)
    is_theirs, void = False, None
    try:
        is_theirs = contributor in people.signers_of(entry) and known is not None and known.role == "contributor"
    except VerifyError as error:
        if error.check in CHECKS:
            void = void_of(people, entry, error)
    if not is_theirs and void is None:
        raise DatasetError(
            f"dataset {body.name!r} ({entry.leaf_hash[:12]}): not signed by its contributor "
            f"{contributor[:12] or '(none named)'}; hand it in again with `trailmark contribute FILE --as NAME`"
        )
    origin = Origin(contributor, body.licence, entry.leaf_hash, entry.index)
    left = {rewrite.after: rewrite.num_rows for rewrite in rewrites(trail)}
    rows = remaining(trail, body.rows)
    return Contribution(body.name, rows, left.get(rows, body.num_rows), origin, void)
