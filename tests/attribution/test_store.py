"""Blobs and directories: named by content, verified on read, whole or absent."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from attribution.store import Store, StoreError, digest_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "nested").mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(3 << 20))
    (folder / "nested" / "note.txt").write_text("hello")
    return folder


def test_blob_round_trip(store: Store, tmp_path: Path) -> None:
    digest = store.put_blob(b"rows")
    assert digest == digest_of(b"rows") == f"sha256:{sha256(b'rows').hexdigest()}"
    (tmp_path / "file").write_bytes(b"rows")
    assert store.put_blob(tmp_path / "file") == digest
    assert (store.get_blob(digest), store.has(digest), store.path_of(digest).read_bytes()) == (b"rows", True, b"rows")
    assert Store(f"file://{store.root}").get_blob(digest) == b"rows"
    assert [path.name for path in store.root.rglob(".new-*")] == []


def test_an_altered_blob_is_refused_and_mended_by_putting_it_again(store: Store) -> None:
    digest = store.put_blob(b"rows")
    store.path_of(digest).write_bytes(b"rowz")
    with pytest.raises(StoreError, match="altered"):
        store.get_blob(digest)
    store.put_blob(b"rows")
    assert store.get_blob(digest) == b"rows"


def test_directory_round_trip(store: Store, adapter: Path) -> None:
    meta = {"base": digest_of(b"base"), "rank": 8, "modules": ["q_proj"]}
    digest = store.put_directory(adapter, kind="adapter", meta=meta)
    folder = store.get_directory(digest)
    assert (folder / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert digest == digest_of((folder / "manifest.json").read_bytes())
    assert (manifest["v"], manifest["kind"], manifest["meta"]) == (1, "adapter", meta)
    assert [file["path"] for file in manifest["files"]] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "nested/note.txt",
    ]
    assert store.manifest(digest).meta == meta
    assert store.put_directory(adapter, kind="adapter", meta=meta) == digest
    assert store.put_directory(adapter, kind="adapter", meta={**meta, "rank": 4}) != digest


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "nested/note.txt", "adapter_config.json"])
def test_a_tampered_adapter_is_refused_by_name(store: Store, adapter: Path, name: str) -> None:
    folder = store.get_directory(digest := store.put_directory(adapter, kind="adapter", meta={}))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(StoreError, match=f"{name} was altered"):
        store.get_directory(digest)
    assert store.get_directory(digest, verify=False) == folder
    store.put_directory(adapter, kind="adapter", meta={})
    assert store.get_directory(digest) == folder


def test_missing_added_and_linked_files_are_refused(store: Store, adapter: Path) -> None:
    folder = store.get_directory(digest := store.put_directory(adapter, kind="adapter", meta={}))
    (folder / "extra.py").write_text("evil")
    with pytest.raises(StoreError, match=r"extra\.py is not in its manifest"):
        store.get_directory(digest)
    (folder / "extra.py").unlink()
    (folder / "nested" / "note.txt").unlink()
    with pytest.raises(StoreError, match=r"nested/note\.txt is missing"):
        store.get_directory(digest)
    (folder / "nested" / "note.txt").symlink_to(adapter / "nested" / "note.txt")
    with pytest.raises(StoreError, match=r"nested/note\.txt"):
        store.get_directory(digest)


def test_a_tampered_manifest_is_refused(store: Store, adapter: Path) -> None:
    folder = store.get_directory(digest := store.put_directory(adapter, kind="adapter", meta={}))
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"kind":"adapter"', b'"kind":"adopter"'))
    with pytest.raises(StoreError, match=r"manifest\.json was altered"):
        store.get_directory(digest)


def test_what_cannot_be_stored(store: Store, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"meta\.loss = 0\.5: a float"):
        store.put_directory(adapter, kind="adapter", meta={"loss": 0.5})
    with pytest.raises(StoreError, match="not a folder"):
        store.put_directory(tmp_path / "absent", kind="adapter", meta={})
    (adapter / "link").symlink_to("adapter_config.json")
    with pytest.raises(StoreError, match="link"):
        store.put_directory(adapter, kind="adapter", meta={})
    (adapter / "link").unlink()
    (adapter / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match=r"manifest\.json"):
        store.put_directory(adapter, kind="adapter", meta={})
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="no file"):
        store.put_directory(tmp_path / "empty", kind="adapter", meta={})
    assert list((store.root / "dirs").iterdir()) == []


def test_bad_digests_and_urls(store: Store) -> None:
    for digest in ("", "sha256:xyz", "sha256:../../etc/passwd", "md5:" + "0" * 64):
        with pytest.raises(StoreError, match="64 hex digits"):
            store.get_blob(digest)
    with pytest.raises(StoreError, match="not in the store"):
        store.get_blob(digest_of(b"never put"))
    with pytest.raises(StoreError, match="only a local path"):
        Store("s3://bucket/key")


def test_many_writers_of_one_content(store: Store, adapter: Path) -> None:
    def put(_: int) -> str:
        return store.put_directory(adapter, kind="adapter", meta={})

    with ThreadPoolExecutor(4) as pool:
        digests = set(pool.map(put, range(8)))
    assert len(digests) == 1
    assert store.get_directory(digests.pop()).is_dir()
    assert [path.name for path in (store.root / "dirs").iterdir() if path.name.startswith(".")] == []


def test_every_new_directory_entry_is_made_durable(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def recording_fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    root = tmp_path / "new" / "store"
    blob = Store(root).put_blob(b"rows")
    prefix = Store(root).path_of(blob).parent
    assert {tmp_path, root.parent, root, root / "blobs", prefix} <= set(synced)
    assert synced[-2:] == [prefix, root / "blobs"]  # once the blob has its name
    synced.clear()
    digest = Store(root).put_directory(adapter, kind="adapter", meta={})
    assert root in synced and synced[-1] == root / "dirs"
    temporary = next(path.parent for path in synced if path.name == "manifest.json")
    assert {temporary, temporary / "nested", temporary / "nested" / "note.txt"} <= set(synced)
    synced.clear()
    assert Store(root).put_directory(adapter, kind="adapter", meta={}) == digest
    assert synced[-1] == root / "dirs"
