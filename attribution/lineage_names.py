"""Which records a user means: receipt ids, example ids, NAME@VERSION, names, key ids, digests, leaf hashes, beginnings.

`KIND:NAME` says which of several things of one name is meant: `rule:length`, `contributor:mira`, `dataset:facts`,
`row:1a2b3c4d`. What means nothing, or several things, is refused with the nearest there is.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from attribution.lineage_facts import KEY, MADE, MENTIONED, RULE, USED
from attribution.lineage_layout import LineageError

if TYPE_CHECKING:
    from attribution.lineage_graph import LineageGraph

QUALIFIED = re.compile(r"(?P<role>[a-z_]+):(?P<rest>.+)", re.DOTALL)
DIGEST = re.compile(r"sha256:(?P<digits>[0-9a-fA-F]{6,64})")
DIGITS = re.compile(r"[0-9a-fA-F]{6,64}")
NUMBER = re.compile(r"[0-9]{1,5}")
ROLE_ALIASES = {"refined": "refinement", "workflow": "workflow_patch", "benchmark_suite": "benchmark"}
PUBLISHED, RECORD, DIGEST_ROLE, ROW, RECEIPT = "published", "record", "digest", "row", "receipt"
KEY_ROTATION = "key_rotation"  # says a contributor's name once more
MIN_ROW_DIGITS = 8  # as `trailmark dataset why` asks for
MAX_CANDIDATES = 5
MAX_COMPARED = 5000
# What a digest stands for, the strongest first: who made it comes before who used it.
DIGEST_ROLES = (MADE, KEY, RULE, USED, MENTIONED)


@dataclass(frozen=True)
class Reference:
    """What a text means: what is above it begins at `above`, what is below it at `below`.

    Records made by it (`is_part` False) are not its own descendants; a row, a rule or a receipt is no record, so the
    records that it begins at count among the found ones (`is_part` True). `tenant` is whose receipt it is.
    """

    text: str
    role: str
    title: str
    above: tuple[int, ...]
    below: tuple[int, ...]
    is_part: bool = False
    tenant: str | None = None


def of_record(graph: "LineageGraph", number: int, text: str) -> Reference:
    """Return the reference to one record."""
    (node,) = graph.nodes([number])
    title = f"{node.kind.replace('_', ' ')} {node.label or node.leaf_hash[:12] + ' (erased)'}"
    return Reference(text, RECORD, title, (number,), (number,))


def resolve_name(graph: "LineageGraph", text: str) -> Reference | None:
    """Return what a name, digest, leaf hash, log index or an unambiguous beginning means; None when nothing is known.

    LineageError when it means several things.
    """
    found = _named(graph, text, text)
    if found is not None:
        return found
    qualified = QUALIFIED.fullmatch(text)
    if qualified is not None and qualified["role"] != "sha256":
        role = ROLE_ALIASES.get(qualified["role"], qualified["role"])
        return _named(graph, qualified["rest"], text, role=role) or _hashed(graph, qualified["rest"], text, role=role)
    if NUMBER.fullmatch(text):
        return of_record(graph, int(text), text) if int(text) < graph.size else None
    return _hashed(graph, text, text)


def row_digits(text: str) -> str | None:
    """Return the hex digits of what may be an example id, or the beginning of one; None for anything else."""
    qualified = QUALIFIED.fullmatch(text)
    rest = qualified["rest"] if qualified is not None and qualified["role"] == ROW else text
    digest = DIGEST.fullmatch(rest)
    digits = (digest["digits"] if digest else rest).lower()
    return digits if DIGITS.fullmatch(digits) and len(digits) >= MIN_ROW_DIGITS else None


def candidates(graph: "LineageGraph", text: str) -> list[str]:
    """Return names and hashes that look like `text`, the nearest first."""
    qualified = QUALIFIED.fullmatch(text)
    wanted = qualified["rest"] if qualified else text
    names = dict.fromkeys(_known_names(graph, wanted))
    near = get_close_matches(wanted, names, n=MAX_CANDIDATES, cutoff=0.5)
    digits = wanted.lower()
    if not near and DIGITS.fullmatch(digits):
        for length in range(len(digits) - 1, 3, -1):
            near = [f"{leaf} ({kind})" for leaf, kind in _leaves(graph, digits[:length])]
            if near:
                break
    return near


def _named(graph: "LineageGraph", name: str, text: str, *, role: str | None = None) -> Reference | None:
    """A published name wins over a recorded one; of versions and records of one role the newest, of rules all."""
    base, _, version = name.partition("@")
    query = "SELECT version, role, id FROM name WHERE name = ? ORDER BY version, id"
    rows = graph.database.execute(query, (base,)).fetchall()
    if role in (None, PUBLISHED):
        published = {row[0]: row[2] for row in reversed(rows) if row[1] == PUBLISHED}  # the first of a version stands
        if version.isdigit() and int(version) in published:
            return _publication(graph, published[int(version)], text)
        if published and not version:
            return _publication(graph, published[max(published)], text)
    by_role: dict[str, list[int]] = {}
    for _, of_role, number in rows if not version else ():
        if of_role == role or (role is None and of_role not in (PUBLISHED, KEY_ROTATION)):
            by_role.setdefault(of_role, []).append(number)
    if len(by_role) > 1:
        ways = ", ".join(f"{one}:{name}" for one in sorted(by_role))
        raise LineageError(f"{text!r}: means several things; give one of {ways}")
    for of_role, numbers in by_role.items():
        return _of_role(graph, of_role, numbers, text)
    return None


def _publication(graph: "LineageGraph", number: int, text: str) -> Reference:
    """A published name means the record that made the artefact; the publication itself when that is not in this log."""
    (node,) = graph.nodes([number])
    start = next(iter(graph.parents([number])[number]), number)  # the first input's maker is the first parent
    (made,) = graph.nodes([start])
    return Reference(text, PUBLISHED, f"{node.label} ({made.kind.replace('_', ' ')})", (start,), (start,))


def _of_role(graph: "LineageGraph", role: str, numbers: Sequence[int], text: str) -> Reference:
    if role == RULE:
        title = f"rule {text.removeprefix('rule:')}, used by {len(numbers)} refinements"
        return Reference(text, RULE, title, tuple(numbers), tuple(numbers), is_part=True)
    if role == "contributor":
        (node,) = graph.nodes(numbers[-1:])
        return Reference(text, role, f"contributor {node.label}", tuple(numbers), tuple(numbers))
    return of_record(graph, numbers[-1], text)


def _hashed(graph: "LineageGraph", digits: str, text: str, *, role: str | None = None) -> Reference | None:
    """A leaf hash, digest or key id, or the beginning of one."""
    is_digest = DIGEST.fullmatch(digits)
    digits = (is_digest["digits"] if is_digest else digits).lower()
    if not DIGITS.fullmatch(digits) or role == ROW:
        return None
    leaves = [] if is_digest else _leaves(graph, digits)
    digests = _digests(graph, digits, role)
    if len(leaves) + len(digests) > 1:
        ways = [f"{leaf[:16]} ({kind})" for leaf, kind in leaves] + [f"sha256:{digest[:16]}" for digest in digests]
        raise LineageError(f"{text!r}: several hashes begin so: {', '.join(ways[:MAX_CANDIDATES])}; give more digits")
    if leaves:
        number = graph.number(leaves[0][0])
        assert number is not None
        return of_record(graph, number, text)
    for digest in digests:
        return _of_digest(graph, digest, text, role)
    return None


def _leaves(graph: "LineageGraph", digits: str) -> list[tuple[str, str]]:
    query = "SELECT leaf, kind FROM record WHERE leaf BETWEEN ? AND ? ORDER BY leaf LIMIT ?"
    rows = graph.database.execute(query, (*digit_range(digits), MAX_CANDIDATES))
    return [(leaf.hex(), graph.kinds[code]) for leaf, code in rows]


def _digests(graph: "LineageGraph", digits: str, role: str | None) -> list[str]:
    query = "SELECT DISTINCT digest FROM digest WHERE digest BETWEEN ? AND ? AND ? IN (role, '') LIMIT ?"
    wanted = role if role in DIGEST_ROLES else ""
    rows = graph.database.execute(query, (*digit_range(digits), wanted, MAX_CANDIDATES))
    return [digest.hex() for (digest,) in rows]


def _of_digest(graph: "LineageGraph", digest: str, text: str, role: str | None) -> Reference:
    """The newest record that made it; else all that ran it as a rule or used it."""
    query = "SELECT role, id FROM digest WHERE digest = ? ORDER BY id"
    rows = graph.database.execute(query, (bytes.fromhex(digest),)).fetchall()
    for wanted in DIGEST_ROLES:
        numbers = tuple(number for of_role, number in rows if of_role == wanted)
        if not numbers or (role not in (None, wanted) and role in DIGEST_ROLES):
            continue
        if wanted in (MADE, MENTIONED):
            return of_record(graph, numbers[-1], text)
        if wanted == KEY:
            return _of_role(graph, "contributor", numbers, text)
        what = "rule" if wanted == RULE else "input"
        title = f"{what} sha256:{digest[:12]}, of {len(numbers)} records"
        return Reference(text, wanted, title, numbers, numbers, is_part=True)
    raise AssertionError("a digest in the index has a role")


def digit_range(digits: str) -> tuple[bytes, bytes]:
    """The least and the greatest 32 bytes that begin with some hex digits."""
    return bytes.fromhex(digits.ljust(64, "0")), bytes.fromhex(digits.ljust(64, "f"))


def _known_names(graph: "LineageGraph", near: str) -> Iterator[str]:
    """Names with the same first letter, then any others, published ones with each version."""
    query = "SELECT DISTINCT name, version FROM name ORDER BY substr(name, 1, 1) <> ?, name LIMIT ?"
    for name, version in graph.database.execute(query, (near[:1], MAX_COMPARED)):
        yield name
        if version:
            yield f"{name}@{version}"
