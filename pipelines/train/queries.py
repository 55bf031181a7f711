"""Query sets registered before a run: what every training row is scored against while the run goes on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.influence.encode import EncodeError, encode_example, num_targets
from attribution.influence.run_facts import ScoredQuery
from configs.errors import UserError
from configs.schema import TrainSettings
from pipelines.train.data import Example, conversation_text

if TYPE_CHECKING:
    from attribution.influence.gradients import Encoded
    from attribution.records import Artefact
    from attribution.trail import Trail

REFRESH_SHARE = 0.07
"""Tokens that all refreshes may run, as a share of the training's: with the row gradients' 3 % it stays under 10 %."""

MIN_REFRESHES = 4
"""Fewer in a run are warned of."""


class QueryError(UserError):
    """A query set that cannot be read or scored against."""


@dataclass(frozen=True)
class QueryItem:
    """One query as token ids, and as people read it."""

    item_id: str
    text: str
    encoded: "Encoded"


@dataclass(frozen=True)
class QuerySet:
    """A named set of queries; `artefact` is the input of the adapter's record."""

    artefact: "Artefact"
    items: tuple[QueryItem, ...]

    @property
    def name(self) -> str:
        return self.artefact.name


@dataclass(frozen=True)
class Registered:
    """All queries of a run. `groups[i]` is the column of `columns` that query i counts in."""

    columns: tuple[ScoredQuery, ...]
    queries: "tuple[Encoded, ...]"
    groups: tuple[int, ...]
    refresh_steps: int


def read_query_sets(trail: "Trail", references: Sequence[str], tokenizer: Any, *, max_length: int) -> list[QuerySet]:
    """Return the sets by reference: a suite file, a refined dataset by name or digest, or a stored suite's digest.

    A suite file is put into the store, so that the run can be repeated from its record.

    Raises:
        QueryError: no such file or dataset, one without a usable query, or two sets of one name.
    """
    sets = [_read(trail, reference, tokenizer, max_length) for reference in references]
    names = [found.name for found in sets]
    for name in names:
        if names.count(name) > 1:
            raise QueryError(f"train.query_sets: two sets are called {name!r}; rename one of the files")
    for reference in references:
        if Path(reference).is_file():
            trail.store.put_blob(Path(reference))
    return sets


def register(sets: Sequence[QuerySet], settings: TrainSettings, *, tokens_per_step: float) -> Registered | None:
    """Lay out the columns of the scores and choose how often gradients are taken; None without a query set.

    `tokens_per_step`: of a global batch, on average.
    """
    columns: list[ScoredQuery] = []
    queries: list[Encoded] = []
    groups: list[int] = []
    for found in sets:
        parts = [(item.item_id, [item]) for item in found.items] if settings.in_run_per_query else [("", found.items)]
        for query, items in parts:
            queries += [item.encoded for item in items]
            groups += [len(columns)] * len(items)
            num_tokens = sum(num_targets(item.encoded[1]) for item in items)
            columns.append(ScoredQuery(found.name, found.artefact.digest, query, len(items), num_tokens))
    if not columns:
        return None
    affordable = refresh_steps(sum(len(ids) for ids, _ in queries), tokens_per_step=tokens_per_step)
    return Registered(tuple(columns), tuple(queries), tuple(groups), settings.in_run_refresh_steps or affordable)


def refresh_steps(num_tokens: int, *, tokens_per_step: float) -> int:
    """Return the least number of steps between refreshes of queries of so many tokens that keeps to REFRESH_SHARE."""
    return math.ceil(num_tokens / (REFRESH_SHARE * tokens_per_step))


def stale_warning(refresh_steps: int, *, num_steps: int) -> list[str]:
    """Warn of a run that is too short for its queries: most of it is scored along gradients of long ago."""
    num_refreshes = math.ceil(num_steps / refresh_steps)
    if num_refreshes >= MIN_REFRESHES:
        return []
    return [
        f"in-run scores: the queries' gradients are renewed {num_refreshes} times in {num_steps} steps, too few: "
        f"give fewer queries, or train.in_run_refresh_steps = {max(1, num_steps // MIN_REFRESHES)} and more time"
    ]


def warnings(sets: Sequence[QuerySet], examples: Sequence[Example]) -> list[str]:
    """Say in words what makes scores of these sets mean less than they seem to."""
    trained = {example.encoded: example.example_id for example in examples}
    found = []
    for queries in sets:
        same = [(item, trained[item.encoded]) for item in queries.items if item.encoded in trained]
        if same:
            item, example_id = same[0]
            found.append(
                f"query set {queries.name}: {len(same)} of its {len(queries.items)} queries are training rows too "
                f"({item.item_id} is row {example_id[:19]}); a row is credited for itself, so read their scores as "
                "memorisation"
            )
        single = [item.item_id for item in queries.items if num_targets(item.encoded[1]) == 1]
        if single:
            found.append(
                f"query set {queries.name}: {len(single)} answers have one token only ({single[0]}); one token's "
                "gradient says little about an answer"
            )
    return found


def artefact_of(trail: "Trail", reference: str) -> "Artefact":
    """Return what a reference to a query set means, by digest. Raises QueryError for one that means nothing."""
    from attribution.records import Artefact
    from attribution.store import digest_of
    from pipelines.train.refined import TrainError, resolve_refined

    path = Path(reference)
    if path.is_file():
        return Artefact("suite", path.stem, digest_of(path.read_bytes()))
    if reference.startswith("sha256:") and trail.store.has(reference) and trail.store.path_of(reference).is_file():
        return Artefact("suite", _recorded_name(trail, reference), reference)
    try:
        return resolve_refined(trail, reference).artefact
    except TrainError as error:
        raise QueryError(f"query set {reference!r}: no such file; {error}") from error


def _read(trail: "Trail", reference: str, tokenizer: Any, max_length: int) -> QuerySet:
    artefact = artefact_of(trail, reference)
    if artefact.kind == "suite":
        rows = _suite_rows(Path(reference) if Path(reference).is_file() else trail.store.path_of(artefact.digest))
    else:
        rows = _refined_rows(trail, artefact.digest)
    return _encoded(artefact, rows, tokenizer, max_length)


def _suite_rows(path: Path) -> list[tuple[str, list[dict[str, str]]]]:
    from pipelines.benchmark.suites import read_suite

    return [
        (item.item_id, [_turn("user", item.prompt), _turn("assistant", item.reference)]) for item in read_suite(path)
    ]


def _refined_rows(trail: "Trail", digest: str) -> list[tuple[str, list[dict[str, str]]]]:
    from pipelines.refine.read import load_refined

    # By place: an example's id follows from its content, and would outlive the example's erasure in the trace.
    messages = load_refined(trail, digest).column("messages").to_pylist()
    return [(f"row {number}", turns) for number, turns in enumerate(messages)]


def _encoded(
    artefact: "Artefact", rows: Sequence[tuple[str, list[dict[str, str]]]], tokenizer: Any, max_length: int
) -> QuerySet:
    if not rows:
        raise QueryError(f"query set {artefact.name}: it has no rows; there is nothing to score against")
    items = []
    for item_id, messages in rows:
        try:
            input_ids, labels = encode_example(tokenizer, messages, max_length=max_length)
        except EncodeError as error:
            raise QueryError(f"query set {artefact.name}, query {item_id}: {error}") from error
        items.append(QueryItem(item_id, conversation_text(messages), (tuple(input_ids), tuple(labels))))
    return QuerySet(artefact, tuple(items))


def _recorded_name(trail: "Trail", digest: str) -> str:
    """Return the name under which a record took the suite in, so that a repeated run names its scores alike."""
    for entry in trail.entries():
        if entry.record is not None:
            for source in entry.record.inputs:
                if source.digest == digest:
                    return source.name
    return digest.removeprefix("sha256:")[:12]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
