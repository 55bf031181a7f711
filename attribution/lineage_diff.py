"""What changed between two versions, and what it did to the score.

Changes are read from the two records and all they were made from; the score from benchmarks that asked both the same
items. A change and a score standing side by side are no proof that one made the other: `missing` says what would be.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from attribution.bodies import AdapterBody, BenchmarkBody, RefinementBody
from attribution.evidence import MICRO, Spread, recorded_confidence, verdict_of, version_change
from attribution.lineage_graph import LineageGraph, Node
from attribution.lineage_layout import LineageError
from attribution.lineage_names import Reference
from attribution.lineage_queries import LineageQueries
from attribution.people import first_keys
from attribution.questions import Resampling
from attribution.records import Record, to_plain

if TYPE_CHECKING:
    from attribution.trail import Trail

VERSIONED = re.compile(r"(?P<name>[^@]+)@(?P<version>[1-9][0-9]*)")
# In a body, but said elsewhere in the answer: what the thing is called, and digests of what is compared by content.
OMITTED = frozenset({"name", "per_contributor", "dropped", "rules"})


@dataclass(frozen=True)
class Side:
    """One of the two versions."""

    reference: str
    leaf_hash: str
    kind: str
    time_us: int
    publications: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One thing that is not the same; None where a side has none. Lists and numbers are told as text."""

    what: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class InputChange:
    """A record that only one of the two was made from."""

    change: str
    kind: str
    label: str | None
    leaf_hash: str


@dataclass(frozen=True)
class RowChange:
    """One contributor's rows in the two refined datasets; added and removed are None when a table was erased."""

    contributor: str
    key_id: str
    before: int
    after: int
    added: int | None
    removed: int | None


@dataclass(frozen=True)
class ScoreChange:
    """One metric of one suite: each version against its base as recorded, and the newer against the older.

    `difference` pairs the items both were asked; None when the tables of answers are gone or the suites differ.
    """

    suite: str
    metric: str
    before: Spread | None
    after: Spread | None
    difference: Spread | None
    verdict: str
    recorded_confidence: float | None
    links: tuple[str, ...]


@dataclass(frozen=True)
class VersionDiff:
    """Everything that differs between two versions; an empty tuple is no difference."""

    older: Side
    newer: Side
    summary: str
    inputs: tuple[InputChange, ...]
    rows: tuple[RowChange, ...]
    rules: tuple[Change, ...]
    facts: tuple[Change, ...]
    config: tuple[Change, ...]
    code: tuple[Change, ...]
    packages: tuple[Change, ...]
    scores: tuple[ScoreChange, ...]
    missing: tuple[str, ...]
    method: str
    confidence: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, floats rounded to a millionth."""
        from attribution.influence.answer import plain

        return plain(asdict(self))


_Benchmark = tuple[str, BenchmarkBody, float | None]  # leaf hash, what was measured, confidence of its intervals


@dataclass(frozen=True)
class _Version:
    """A side with its record, its ancestors, its refinement and its newest benchmark of each suite."""

    side: Side
    record: Record
    ancestors: Mapping[str, Node]
    refinement: RefinementBody | None
    benchmarks: Mapping[str, _Benchmark]


def diff(trail: "Trail", older: str, newer: str | None = None, *, resampling: Resampling | None = None) -> VersionDiff:
    """Return what changed from `older` to `newer`; from the version before to NAME@VERSION when only that is given.

    Raises:
        LineageError: something that is not one record, two kinds of thing, an erased record, or a first version.
    """
    if newer is None:
        older, newer = _version_before(trail, older), older
    queries = LineageQueries.of(trail)
    before, after = (_version(trail, queries, text) for text in (older, newer))
    if before.side.kind != after.side.kind:
        raise LineageError(
            f"{older!r} is of kind {before.side.kind}, {newer!r} of kind {after.side.kind}: give two of one kind"
        )
    resampling = resampling or Resampling()
    missing: list[str] = []
    rows = tuple(_rows(trail, before, after, missing))
    config = _config(trail, before, after, missing)
    scores = tuple(_scores(trail, before, after, missing, resampling))
    inputs = tuple(_inputs(before, after))
    missing.append("cause: train again with one of these changes at a time and benchmark on the same suite")
    return VersionDiff(
        older=before.side,
        newer=after.side,
        summary=_summary(inputs, rows, config, scores),
        inputs=inputs,
        rows=rows,
        rules=_changes(_rules(before), _rules(after)),
        facts=_changes(_facts(before.record), _facts(after.record)),
        config=config,
        code=_changes(_making(before.record), _making(after.record)),
        packages=_packages(trail, before, after),
        scores=scores,
        missing=tuple(missing),
        method="newer minus older over the items both were asked, paired by item; Dirichlet bootstrap over items",
        confidence=resampling.confidence,
        seed=resampling.seed,
    )


def _version_before(trail: "Trail", text: str) -> str:
    match = VERSIONED.fullmatch(text)
    name = match["name"] if match else text
    versions = sorted(item.version for item in trail.registry.list() if item.name == name)
    earlier = [version for version in versions if version < int(match["version"])] if match else versions[:-1]
    if not earlier:
        LineageQueries.of(trail).resolve(text)  # a name that nobody has is told first, with the nearest
        raise LineageError(f"{text!r}: no earlier published version to compare with; give two names, digests or leaves")
    return f"{name}@{earlier[-1]}"


def _version(trail: "Trail", queries: LineageQueries, text: str) -> _Version:
    reference = queries.resolve(text)
    if reference.is_part or len(reference.above) != 1:
        raise LineageError(f"{text!r}: {reference.title}; a diff takes two records, for example NAME@1 and NAME@2")
    entry = trail.entry(reference.above[0])
    if entry.record is None:
        raise LineageError(f"{text!r}: its record was erased, so nothing is left to compare")
    record = entry.record
    return queries.ask(lambda graph: _read(trail, graph, reference, record))


def _read(trail: "Trail", graph: LineageGraph, reference: Reference, record: Record) -> _Version:
    (number,) = reference.above
    (node,) = graph.nodes([number])
    published = graph.nodes(graph.children_of_kind(number, "publication"))
    benchmarks = {}
    for child in graph.children_of_kind(number, "benchmark"):
        entry = trail.entry(child)
        if entry.record is not None and isinstance(entry.record.body, BenchmarkBody):
            body = entry.record.body
            benchmarks[body.suite] = (entry.leaf_hash, body, recorded_confidence(trail, entry.record.config))
    return _Version(
        side=Side(
            reference.text, node.leaf_hash, node.kind, node.time_us, tuple(n.label for n in published if n.label)
        ),
        record=record,
        ancestors={up.leaf_hash: up for up in graph.nodes(graph.up([number])) if up.index != number},
        refinement=_refinement(trail, record),
        benchmarks=benchmarks,
    )


def _refinement(trail: "Trail", record: Record) -> RefinementBody | None:
    """The refinement that a record is, or whose rows an adapter was trained on."""
    entry = trail.find(record.body.dataset) if isinstance(record.body, AdapterBody) else None
    body = record.body if entry is None else entry.record and entry.record.body
    return body if isinstance(body, RefinementBody) else None


def _inputs(before: _Version, after: _Version) -> Iterator[InputChange]:
    for change, here, there in (("added", after, before), ("removed", before, after)):
        for leaf_hash, node in sorted(here.ancestors.items(), key=lambda item: item[1].index):
            if leaf_hash not in there.ancestors:
                yield InputChange(change, node.kind, node.label, leaf_hash)


def _rows(trail: "Trail", before: _Version, after: _Version, missing: list[str]) -> Iterator[RowChange]:
    """Rows per contributor: counts from the records, what came and went from the tables of rows."""
    sides = (before.refinement, after.refinement)
    if not all(sides):
        return
    first = first_keys(trail)
    tables = [_row_ids(trail, body, first) for body in sides if body]
    if not all(table is not None for table in tables):
        missing.append("which rows came and went: a table of refined rows was erased")
    names = trail_names(trail)
    counts = [_kept(body, first) for body in sides if body]
    for key_id in dict.fromkeys([*counts[0], *counts[1]]):
        old, new = (None if table is None else table.get(key_id, set()) for table in tables)
        added = None if old is None or new is None else len(new - old)
        removed = None if old is None or new is None else len(old - new)
        kept = (counts[0].get(key_id, 0), counts[1].get(key_id, 0))
        if kept[0] != kept[1] or added or removed:
            yield RowChange(names.get(key_id, key_id[:12]), key_id, *kept, added, removed)


def trail_names(trail: "Trail") -> dict[str, str]:
    """Return contributor names by key id."""
    from attribution.lineage import Lineage

    return Lineage(trail).contributor_names()


def _kept(body: RefinementBody, first: Mapping[str, str]) -> dict[str, int]:
    """Rows kept by person, under the first of their keys."""
    counts: dict[str, int] = {}
    for part in body.per_contributor:
        person = first.get(part.key_id, part.key_id)
        counts[person] = counts.get(person, 0) + part.num_kept
    return counts


def _row_ids(trail: "Trail", body: RefinementBody, first: Mapping[str, str]) -> dict[str, set[str]] | None:
    """Example ids by person of a refined dataset's rows, None when the table was erased."""
    if not trail.store.has(body.rows):
        return None
    found: dict[str, set[str]] = {}
    for row in trail.get_table(body.rows).select(["example_id", "contributor"]).to_pylist():
        found.setdefault(first.get(row["contributor"], row["contributor"]), set()).add(row["example_id"])
    return found


def _rules(version: _Version) -> dict[str, str]:
    rules = version.refinement.rules if version.refinement else ()
    return {rule.name: f"{rule.params} ({rule.digest[7:19]})" for rule in rules}


def _facts(record: Record) -> dict[str, str]:
    plain = to_plain(record.body, record.kind)
    return {
        name: _text(value)
        for name, value in plain.items()
        if name not in OMITTED and not (isinstance(value, str) and value.startswith("sha256:"))
    }


def _making(record: Record) -> dict[str, str]:
    code = record.code
    values: dict[str, Any] = {
        "commit": code.commit + (" with local changes" if code.dirty else ""),
        "version": code.version,
        "seed": record.seed,
        "attempt": record.attempt,
    }
    return {name: _text(value) for name, value in values.items()}


def _config(trail: "Trail", before: _Version, after: _Version, missing: list[str]) -> tuple[Change, ...]:
    digests = [version.record.config for version in (before, after)]
    if digests[0] == digests[1]:
        return ()
    if not all(digest and trail.store.has(digest) for digest in digests):
        missing.append("which settings changed: a resolved configuration was not recorded or was erased")
        return ()
    return _changes(*(dict(_flat(trail.get_json(digest))) for digest in digests if digest))


def _packages(trail: "Trail", before: _Version, after: _Version) -> tuple[Change, ...]:
    environments = [version.record.environment for version in (before, after)]
    if environments[0] == environments[1] or not all(map(trail.store.has, environments)):
        return ()
    manifests = [trail.get_json(digest) for digest in environments]
    return _changes(*({**dict(one["packages"]), "python": one["python"]} for one in manifests))


def _scores(
    trail: "Trail", before: _Version, after: _Version, missing: list[str], resampling: Resampling
) -> Iterator[ScoreChange]:
    if after.side.kind == "adapter" and not before.benchmarks.keys() & after.benchmarks.keys():
        missing.append(
            f"score: no suite was asked of both; `trailmark benchmark {before.side.reference} --suite FILE`, "
            f"and the same of {after.side.reference}"
        )
    for suite in dict.fromkeys([*before.benchmarks, *after.benchmarks]):
        old, new = before.benchmarks.get(suite), after.benchmarks.get(suite)
        changes = version_change(trail, old[1], new[1], **asdict(resampling)) if old and new else {}
        if old and new and not changes:
            missing.append(f"score: the answers to {new[1].name} cannot be paired; a table of them was erased")
        yield from _suite_scores([side for side in (old, new) if side], old, new, changes)


def _suite_scores(
    measured: Sequence[_Benchmark], old: _Benchmark | None, new: _Benchmark | None, changes: Mapping[str, Spread]
) -> Iterator[ScoreChange]:
    sides = [_recorded(side[1]) if side else {} for side in (old, new)]
    _, body, confidence = measured[-1]
    links = tuple(leaf_hash for leaf_hash, _, _ in measured)
    for metric in dict.fromkeys([*sides[0], *sides[1]]):
        difference = changes.get(metric)
        verdict = "not compared" if difference is None else verdict_of(metric, difference)
        yield ScoreChange(
            body.name, metric, sides[0].get(metric), sides[1].get(metric), difference, verdict, confidence, links
        )


def _recorded(body: BenchmarkBody) -> dict[str, Spread]:
    """Adapter minus base of each metric, as recorded."""
    return {
        metric.metric: Spread(metric.delta_micro / MICRO, metric.low_micro / MICRO, metric.high_micro / MICRO)
        for metric in body.metrics
    }


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[Change, ...]:
    names: Iterable[str] = dict.fromkeys([*before, *after])
    return tuple(
        Change(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)
    )


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of nested settings as (dotted name, text)."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def _summary(
    inputs: Sequence[InputChange], rows: Sequence[RowChange], config: Sequence[Change], scores: Sequence[ScoreChange]
) -> str:
    datasets = [f"{'+' if item.change == 'added' else '-'}{item.label}" for item in inputs if item.kind == "dataset"]
    kept = sum(row.after - row.before for row in rows)
    changed = [f"datasets {', '.join(datasets)}"] if datasets else []
    changed += [f"{kept:+d} rows"] if rows else []
    changed += [f"{len(config)} setting{'' if len(config) == 1 else 's'}"] if config else []
    told = [
        f"{score.metric} on {score.suite} {score.verdict} ({score.difference.value:+.3f})"
        for score in scores
        if score.difference is not None
    ]
    return f"{', '.join(changed) or 'nothing recorded differs'}; {'; '.join(told) or 'no score compares them'}"
