"""What the lineage index keeps of a private record: names, digests, a label. Read fast, and only from proven bytes.

A private half is {"envelope": ..., "salt": "<64 hex>"} in RFC 8785 JSON, so the envelope's canonical bytes lie in it as
they were committed to. Cut out and hashed with the salt they are proven to be those bytes; parsing and writing them
again, which costs ten times as much, would prove nothing more.
"""

import json
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attribution.records import SALT_BYTES, RecordError, commitment_of

HEAD, MIDDLE, TAIL = b'{"envelope":', b',"salt":"', b'"}'
SALT_START = -(len(TAIL) + 2 * SALT_BYTES)
DIGEST_PREFIX = "sha256:"
MADE, USED, RULE, MENTIONED, KEY = "made", "used", "rule", "mentioned", "key"
KEY_KINDS = frozenset({"contributor", "key_rotation"})  # say whose a key is: `key_id` and `name`
ROW_REDACTION = "row_redaction"
NAME_FIELDS = ("name", "workflow", "subject", "decision", "reason")

Statement = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """Names are (name, version or 0, role), digests (hex, role); `erases` is the leaf hash a redaction speaks of.

    `erases_rows`: tables of rows gave way to others.
    """

    label: str
    names: tuple[tuple[str, int, str], ...]
    digests: tuple[tuple[str, str], ...]
    erases: str | None
    erases_rows: bool = False


def facts_of(private: bytes, kind: str, commitment: str) -> Facts:
    """Return the facts of a private half. RecordError when it is not what the leaf committed to."""
    statement = _statement(private, commitment)
    predicate = statement["predicate"]
    body = predicate["body"]
    return Facts(
        label=label_of_body(kind, body.get),
        names=tuple(dict.fromkeys(_names(kind, body))),
        digests=tuple(dict.fromkeys(_digests(kind, statement, predicate, body))),
        erases=body["leaf"] if kind == "redaction" else None,
        erases_rows=kind == ROW_REDACTION,
    )


def body_of(private: bytes, commitment: str) -> dict[str, Any]:
    """Return the body of a record. RecordError when it is not what the leaf committed to."""
    body: dict[str, Any] = _statement(private, commitment)["predicate"]["body"]
    return body


def seal_private(envelope: bytes, salt: bytes) -> bytes:
    """Return the private half that keeps an envelope (canonical bytes) and its salt."""
    return HEAD + envelope + MIDDLE + salt.hex().encode() + TAIL


def open_private(data: bytes, commitment: str) -> bytes:
    """Return the envelope in a private half. RecordError when the two do not match the commitment."""
    envelope, salt_text = data[len(HEAD) : SALT_START - len(MIDDLE)], data[SALT_START : -len(TAIL)]
    try:
        salt = bytes.fromhex(salt_text.decode("ascii"))
    except ValueError as error:
        raise RecordError("its salt is not hexadecimal") from error
    if commitment_of(salt, envelope) != commitment:
        raise RecordError("it does not match the commitment in the log")
    return envelope


def label_of_body(kind: str, get: Callable[[str], Any]) -> str:
    """Return a few words that tell a record from others of its kind; `get` returns a field of its body or None."""
    match kind:
        case "publication":
            return f"{get('name')}@{get('version')}"
        case "completions":
            return f"{get('count')} completion{'' if get('count') == 1 else 's'}"
        case "adapter_loaded":
            return f"loaded by {get('replica')}"
        case "influence":
            return str(get("receipt_id"))
        case "settlement":
            return f"{get('adapter_name')} settled over {get('over')} on {get('suite_name')}"
        case "key_rotation":
            return f"key of {get('name')} rotated"
        case "key_revocation":
            return f"key of {get('name')} revoked: {get('reason')}"
        case "redaction" | "row_redaction":
            return f"erased: {get('reason')}"
    return next((str(text) for name in NAME_FIELDS if (text := get(name))), kind.replace("_", ""))


def _statement(private: bytes, commitment: str) -> dict[str, Any]:
    statement: dict[str, Any] = json.loads(b64decode(json.loads(open_private(private, commitment))["payload"]))
    return statement


def _names(kind: str, body: Statement) -> Iterator[tuple[str, int, str]]:
    name = body.get("name") or body.get("workflow")
    if name and kind != "key_revocation":
        yield (name, body["version"], "published") if kind == "publication" else (name, 0, kind)
    for rule in body.get("rules", ()) if kind == "refinement" else ():
        yield rule["name"], 0, RULE


def _digests(kind: str, statement: Statement, predicate: Statement, body: Statement) -> Iterator[tuple[str, str]]:
    """Outputs first: a digest that a record both made and mentions is one it made."""
    seen: set[str] = set()
    roles = [
        (MENTIONED if kind == "publication" else MADE, (item["digest"]["sha256"] for item in statement["subject"])),
        (USED, (item["digest"].removeprefix(DIGEST_PREFIX) for item in predicate["inputs"])),
        (RULE, (rule["digest"].removeprefix(DIGEST_PREFIX) for rule in body.get("rules", ()))),
        (KEY, (body["key_id"],) if kind in KEY_KINDS else ()),
        (MENTIONED, _texts(body)),
    ]
    for role, digests in roles:
        for digest in digests:
            if digest not in seen:
                seen.add(digest)
                yield digest, role


def _texts(value: Any) -> Iterator[str]:
    """Every digest in a body, without its prefix."""
    if isinstance(value, str):
        if value.startswith(DIGEST_PREFIX) and len(value) == len(DIGEST_PREFIX) + 64:
            yield value.removeprefix(DIGEST_PREFIX)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
