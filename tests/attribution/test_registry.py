"""Names and versions: resolved from publications, near names in the error, a version taken once."""

import os
import threading
from pathlib import Path

import pytest

from attribution.bodies import PublicationBody
from attribution.records import Artefact
from attribution.registry import RegistryError
from attribution.trail import Trail


def publish(trail: Trail, name: str, content: str, *, kind: str = "adapter", version: int | None = None) -> str:
    digest = trail.store.put_blob(content.encode())
    body = PublicationBody(name, version or trail.registry.next_version(name), kind, digest)
    trail.record("publication", body, inputs=[Artefact(kind, name, digest)])
    return digest


def test_resolve(trail: Trail) -> None:
    first, second = publish(trail, "support", "a"), publish(trail, "support", "b")
    facts = publish(trail, "facts", "c", kind="dataset")
    registry = trail.registry
    assert registry.resolve("support").reference == "support@2"
    assert (registry.resolve("support").digest, registry.resolve("support@1").digest) == (second, first)
    assert registry.resolve(first).reference == "support@1"
    assert registry.resolve("facts", kind="dataset").digest == facts
    assert [item.reference for item in registry.list()] == ["facts@1", "support@1", "support@2"]
    assert [item.reference for item in registry.list("dataset")] == ["facts@1"]
    assert (registry.next_version("support"), registry.next_version("new")) == (3, 1)
    entry = trail.entry(registry.resolve("support@1").leaf_hash)
    assert registry.resolve("support@1").time_us == entry.leaf.time_us


def test_a_digest_published_twice_is_its_newest_name(trail: Trail) -> None:
    digest = publish(trail, "zeta", "same")
    publish(trail, "alpha", "same")
    assert trail.registry.resolve(digest).reference == "alpha@1"


def test_errors_name_what_is_near(trail: Trail) -> None:
    with pytest.raises(RegistryError, match="no adapter is published yet"):
        trail.registry.resolve("support", kind="adapter")
    publish(trail, "support", "a")
    for wrong in ("suport", "support@2", "Support"):
        with pytest.raises(RegistryError, match=r"did you mean .*support@1"):
            trail.registry.resolve(wrong)
    with pytest.raises(RegistryError, match="there are: support@1"):
        trail.registry.resolve("weather")
    for malformed in ("support@latest", "support@0", "@1", "", "a@1@2"):
        with pytest.raises(RegistryError, match="NAME@VERSION"):
            trail.registry.resolve(malformed)
    with pytest.raises(RegistryError, match="dataset 'support': not published"):
        trail.registry.resolve("support", kind="dataset")
    with pytest.raises(RegistryError, match="not published"):
        trail.registry.resolve("sha256:" + "00" * 32)


def test_a_version_is_taken_once(trail: Trail) -> None:
    publish(trail, "support", "a")
    size = trail.log.size
    with pytest.raises(RegistryError, match=r"support@1: published already .* use version 2"):
        publish(trail, "support", "b", version=1)
    for name, version in (("bad name", 1), ("", 1), ("Support", 1), ("a/b", 1), ("support-", 1), ("support", -1)):
        with pytest.raises(RegistryError, match="a version is 1 or more"):
            trail.record("publication", PublicationBody(name, version, "adapter", "sha256:" + "00" * 32))
    assert trail.log.size == size


def test_other_processes_publications_are_seen(tmp_path: Path) -> None:
    trail = Trail.open(tmp_path / "home")
    assert trail.registry.list() == []
    pid = os.fork()
    if pid == 0:
        try:
            publish(Trail.open(tmp_path / "home"), "support", "a")
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert trail.registry.resolve("support").version == 1


def test_listing_while_another_thread_publishes_does_not_deadlock(
    trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader stops inside the registry, about to read the trail, until the writer is inside its append."""
    reading, appending = threading.Event(), threading.Event()
    refresh, require_free = trail.refresh, trail.registry.require_free

    def refresh_late() -> None:
        if threading.current_thread().name == "reader":
            reading.set()
            appending.wait(1.0)  # one mutex for both keeps the writer out: then this ends by its time
        refresh()

    def require_free_late(name: str, version: int) -> None:
        appending.set()
        require_free(name, version)

    monkeypatch.setattr(trail, "refresh", refresh_late)
    monkeypatch.setattr(trail.registry, "require_free", require_free_late)
    digest = trail.store.put_blob(b"a")
    body = PublicationBody("support", 1, "adapter", digest)
    reader = threading.Thread(target=trail.registry.list, name="reader", daemon=True)
    writer = threading.Thread(target=trail.record, args=("publication", body), daemon=True)
    reader.start()
    assert reading.wait(10)
    writer.start()
    reader.join(10)
    writer.join(10)
    assert not reader.is_alive() and not writer.is_alive(), "each waits for the mutex of the other"
    assert trail.registry.resolve("support").digest == digest
