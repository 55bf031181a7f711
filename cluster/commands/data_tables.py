"""What the data commands print: tables of rich, made from records and stored tables."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from attribution.bodies import ContributorBody, ContributorRows, DatasetBody, Dropped, RefinementBody
from attribution.erasure import remaining
from attribution.people import People, first_keys
from attribution.trail import Entry, Trail
from configs.errors import UserError
from pipelines.refine.read import contributor_names, load_refined
from pipelines.refine.why import Example, Ruling, find_example, rulings

SHORT_DIGITS = 12
HASH_COLUMNS = ("id", "key", "digest", "record", "see also")


class RowBar:
    """A progress bar over rows, called with (done, total)."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("Refining"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task("rows", total=None)

    def __enter__(self) -> "RowBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total` rows."""
        self._progress.update(self._task, completed=done, total=total)


def contributors_table(trail: Trail) -> Table:
    """Return name, key in use, datasets and rows of every contributor, those under earlier keys included."""
    table = _table("Contributors", ("name", "key", "datasets", "rows"), right=("datasets", "rows"))
    handed_in: dict[str, list[int]] = {}
    people, first = People(trail).by_name, first_keys(trail)
    for entry in trail.entries(kind="dataset"):
        if entry.record is not None and isinstance(entry.record.body, DatasetBody):
            person = first.get(_contributor(entry), _contributor(entry))
            handed_in.setdefault(person, []).append(entry.record.body.num_rows)
    for entry in trail.entries(kind="contributor"):
        if entry.record is not None and isinstance(entry.record.body, ContributorBody):
            body = entry.record.body
            rows = handed_in.get(body.key_id, [])
            key_id = people[body.name].key_id if body.name in people else body.key_id
            table.add_row(Text(body.name), key_id[:SHORT_DIGITS], str(len(rows)), str(sum(rows)))
    return table


def refinement_tables(
    trail: Trail,
    num_in: int,
    num_kept: int,
    dropped: Sequence[Dropped],
    per_contributor: Sequence[ContributorRows],
) -> list[RenderableType]:
    """Return the closing tables of a refinement: kept, dropped by reason, per contributor."""
    reasons = _table("Rows", ("outcome", "rule", "reason", "rows"), right=("rows",))
    reasons.add_row(Text("kept", style="green"), "", "", str(num_kept))
    for drop in dropped:
        reasons.add_row(Text("dropped", style="yellow"), drop.rule, Text(drop.reason), str(drop.count))
    reasons.add_section()
    reasons.add_row("in all", "", "", str(num_in))
    names = contributor_names(trail)
    people = _table("Contributors", ("name", "in", "kept", "dropped"), right=("in", "kept", "dropped"))
    for rows in per_contributor:
        counts = (rows.num_in, rows.num_kept, rows.num_in - rows.num_kept)
        people.add_row(Text(names.get(rows.key_id, rows.key_id[:SHORT_DIGITS])), *map(str, counts))
    return [reasons, people]


def datasets_table(trail: Trail) -> Table:
    """Return every contributed and refined dataset, oldest first."""
    table = _table("Datasets", ("name", "kind", "rows", "contributor", "licence", "digest", "record"), right=("rows",))
    names, first = contributor_names(trail), first_keys(trail)
    for entry in _dataset_entries(trail):
        assert entry.record is not None
        body, digest = entry.record.body, entry.record.outputs[0].digest
        tail = (_short(digest), entry.leaf_hash[:SHORT_DIGITS])
        if isinstance(body, DatasetBody):
            who = names.get(_contributor(entry), "?")
            table.add_row(Text(body.name), "contributed", str(body.num_rows), Text(who), body.licence, *tail)
        elif isinstance(body, RefinementBody):
            people = {first.get(rows.key_id, rows.key_id): False for rows in body.per_contributor}
            people |= {first.get(rows.key_id, rows.key_id): True for rows in body.per_contributor if rows.num_kept}
            who = f"{sum(people.values())} of {len(people)}"
            table.add_row(Text(body.name), "refined", str(body.num_kept), who, "", *tail)
    return table


def dataset_view(trail: Trail, dataset: str, *, num_rows: int) -> list[RenderableType]:
    """Return facts and first rows of a dataset, the newest of that name. Raises UserError when the name means none."""
    entry = _find_dataset(trail, dataset)
    assert entry.record is not None
    body, digest = entry.record.body, entry.record.outputs[0].digest
    heading = Text(f"{entry.record.outputs[0].name}  {digest}\nrecord {entry.leaf_hash}")
    if isinstance(body, RefinementBody):
        tables = refinement_tables(trail, body.num_in, body.num_kept, body.dropped, body.per_contributor)
        rows = load_refined(trail, digest).slice(0, num_rows).rename_columns({"example_id": "id"})
        return [Group(heading, *tables), _rows_table(rows.to_pylist())]
    assert isinstance(body, DatasetBody)
    who = contributor_names(trail).get(_contributor(entry), "?")
    facts = Text(
        f"by {who} under {body.licence}, from {body.source_file_name}: "
        f"{body.num_rows} rows, {body.num_rejected} left out"
    )
    contributed = (
        trail.get_table(remaining(trail, body.rows)).slice(0, num_rows).rename_columns({"contribution_id": "id"})
    )
    return [Group(heading, facts), _rows_table(contributed.to_pylist())]


def example_view(trail: Trail, example_id: str) -> list[RenderableType]:
    """Return a row and the decisions of every refinement about it, newest first."""
    example = find_example(trail, example_id)
    found = rulings(trail, example.example_id)
    shown: list[RenderableType] = [_example_panel(trail, example)]
    shown += [_ruling_table(ruling) for ruling in found]
    return shown if found else [*shown, Text("No refinement has read this row yet.", style="yellow")]


def _example_panel(trail: Trail, example: Example) -> Panel:
    origin = example.contribution.origin
    who = contributor_names(trail).get(origin.contributor, origin.contributor[:SHORT_DIGITS])
    source = f"{who}, {example.contribution.name} line {example.line_number}, {origin.licence}"
    lines = [f"{message['role']}: {message['content']}" for message in example.messages]
    return Panel(Text("\n".join([example.example_id, *lines])), title=Text(source), title_align="left")


def _ruling_table(ruling: Ruling) -> Table:
    kept = all(decision["keep"] for decision in ruling.decisions)
    title = f"{ruling.name} ({_short(ruling.digest)}): {'kept' if kept else 'dropped'}"
    table = _table(title, ("rule", "decision", "score", "reason", "see also"), right=("score",))
    for decision in ruling.decisions:
        verdict = Text("keep", style="green") if decision["keep"] else Text("drop", style="yellow")
        score, see_also = f"{decision['score']:.3g}", _short(decision["see_also"])
        table.add_row(decision["rule"], verdict, score, Text(decision["reason"]), see_also)
    return table


def _rows_table(rows: Sequence[dict[str, object]]) -> Table:
    table = _table(f"First {len(rows)} rows", ("id", "line", "text"), right=("line",))
    for row in rows:
        messages = row["messages"]
        assert isinstance(messages, list)
        text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        table.add_row(_short(str(row["id"])), str(row["line_number"]), Text(text))
    return table


def _dataset_entries(trail: Trail) -> list[Entry]:
    return [entry for entry in trail.entries() if entry.leaf.kind in ("dataset", "refinement") and entry.record]


def _find_dataset(trail: Trail, dataset: str) -> Entry:
    for entry in reversed(_dataset_entries(trail)):
        assert entry.record is not None
        output = entry.record.outputs[0]
        short = dataset.removeprefix("sha256:")
        is_prefix = len(short) >= 8 and any(
            text.startswith(short) for text in (entry.leaf_hash, output.digest.removeprefix("sha256:"))
        )
        if dataset == output.name or is_prefix:
            return entry
    raise UserError(f"dataset {dataset!r}: no such name, digest or record; `trailmark dataset list` shows them all")


def _contributor(entry: Entry) -> str:
    assert entry.record is not None
    return next((party.key_id for party in entry.record.contributors if party.role == "contributor"), "")


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:SHORT_DIGITS]


def _table(title: str, columns: Sequence[str], *, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        is_hash = column in HASH_COLUMNS
        width = SHORT_DIGITS if is_hash else None
        table.add_column(column, justify="right" if column in right else "left", no_wrap=is_hash, min_width=width)
    return table
