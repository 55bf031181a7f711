"""Trust policies: which logs, which witnesses, and how many of them must have cosigned a checkpoint.

Source: c2sp.org/tlog-policy. A file of lines `log VKEY [URL]`, `witness NAME VKEY [URL]`,
`group NAME all|any|K NAME...` and exactly one `quorum NAME|none`; a name is defined before it is used, and is a member
of one group at most.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from attribution.log.cosignature import ML_DSA_44_COSIGNATURE, CosignerKey, cosigned_at
from attribution.log.note import (
    ED25519_TYPE,
    Checkpoint,
    NoteError,
    NoteKey,
    is_decimal,
    open_note,
    split_verifier_key,
    verified_signatures,
)
from configs.errors import UserError

NO_QUORUM = "none"
LOCAL_MARK = "# The local witnesses, written by `trailmark up`. Take this line out to keep what you write here."
LogKey = NoteKey | CosignerKey
_BETWEEN = re.compile(r"[ \t]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class PolicyError(NoteError, UserError):
    """A policy that cannot be read, or a checkpoint that does not meet one."""


@dataclass(frozen=True)
class PolicyLog:
    """A log whose checkpoints are accepted; the key's name is its origin."""

    key: LogKey
    url: str | None = None


@dataclass(frozen=True)
class PolicyWitness:
    """A witness by the name that groups know it by; `url` is its submission prefix."""

    name: str
    key: CosignerKey
    url: str | None = None


@dataclass(frozen=True)
class Group:
    """Witnesses a checkpoint when `threshold` of its members (witnesses or groups) do."""

    name: str
    threshold: int
    members: tuple[str, ...]


@dataclass(frozen=True)
class Cosigned:
    """Who cosigned: witness name -> time in seconds since 1970; how many there are, and what the quorum asks for."""

    times: dict[str, int]
    num_witnesses: int
    quorum: str

    def __str__(self) -> str:
        """E.g. `2 of 3 cosigned; the policy asks for 2 of w1, w2, w3`."""
        return f"{len(self.times)} of {self.num_witnesses} cosigned; the policy asks for {self.quorum}"


@dataclass(frozen=True)
class Policy:
    """A parsed policy; `quorum` names a witness, a group or nobody (`none`)."""

    logs: tuple[PolicyLog, ...]
    witnesses: tuple[PolicyWitness, ...]
    groups: tuple[Group, ...]
    quorum: str

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Return the policy of a file. PolicyError with the line at fault."""
        try:
            return cls.parse(path.read_bytes())
        except OSError as error:
            raise PolicyError(f"policy {path}: cannot be read: {error.strerror}") from error
        except PolicyError as error:
            raise PolicyError(f"policy {path}: {error}") from error

    @classmethod
    def parse(cls, data: bytes) -> "Policy":
        """Return the policy of a file's bytes; bytes over 0x7F are opaque. PolicyError with the line at fault."""
        text = data.decode("utf-8", "surrogateescape")
        if not text.endswith("\n") or _CONTROL.search(text):
            raise PolicyError("must end in a newline and hold no control characters but tab and newline")
        reader = _Reader()
        for number, line in enumerate(text[:-1].split("\n"), 1):
            words = _BETWEEN.split(line.strip(" \t"))
            if words == [""] or words[0].startswith("#"):
                continue
            try:
                reader.read(words)
            except NoteError as error:
                raise PolicyError(f"line {number}: {error}") from error
        return reader.policy()

    def text(self) -> str:
        """Return the policy as a file without comments, which parses to an equal policy."""
        lines = [f"log {log.key} {log.url or ''}".rstrip() for log in self.logs]
        lines += [f"witness {item.name} {item.key} {item.url or ''}".rstrip() for item in self.witnesses]
        lines += [f"group {item.name} {item.threshold} {' '.join(item.members)}" for item in self.groups]
        return "\n".join([*lines, f"quorum {self.quorum}"]) + "\n"

    def is_met_by(self, names: Collection[str]) -> bool:
        """Whether cosignatures of these witnesses make the quorum."""
        if self.quorum == NO_QUORUM:
            return True
        met = set(names) & {witness.name for witness in self.witnesses}
        for group in self.groups:  # each after its members
            if sum(member in met for member in group.members) >= group.threshold:
                met.add(group.name)
        return self.quorum in met

    def cosigned(self, note: str) -> Cosigned:
        """Return which witnesses cosigned a note, whether or not they make the quorum.

        Raises:
            NoteError: a line claims to be of one of the witnesses and is not.
        """
        _, signatures = verified_signatures(note, [witness.key for witness in self.witnesses])
        by_key = {str(witness.key): witness.name for witness in self.witnesses}
        times = {by_key[key]: cosigned_at(signature) for key, signature in signatures.items()}
        return Cosigned(times, len(self.witnesses), self.describe())

    def require(self, note: str) -> Cosigned:
        """Return which witnesses cosigned a note; PolicyError when they do not make the quorum."""
        cosigned = self.cosigned(note)
        if not self.is_met_by(cosigned.times):
            who = ", ".join(sorted(cosigned.times)) or "none"
            raise PolicyError(f"{cosigned} ({who} did)")
        return cosigned

    def open(self, note: str) -> tuple[Checkpoint, Cosigned]:
        """Return the checkpoint of a note that one of the policy's logs signed and its quorum cosigned."""
        checkpoint = Checkpoint.parse(open_note(note, [log.key for log in self.logs]))
        signed = [log for log in self.logs if log.key.name == checkpoint.origin]
        if not signed:
            raise PolicyError(f"checkpoint: origin {checkpoint.origin!r} is none of the policy's logs")
        open_note(note, [log.key for log in signed])  # by a key of that very log
        return checkpoint, self.require(note)

    def describe(self) -> str:
        """Return the quorum in words: `2 of w1, w2, w3`."""
        if self.quorum == NO_QUORUM:
            return "none"
        return self._describe(self.quorum)

    def _describe(self, name: str) -> str:
        group = next((group for group in self.groups if group.name == name), None)
        if group is None:
            return name
        nested = {item.name for item in self.groups}
        members = [f"({self._describe(member)})" if member in nested else member for member in group.members]
        return f"{group.threshold} of {', '.join(members)}"


def plain_text(text: str) -> str:
    """Return a policy's text without comments and empty lines, its words one space apart."""
    lines = [" ".join(_BETWEEN.split(line.strip(" \t"))) for line in text.split("\n")]
    return "".join(f"{line}\n" for line in lines if line and not line.startswith("#"))


def with_log_key(text: str, key: NoteKey) -> str:
    """Return a policy's text with a log's new key before the one it has of that log, if it has one."""
    lines = text.split("\n")
    words = [line.split() for line in lines]
    if any(found[:1] == ["log"] and found[1:2] == [str(key)] for found in words):
        return text
    for number, found in enumerate(words):
        if found[:1] == ["log"] and len(found) > 1 and found[1].partition("+")[0] == key.name:
            return "\n".join([*lines[:number], " ".join(["log", str(key), *found[2:]]), *lines[number:]])
    return text


class _Reader:
    """What a policy's lines have defined so far."""

    def __init__(self) -> None:
        self._logs: list[PolicyLog] = []
        self._witnesses: list[PolicyWitness] = []
        self._groups: list[Group] = []
        self._quorum: str | None = None
        self._names: set[str] = set()
        self._members: set[str] = set()

    def read(self, words: list[str]) -> None:
        """Take in one line."""
        match words:
            case ["log", key, *url] if len(url) <= 1:
                self._add_log(key, *url)
            case ["witness", name, key, *url] if len(url) <= 1:
                self._add_witness(name, key, *url)
            case ["group", name, threshold, first, *others]:
                self._add_group(name, threshold, (first, *others))
            case ["quorum", name]:
                self._set_quorum(name)
            case _:
                raise PolicyError(
                    f"{words[0]!r}: expected `log VKEY [URL]`, `witness NAME VKEY [URL]`, "
                    "`group NAME all|any|K NAME...` or `quorum NAME|none`"
                )

    def policy(self) -> Policy:
        """Return the whole."""
        if self._quorum is None:
            raise PolicyError("no quorum line; `quorum none` asks for no cosignature")
        return Policy(tuple(self._logs), tuple(self._witnesses), tuple(self._groups), self._quorum)

    def _add_log(self, text: str, url: str | None = None) -> None:
        key = _log_key(text)
        _refuse_known(key, (log.key for log in self._logs), "log")
        self._logs.append(PolicyLog(key, url))

    def _add_witness(self, name: str, text: str, url: str | None = None) -> None:
        key = CosignerKey.parse(text)
        _refuse_known(key, (witness.key for witness in self._witnesses), "witness")
        self._define(name)
        self._witnesses.append(PolicyWitness(name, key, url))

    def _add_group(self, name: str, threshold: str, members: tuple[str, ...]) -> None:
        for member in members:
            self._require_defined(member)
            if member in self._members:
                raise PolicyError(f"{member!r}: a member already; a name may be listed in one group, once")
            self._members.add(member)
        words = {"all": len(members), "any": 1}
        if threshold not in words and not is_decimal(threshold):
            raise PolicyError(f"group {name}: {threshold!r} is neither `all`, `any` nor a number")
        needed = words[threshold] if threshold in words else int(threshold)
        if not 1 <= needed <= len(members):
            raise PolicyError(f"group {name}: asks for {needed} of {len(members)} members")
        self._define(name)
        self._groups.append(Group(name, needed, members))

    def _set_quorum(self, name: str) -> None:
        if self._quorum is not None:
            raise PolicyError("a second quorum line; a policy has exactly one")
        if name != NO_QUORUM:
            self._require_defined(name)
        self._quorum = name

    def _define(self, name: str) -> None:
        if name == NO_QUORUM or name in self._names:
            raise PolicyError(f"{name!r}: taken already; witnesses and groups share their names, `none` is reserved")
        self._names.add(name)

    def _require_defined(self, name: str) -> None:
        if name not in self._names:
            raise PolicyError(f"{name!r}: not defined on a line before this one")


def _log_key(text: str) -> LogKey:
    """A log signs as itself with Ed25519 (0x01) or ML-DSA-44 (0x06); 0x04 is for witnesses."""
    _, typed_key = split_verifier_key(text)
    if typed_key[:1] == ED25519_TYPE:
        return NoteKey.parse(text)
    key = CosignerKey.parse(text)
    if key.algorithm != ML_DSA_44_COSIGNATURE:
        raise PolicyError(f"log {key.name}: type 0x04 is a witness's; a log's key is of type 0x01 or 0x06")
    return key


def _refuse_known(key: LogKey, known: Iterable[LogKey], what: str) -> None:
    """The same key under two names would count twice."""
    if any(other.public_bytes == key.public_bytes for other in known):
        raise PolicyError(f"{what} {key.name}: its public key stands on an earlier line")
