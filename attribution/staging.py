"""From drafts to records ready to be written: time, code, environment, parents, salt, signature, leaf."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from attribution.bodies import Body, ContributorBody, KeyRotationBody, PublicationBody
from attribution.key_changes import KeyChanges
from attribution.keys import SigningKey
from attribution.log.merkle import hash_leaf
from attribution.provenance import code_identity, environment_digest
from attribution.records import SALT_BYTES, Artefact, Leaf, Party, Record, build_leaf, sign_record
from attribution.registry import RegistryError
from configs.errors import UserError

UNINDEXED_KINDS = frozenset({"completions", "adapter_loaded"})  # many per minute; nothing is made from their outputs
ALIAS_KINDS = frozenset({"publication"})  # name an artefact that another record made


class TrailError(UserError):
    """No trail here, a leaf hash that is not in it, or a record altered on disk."""


@dataclass(frozen=True)
class Draft:
    """What a caller says of a record; the trail adds time, code, environment, parents, salt and signature."""

    kind: str
    body: Body
    inputs: Sequence[Artefact] = ()
    outputs: Sequence[Artefact] = ()
    contributors: Sequence[Party] = ()
    parents: Sequence[str] | None = None
    signer: SigningKey | None = None
    config: str | None = None
    seed: int = 0
    attempt: int = 1
    parent_attempt: str | None = None
    time_us: int | None = None
    cosigners: Sequence[SigningKey] = ()


@dataclass(frozen=True)
class Staged:
    """A record ready to be written: its leaf and both parts of the private half."""

    record: Record
    leaf: Leaf
    leaf_bytes: bytes
    leaf_hash: str
    envelope: bytes
    salt: bytes

    @property
    def private(self) -> bytes:
        """The private half as it is kept: canonical JSON of envelope and salt."""
        return b'{"envelope":%b,"salt":"%b"}' % (self.envelope, self.salt.hex().encode())


class Makers:
    """Which record made an artefact last, which introduced a contributor's key, and which keys may sign no more."""

    def __init__(self) -> None:
        self.newest_output: dict[str, str] = {}  # artefact digest -> leaf hash
        self.contributor: dict[str, str] = {}  # key id -> leaf hash
        self.key_changes = KeyChanges()

    def add(self, record: Record, leaf_hash: str) -> None:
        """Take a record in."""
        if record.kind in UNINDEXED_KINDS or record.kind in ALIAS_KINDS:
            return
        if isinstance(record.body, ContributorBody):
            self.contributor[record.body.key_id] = leaf_hash
        elif isinstance(record.body, KeyRotationBody) and record.body.old_key_id in self.contributor:
            self.contributor[record.body.key_id] = self.contributor[record.body.old_key_id]
        self.key_changes.take_in(record.body)
        self.newest_output.update({output.digest: leaf_hash for output in record.outputs})


class Group:
    """The records of one append, staged in turn, so that a later one finds its parents among the earlier ones."""

    def __init__(
        self,
        makers: Makers,
        *,
        last_time_us: int,
        operator: Callable[[], SigningKey],
        is_logged: Callable[[str], bool],
        require_free: Callable[[str, int], None],
    ) -> None:
        self.staged: list[Staged] = []
        self._makers, self._last_time_us = makers, last_time_us
        self._operator, self._is_logged, self._require_free = operator, is_logged, require_free
        self._made: dict[str, str] = {}
        self._hashes: set[str] = set()
        self._published: set[tuple[str, int]] = set()

    def add(self, drafts: Sequence[Draft]) -> list[Staged]:
        """Stage the records of one caller, all or, when one of them is refused, none."""
        made, published = dict(self._made), set(self._published)
        staged: list[Staged] = []
        last_time_us = self._last_time_us
        for draft in drafts:
            last_time_us = max(last_time_us, now_us() if draft.time_us is None else draft.time_us)
            if isinstance(draft.body, PublicationBody):
                self._require_unpublished(draft.body, published)
            item = self._stage(draft, last_time_us, made, {earlier.leaf_hash for earlier in staged})
            staged.append(item)
            if draft.kind not in ALIAS_KINDS:
                made.update({output.digest: item.leaf_hash for output in draft.outputs})
        self._made, self._published, self._last_time_us = made, published, last_time_us
        self._hashes |= {item.leaf_hash for item in staged}
        self.staged += staged
        return staged

    def _require_unpublished(self, body: PublicationBody, published: set[tuple[str, int]]) -> None:
        self._require_free(body.name, body.version)
        if (body.name, body.version) in published:
            raise RegistryError(
                f"{body.name}@{body.version}: being published at this moment; use version {body.version + 1}"
            )
        published.add((body.name, body.version))

    def _stage(self, draft: Draft, time_us: int, made: Mapping[str, str], own: set[str]) -> Staged:
        signer = draft.signer or self._operator()
        parents = self._parents(draft, signer, made) if draft.parents is None else tuple(draft.parents)
        for parent in parents:
            if not (parent in own or parent in self._hashes or self._is_logged(parent)):
                raise TrailError(f"parent {parent}: not in this log; a parent is recorded before its child")
        for key in (signer, *draft.cosigners):
            self._makers.key_changes.require_usable(key, draft.kind, time_us)
        envelope, record = sign_record(record_of(draft, time_us=time_us), signer, *draft.cosigners)
        salt = secrets.token_bytes(SALT_BYTES)
        leaf = build_leaf(record, envelope, salt=salt, parents=parents)
        leaf_bytes = leaf.to_bytes()
        return Staged(record, leaf, leaf_bytes, hash_leaf(leaf_bytes).hex(), envelope, salt)

    def _parents(self, draft: Draft, signer: SigningKey, made: Mapping[str, str]) -> tuple[str, ...]:
        """The records that made the inputs, then the contributor's of the key that signs or gives way, each once."""
        newest = self._makers.newest_output
        makers = [made.get(artefact.digest) or newest.get(artefact.digest) for artefact in draft.inputs]
        found = [maker for maker in makers if maker is not None]
        key_id = draft.body.old_key_id if isinstance(draft.body, KeyRotationBody) else signer.key_id
        if draft.kind != "contributor" and key_id in self._makers.contributor:
            found.append(self._makers.contributor[key_id])
        return tuple(dict.fromkeys(found))


def now_us() -> int:
    """Return the time in microseconds since 1970."""
    return time.time_ns() // 1000


def record_of(draft: Draft, *, time_us: int) -> Record:
    """Return the record of a draft, with the code and environment of this process."""
    return Record(
        kind=draft.kind,
        contributors=tuple(draft.contributors),
        inputs=tuple(draft.inputs),
        outputs=tuple(draft.outputs),
        code=code_identity(),
        environment=environment_digest(),
        config=draft.config,
        seed=draft.seed,
        attempt=draft.attempt,
        parent_attempt=draft.parent_attempt,
        time_us=time_us,
        body=draft.body,
    )
