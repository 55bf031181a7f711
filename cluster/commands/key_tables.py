"""What the key commands print: every key with its state, and what the log tells of each."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from attribution.bodies import ContributorBody, KeyRevocationBody, KeyRotationBody
from attribution.key_changes import current_key, key_ids_of_name
from attribution.keys import ENCRYPTED_MARK, URI_ENDING
from attribution.log.facts import utc
from attribution.trail import Trail
from configs.errors import UserError

SHORT = 16


@dataclass(frozen=True)
class KeyEvent:
    """One thing that happened to a key."""

    time: str
    name: str
    key_id: str
    what: str
    detail: str
    leaf_hash: str


def key_events(trail: Trail, name: str | None = None) -> Iterator[KeyEvent]:
    """Yield what the log tells of keys, oldest first; of one name if given."""
    for entry in trail.entries():
        body = entry.record.body if entry.record is not None else None
        if not isinstance(body, ContributorBody | KeyRotationBody | KeyRevocationBody) or name not in (None, body.name):
            continue
        what, detail = "introduced", f"{body.name} joined"
        if isinstance(body, KeyRotationBody):
            what, detail = "rotated", f"took the place of {body.old_key_id[:SHORT]}"
        elif isinstance(body, KeyRevocationBody):
            what, detail = "revoked", f"from {utc(body.from_us)} on: {body.reason}"
        yield KeyEvent(utc(entry.leaf.time_us), body.name, body.key_id, what, detail, entry.leaf_hash)


def history_table(trail: Trail, name: str | None) -> Table:
    """Return the events as a table."""
    events = list(key_events(trail, name))
    if name is not None and not events:
        current_key(trail, name)  # says so when nobody has that name
    table = Table(title="Keys in the log", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("time", "name", "key", "what", "detail", "record"):
        table.add_column(heading, no_wrap=heading != "detail")
    for event in events:
        key, record = event.key_id[:SHORT], event.leaf_hash[:12]
        table.add_row(event.time, event.name, key, event.what, event.detail, record)
    return table


def key_table(trail: Trail) -> Table:
    """Return every name that has a key here or in the log, with the key in use and its state."""
    revoked = {event.key_id: event.detail for event in key_events(trail) if event.what == "revoked"}
    names = dict.fromkeys(["operator", "log", *trail.keys.list(), *(event.name for event in key_events(trail))])
    table = Table(title="Keys in use", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("name", "key", "private half", "state", "before"):
        table.add_column(heading)
    for name in names:
        try:
            key = current_key(trail, name)
        except UserError:
            table.add_row(name, trail.keys.get(name).key_id[:SHORT], where_of(trail, name), "no record", "")
            continue
        num_before = len(key_ids_of_name(trail, name)) - 1
        state = f"revoked {revoked[key.key_id]}" if key.key_id in revoked else "in use"
        table.add_row(name, key.key_id[:SHORT], where_of(trail, name), state, str(num_before or ""))
    return table


def where_of(trail: Trail, name: str) -> str:
    """Return where the private half of a name's key is."""
    file = trail.keys.file_of(name)
    if file is None:
        return "not here"
    if file.suffix == URI_ENDING:
        return "elsewhere, by URI"
    return "encrypted file" if ENCRYPTED_MARK in file.read_bytes() else "plain file"
