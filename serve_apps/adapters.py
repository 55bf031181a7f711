"""Adapters are checked against their digest and their model signature before the engine may read them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from attribution.log.verify import Trust
from attribution.signed_models import SignedModels
from attribution.store import Store
from attribution.trail import TRUST_FILE, Trail
from serve_apps.calls import AdapterChoice
from serve_apps.engine.config import AdapterRef

# (path, size in bytes, modification, change time in ns, inode) per file: a later change to any file changes it.
Signature = tuple[tuple[str, int, int, int, int], ...]


class VerifiedAdapters:
    """Hands out adapter folders whose every file has the digest that the manifest says, and signed as `check` asks.

    Hashing happens once; afterwards a request costs one stat per file, and a file that changed since is hashed again,
    so that what the engine reads after an eviction is verified too.
    """

    def __init__(self, store: Store, *, check: Callable[[str], object] = lambda digest: None) -> None:
        """`check` is called with a digest whose files were hashed, and raises a UserError to refuse it."""
        self._store, self._check = store, check
        self._verified: dict[str, tuple[Path, Signature]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def ready(self, choice: AdapterChoice) -> AdapterRef:
        """Return the verified folder.

        StoreError naming the file when it is not what its digest says, or what `check` raises.
        """
        known = self._verified.get(choice.digest)
        if known is not None and signature(known[0]) == known[1]:
            return AdapterRef(choice.digest, str(known[0]))
        async with self._locks.setdefault(choice.digest, asyncio.Lock()):
            path = await asyncio.to_thread(self._verify, choice.digest)
        return AdapterRef(choice.digest, str(path))

    def _verify(self, digest: str) -> Path:
        self._verified.pop(digest, None)
        before = signature(self._store.get_directory(digest, verify=False))
        path = self._store.get_directory(digest, verify=True)
        self._check(digest)
        self._verified[digest] = (path, before)  # taken before hashing: a change meanwhile is seen by the next request
        return path


def signature_check(trail: Trail, policy: Literal["off", "present", "required"]) -> Callable[[str], object]:
    """Return what a replica asks of an adapter's model signature (serve.model_signatures), by its digest.

    The call raises ModelSignatureError or StoreError, and VerifyError when trust.json is unusable.
    """
    if policy == "off":
        return lambda digest: None
    trust_file, known = trail.home / TRUST_FILE, dict[tuple[int, int], SignedModels]()

    def check(digest: str) -> object:
        found = trust_file.stat()
        stamp = (found.st_mtime_ns, found.st_ino)
        signed = known.get(stamp)
        if signed is None:  # a revocation may leave no way from the old trust to the new
            signed = SignedModels(trail, Trust.load(trust_file))
            known.clear()
            known[stamp] = signed
        return signed.check(digest, is_required=policy == "required")

    Trust.load(trust_file)  # an unusable one is told now
    return check


def signature(folder: Path) -> Signature:
    """Return what changes when a file below `folder` does; a missing folder has the empty signature."""
    stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return tuple((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats)
