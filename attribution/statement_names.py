"""What the parties of a statement are called today.

Names stand in records of their own, which may be erased; a statement holds ids alone, so that erasing a person leaves
it as it was signed.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attribution.bodies import BaseModelBody
from attribution.lineage import Lineage
from attribution.settlement import player_name
from attribution.statement import Statement, Withheld
from attribution.trust_file import OPERATOR

if TYPE_CHECKING:
    from attribution.trail import Trail

Names = Mapping[str, str]


def names_of(trail: "Trail", statement: Statement) -> dict[str, str]:
    """Return the names of everybody whom a statement pays or names as an owner, by id."""
    people = {**Lineage(trail).contributor_names(), trail.keys.get(OPERATOR).key_id: OPERATOR}
    found = {}
    owners = {(line.kind, line.owner) for line in statement.copies}
    for kind, party in sorted(owners | {(line.kind, line.id) for line in statement.payouts}):
        found[party] = people.get(party) or _base_name(trail, party) or player_name(trail, kind, party)
    return found


def names_of_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the contributors' names that the records of a verified file tell, by key id."""
    return {person["key_id"]: person["name"] for person in facts["contributors"] if person["name"]}


def name_of(names: Names, party: str) -> str:
    """Return a party's name, or the beginning of its id where nothing tells it."""
    return names.get(party) or party.removeprefix("sha256:")[:12]


def withheld_from(item: Withheld, names: Names) -> str:
    """Return whose part is withheld, in a few words."""
    rows = f", {item.num_rows} rows" if item.num_rows else ""
    return f"{item.kind.replace('_', ' ')} {name_of(names, item.id)}{rows}"


def _base_name(trail: "Trail", digest: str) -> str:
    entry = trail.find(digest) if digest.startswith("sha256:") else None
    body = entry.record.body if entry is not None and entry.record is not None else None
    return f"{body.name} ({body.source})" if isinstance(body, BaseModelBody) else ""
