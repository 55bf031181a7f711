"""What `name@version` means: a view of the publication records, rebuilt by reading them."""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from attribution.bodies import PublicationBody
from attribution.log.facts import utc
from configs.errors import UserError

if TYPE_CHECKING:
    from attribution.trail import Erasure, Trail

REFERENCE = re.compile(r"(?P<name>[^@]+)(?:@(?P<version>[1-9][0-9]*))?")
PUBLISHED_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?")
NAME_RULE = "a-z, 0-9, '.', '_' and '-', a letter or digit at both ends, at most 128 characters"


class RegistryError(UserError):
    """A name, version or digest that was not published, or one that is taken."""


@dataclass(frozen=True)
class Published:
    """One published version."""

    name: str
    version: int
    kind: str
    digest: str
    leaf_hash: str
    time_us: int

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class Registry:
    """Names and versions of a trail; every call catches up with the log first.

    It shares the trail's mutex: an append asks the registry while it holds that one, and the registry reads the trail
    while it holds its own, so two mutexes would be taken in both orders.
    """

    def __init__(self, trail: "Trail") -> None:
        self._trail = trail
        self._mutex = trail.mutex
        self._versions: dict[str, dict[int, Published]] = {}
        self._cursor = 0

    def resolve(self, reference: str, kind: str | None = None, *, with_erased: bool = False) -> Published:
        """Return what `name@version`, `name` (newest version) or a published digest (newest publication) means.

        RegistryError names near matches; it refuses what was erased, unless `with_erased`.
        """
        published = self.list(kind, with_erased=with_erased)
        if not with_erased:
            self._require_not_erased(reference)
        match = REFERENCE.fullmatch(reference)
        if reference.startswith("sha256:"):
            found = [item for item in published if item.digest == reference]
        elif match is None:
            raise RegistryError(f"name {reference!r}: write NAME or NAME@VERSION, the version a number from 1")
        else:
            wanted = match["version"]
            of_name = [item for item in published if item.name == match["name"]]
            found = [item for item in of_name if wanted is None or item.version == int(wanted)]
        if not found:
            raise RegistryError(_not_found(reference, published, kind))
        return max(found, key=lambda item: (item.version, item.time_us))

    def list(self, kind: str | None = None, *, with_erased: bool = False) -> list[Published]:
        """Return all published versions, by name and version, those of erased artefacts only `with_erased`."""
        with self._mutex:
            self._catch_up()
            gone = {} if with_erased else self._erased_digests()
            versions = [item for versions in self._versions.values() for item in versions.values()]
            items = [item for item in versions if item.digest not in gone]
        return sorted(
            (item for item in items if kind is None or item.kind == kind), key=lambda item: (item.name, item.version)
        )

    def next_version(self, name: str) -> int:
        """Return one more than the newest version of `name`, 1 for a new name."""
        with self._mutex:
            self._catch_up()
            return max(self._versions.get(name, {}), default=0) + 1

    def require_free(self, name: str, version: int) -> None:
        """Raise RegistryError unless `name@version` can still be published; the trail calls it under the log's lock."""
        if not PUBLISHED_NAME.fullmatch(name) or version < 1:
            raise RegistryError(f"name {name!r} version {version}: a name has {NAME_RULE}; a version is 1 or more")
        with self._mutex:
            self._catch_up()
            taken = self._versions.get(name, {}).get(version)
        if taken is not None:
            raise RegistryError(
                f"{taken.reference}: published already as {taken.digest}; use version {self.next_version(name)}"
            )

    def _erased_digests(self) -> dict[str, "Erasure"]:
        """Adapters and base models (their digests stand in the headers) whose records were erased."""
        erasures = self._trail.erasures()
        if not erasures:
            return {}
        entries = [(self._trail.entry(leaf_hash), erasure) for leaf_hash, erasure in erasures.items()]
        return {
            subject.digest: erasure
            for entry, erasure in entries
            for subject in entry.leaf.subjects
            if subject.kind == entry.leaf.kind and self._trail.find(subject.digest) is None
        }

    def _require_not_erased(self, reference: str) -> None:
        """Say so when a name or digest means something that was erased."""
        gone = self._erased_digests()
        for versions in self._versions.values():
            for item in versions.values():
                if item.digest in gone and reference in (item.reference, item.digest):
                    erasure = gone[item.digest]
                    raise RegistryError(
                        f"{item.reference}: its {item.kind} was erased on {utc(erasure.time_us)[:10]} because: "
                        f"{erasure.reason}"
                    )

    def _catch_up(self) -> None:
        self._trail.refresh()
        size = self._trail.log.size
        for entry in self._trail.entries(start=self._cursor, kind="publication"):
            if entry.record is not None and isinstance(entry.record.body, PublicationBody):
                body = entry.record.body
                item = Published(
                    body.name, body.version, body.artefact_kind, body.digest, entry.leaf_hash, entry.leaf.time_us
                )
                self._versions.setdefault(body.name, {}).setdefault(body.version, item)  # the first one stands
        self._cursor = size


def _not_found(reference: str, published: list[Published], kind: str | None) -> str:
    what = kind or "artefact"
    names = dict.fromkeys([item.reference for item in published] + [item.name for item in published])
    near = get_close_matches(reference, list(names), n=3)
    if near:
        return f"{what} {reference!r}: not published; did you mean {', '.join(near)}?"
    known = ", ".join(item.reference for item in published[-8:])
    return f"{what} {reference!r}: not published; " + (
        f"there are: {known}" if known else f"no {what} is published yet"
    )
