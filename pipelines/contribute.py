"""Rows in, under a contributor's own key: parse, store, sign, record. Bad rows are reported and stop no good one."""

import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import rfc8785

from attribution.bodies import ContributorBody, DatasetBody
from attribution.licences import canonical_licence
from attribution.records import Artefact, Party
from configs.errors import UserError
from configs.schema import ContributeSettings
from pipelines.refine.canonical import content_id
from pipelines.refine.read import contributor_entries
from pipelines.refine.table import CONTRIBUTED, ROWS_FILE, write_table
from pipelines.row_files import ReadRow, format_of, read_rows

if TYPE_CHECKING:
    from attribution.keys import SigningKey
    from attribution.trail import Entry, Trail

ROLE = "contributor"
RESERVED_NAMES = ("operator", "log")
METADATA_KEY = "trailmark"
WRITE_ROWS = 1024


class ContributeError(UserError):
    """A contribution that cannot be recorded: unknown contributor, unusable name, or no good row."""


@dataclass(frozen=True)
class ContributionReport:
    """What became of a file. `rejected`: (line number, reason) of every row left out, in order of lines."""

    entry: "Entry"
    num_rows: int
    rejected: tuple[tuple[int, str], ...]

    @property
    def num_read(self) -> int:
        """Return the rows of the file, good and bad."""
        return self.num_rows + len(self.rejected)


def add_contributor(trail: "Trail", name: str) -> "Entry":
    """Create the contributor's key, record it signed by itself, and return the record's entry.

    A key left without a record by an interrupted run is taken up again.

    Raises:
        ContributeError: a reserved name, or a contributor of that name is there.
        SigningKeyError: a name that cannot be a file name.
    """
    if name.lower() in RESERVED_NAMES:
        raise ContributeError(f"contributor {name!r}: reserved for the trail's own key; choose another name")
    if name in contributor_entries(trail):
        raise ContributeError(
            f"contributor {name!r}: exists already; `trailmark contribute FILE --as {name!r}` uses it"
        )
    key = trail.keys.get(name) if trail.keys.has(name) else trail.keys.create(name)
    body = ContributorBody(name=name, key_id=key.key_id, public_key=key.public_hex)
    return trail.record("contributor", body, contributors=[Party(key.key_id, ROLE)], signer=key)


def contribute(
    trail: "Trail",
    file: Path,
    *,
    contributor: str,
    licence: str,
    name: str | None = None,
    settings: ContributeSettings | None = None,
) -> ContributionReport:
    """Register the good rows of `file` (see row_files.py for formats and shapes) as a dataset of `contributor`.

    `name` defaults to the file's name without its ending. A row that stands twice in the file is kept once.

    Raises:
        ContributeError: no such contributor, more rows than `settings.max_rows`, or not one good row.
        LicenceError: an unknown licence id.   RowFileError: a file that cannot be read at all.
    """
    settings = settings or ContributeSettings()
    introduced = _introduction(trail, contributor)
    key = trail.keys.get(contributor)
    licence = canonical_licence(licence)
    kind = format_of(file)
    reading = _Reading(file, settings)
    claim = _Claim(key.key_id, licence, time.time_ns() // 1000)
    with tempfile.TemporaryDirectory(prefix="contribute-", dir=_run_folder(trail)) as folder:
        path = Path(folder) / ROWS_FILE
        num_rows = write_table(path, CONTRIBUTED.with_metadata(claim.metadata), claim.tables(reading.good_rows()))
        if not num_rows:
            raise ContributeError(_no_good_row(file, reading.rejected))
        rows = trail.store.put_blob(path)
    body = DatasetBody(
        name=name or file.stem,
        licence=licence,
        format=kind,
        num_rows=num_rows,
        num_rejected=len(reading.rejected),
        rows=rows,
        source_file_name=file.name,
    )
    return ContributionReport(_record(trail, body, key, introduced, claim), num_rows, tuple(reading.rejected))


class _Reading:
    """One pass over a file that keeps the rejects and remembers contents seen (32 bytes each)."""

    def __init__(self, file: Path, settings: ContributeSettings) -> None:
        self._file = file
        self._settings = settings
        self.rejected: list[tuple[int, str]] = []

    def good_rows(self) -> Iterator[tuple[ReadRow, str]]:
        """Yield each good row with its content id, the first of equal ones only."""
        first_line: dict[bytes, int] = {}
        for number, row in enumerate(read_rows(self._file, max_row_bytes=self._settings.max_row_bytes), start=1):
            if number > self._settings.max_rows:
                raise ContributeError(
                    f"file {self._file.name}: more than {self._settings.max_rows} rows; split it, "
                    "or raise contribute.max_rows in the settings"
                )
            if row.messages is None:
                self.rejected.append((row.line_number, row.reason))
                continue
            identity = content_id(row.messages)
            earlier = first_line.setdefault(bytes.fromhex(identity.removeprefix("sha256:")), row.line_number)
            if earlier == row.line_number:
                yield row, identity
            else:
                self.rejected.append((row.line_number, f"same row as line {earlier}"))


@dataclass(frozen=True)
class _Claim:
    """Who hands in, under which licence, when: what makes a contribution id of a content id."""

    contributor: str
    licence: str
    time_us: int

    @property
    def metadata(self) -> dict[str, str]:
        """Return the Parquet file's metadata, from which each contribution id can be computed again.

        The record's own time may be later: the log never runs backwards, and others may have appended meanwhile.
        """
        claim = {"v": 1, "contributor": self.contributor, "licence": self.licence, "time_us": self.time_us}
        return {METADATA_KEY: json.dumps(claim, sort_keys=True)}

    def contribution_id(self, content: str) -> str:
        """Return SHA-256 of RFC 8785 {"content_id", "contributor", "licence", "time_us"}."""
        claim: dict[str, str | int] = {
            "content_id": content,
            "contributor": self.contributor,
            "licence": self.licence,
            "time_us": self.time_us,
        }
        return f"sha256:{hashlib.sha256(rfc8785.dumps(claim)).hexdigest()}"

    def tables(self, rows: Iterable[tuple[ReadRow, str]]) -> Iterator[pa.Table]:
        """Yield the rows as tables (CONTRIBUTED) of at most WRITE_ROWS."""
        remaining = iter(rows)
        while batch := list(islice(remaining, WRITE_ROWS)):
            plain = [
                {
                    "contribution_id": self.contribution_id(content),
                    "content_id": content,
                    "line_number": row.line_number,
                    "messages": row.messages,
                }
                for row, content in batch
            ]
            yield pa.Table.from_pylist(plain, schema=CONTRIBUTED)


def _introduction(trail: "Trail", contributor: str) -> "Entry":
    """Return the contributor's record; an unknown one is told how to join."""
    known = contributor_entries(trail)
    if contributor in known:
        return known[contributor]
    near = get_close_matches(contributor, list(known), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ContributeError(
        f"contributor {contributor!r}: not known; {hint}Add them with `trailmark contributor add {contributor!r}`"
    )


def _record(trail: "Trail", body: DatasetBody, key: "SigningKey", introduced: "Entry", claim: _Claim) -> "Entry":
    return trail.record(
        "dataset",
        body,
        outputs=[Artefact("dataset", body.name, body.rows)],
        contributors=[Party(key.key_id, ROLE)],
        parents=[introduced.leaf_hash],
        signer=key,
        time_us=claim.time_us,
    )


def _run_folder(trail: "Trail") -> Path:
    folder = trail.home / "run"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _no_good_row(file: Path, rejected: list[tuple[int, str]]) -> str:
    if not rejected:
        return f"file {file.name}: holds no row; nothing was recorded"
    shown = "; ".join(f"line {line}: {reason}" for line, reason in rejected[:3])
    return f"file {file.name}: none of its {len(rejected)} rows is good; nothing was recorded. {shown}"
