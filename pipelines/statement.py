"""Which rows behind settled players are later copies of somebody else's: registered rows, clustered, counted.

Whose a row is comes from the signed contribution that registered it, never from a column of a table made later, so that
relabelling a refined dataset pays nobody.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from attribution.bodies import AdapterBody
from attribution.people import first_keys
from attribution.priority import NearDuplicates, Priority, RegisteredRow, prioritise
from attribution.settlement import Settlement
from attribution.statement import ClusterLine, Copies, Policy, StatementError, Withheld
from attribution.statement_make import CopyFindings
from pipelines.refine.read import Contribution, contributions, contributor_names, load_refined, verified_rows

if TYPE_CHECKING:
    from attribution.trail import Trail

MILLION = 1_000_000
DATA_KINDS = ("contributor", "dataset")


def find_copies(trail: "Trail", settlements: Sequence[Settlement], policy: Policy) -> CopyFindings:
    """Return row counts and copies of the players that are made of rows, over everything registered in this log."""
    if not settlements:
        return CopyFindings({})
    rows, void = registered_rows(trail), void_rows(trail)
    known = {**void, **rows}
    priority = prioritise(list(rows.values()), near_duplicates(policy))
    num_rows: Counter[tuple[str, str, str]] = Counter()
    copies: Counter[tuple[str, str, str, str]] = Counter()
    revoked: dict[tuple[str, str, str], list[RegisteredRow]] = defaultdict(list)
    for settlement in settlements:
        learnt = learnt_rows(trail, settlement.adapter, known)
        for kind in DATA_KINDS:
            player_of = _players(trail, settlement, kind)
            for row in learnt if player_of is not None else ():
                assert player_of is not None
                player = player_of(row)
                if row.row_id not in rows:
                    revoked[settlement.adapter, kind, player].append(row)
                    continue
                num_rows[settlement.adapter, kind, player] += 1
                if priority.owner[row.row_id] != row.contributor:
                    owner = player_of(rows[priority.first[row.row_id]])
                    copies[settlement.adapter, kind, player, owner] += 1
    lines = tuple(
        Copies(adapter, kind, player, owner, count) for (adapter, kind, player, owner), count in sorted(copies.items())
    )
    return CopyFindings(num_rows, lines, shared_clusters(priority, rows), _withheld(trail, revoked))


def _withheld(trail: "Trail", revoked: Mapping[tuple[str, str, str], Sequence[RegisteredRow]]) -> tuple[Withheld, ...]:
    """A line for each player of whose rows some are signed with a revoked key."""
    why = {item.origin.leaf_index: item.void.why for item in contributions(trail) if item.void is not None}
    found = []
    for (adapter, kind, player), rows in sorted(revoked.items()):
        places = sorted({row.leaf_index for row in rows})
        reason = "; ".join(dict.fromkeys(why[place] for place in places))
        leaves = tuple(trail.entry(place).leaf_hash for place in places)
        found.append(Withheld(adapter, kind, player, len(rows), leaves, reason))
    return tuple(found)


def near_duplicates(policy: Policy) -> NearDuplicates:
    """Return how alike rows must be under a policy."""
    return NearDuplicates(policy.near_duplicates, policy.lexical_micro / MILLION, policy.semantic_micro / MILLION)


def registered_rows(trail: "Trail") -> dict[str, RegisteredRow]:
    """Return every registered row by its id. A contributor whose key was rotated is one person, by the first key.

    What a revoked key registered is left out: it claims no priority and is no copy.
    """
    return _rows(trail, [contribution for contribution in contributions(trail) if contribution.void is None])


def void_rows(trail: "Trail") -> dict[str, RegisteredRow]:
    """Return every row that a revoked key registered, by its id."""
    return _rows(trail, [contribution for contribution in contributions(trail) if contribution.void is not None])


def _rows(trail: "Trail", chosen: Sequence[Contribution]) -> dict[str, RegisteredRow]:
    first_key = first_keys(trail)
    rows: dict[str, RegisteredRow] = {}
    for contribution in chosen:
        origin = contribution.origin
        for row in pq.read_table(verified_rows(trail, contribution)).to_pylist():
            messages = tuple((message["role"], message["content"]) for message in row["messages"] or ())
            whose = first_key.get(origin.contributor, origin.contributor)
            found = RegisteredRow(row["contribution_id"], whose, origin.leaf_index, row["line_number"], messages)
            rows.setdefault(found.row_id, found)  # equal lines of one file have one id
    return rows


def learnt_rows(trail: "Trail", adapter: str, rows: Mapping[str, RegisteredRow]) -> list[RegisteredRow]:
    """Return the registered rows that an adapter was trained on; a row that was erased since is none.

    Raises:
        StatementError: the adapter's dataset gives a row to another than the contribution that registered it.
    """
    entry = trail.find(adapter)
    body = entry.record.body if entry is not None and entry.record is not None else None
    if not isinstance(body, AdapterBody):
        return []
    first_key, names = first_keys(trail), contributor_names(trail)
    found = []
    for row_id, labelled in zip(*_columns(trail, body.dataset, "example_id", "contributor"), strict=True):
        row = rows.get(row_id)
        if row is None:
            continue
        if first_key.get(labelled, labelled) != row.contributor:
            raise StatementError(
                f"row {row_id}: the dataset {body.dataset} of adapter {adapter} gives it to "
                f"{names.get(labelled, labelled[:16])}, but {names.get(row.contributor, row.contributor[:16])} "
                "registered it; refine and train again from the contributions"
            )
        found.append(row)
    return found


def _columns(trail: "Trail", dataset: str, *names: str) -> list[list[str]]:
    table = load_refined(trail, dataset)
    return [table.column(name).to_pylist() for name in names]


def shared_clusters(priority: Priority, rows: dict[str, RegisteredRow]) -> tuple[ClusterLine, ...]:
    """Return the clusters that rows of several contributors are in."""
    found = []
    for cluster in priority.clusters():
        contributors = tuple(rows[row_id].contributor for row_id in cluster.row_ids)
        if len(set(contributors)) > 1:
            found.append(ClusterLine(contributors, cluster.row_ids))
    return tuple(found)


def _players(trail: "Trail", settlement: Settlement, kind: str) -> Callable[[RegisteredRow], str] | None:
    """Say which player of a kind a row belongs to, by the settlement's id for it; None when it has none of the kind."""
    ids = {player.id for player in settlement.players if player.kind == kind}
    if not ids:
        return None
    if kind == "contributor":
        first_key = first_keys(trail)
        known = {first_key.get(name, name): name for name in ids}
        return lambda row: known.get(row.contributor, row.contributor)
    named: dict[int, str] = {}
    for contribution in contributions(trail):
        origin = contribution.origin
        names = (origin.dataset, contribution.rows, contribution.name)
        named[origin.leaf_index] = next((name for name in names if name in ids), origin.dataset)
    return lambda row: named[row.leaf_index]
