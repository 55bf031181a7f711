"""API keys: only hashes on disk, private file, seen by other processes at once."""

import json
import multiprocessing
import stat
from pathlib import Path

import pytest

from configs.errors import UserError
from serve_apps.apikeys import ApiKeys, Principal, keys_path


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    return ApiKeys(keys_path(tmp_path))


def test_a_created_key_authenticates_its_tenant_and_no_other_string_does(keys: ApiKeys) -> None:
    secret = keys.create("shop", tenant="acme")
    assert keys.authenticate(secret) == Principal("acme", is_operator=False)
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), "tmk_"):
        assert keys.authenticate(wrong) is None


def test_the_file_is_private_and_holds_no_secret(keys: ApiKeys, tmp_path: Path) -> None:
    secret = keys.create("shop")
    path = keys_path(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text()
    assert secret.removeprefix("tmk_") not in path.read_text()
    assert json.loads(path.read_text())["keys"][0]["tenant"] == "shop"


def test_a_key_made_or_revoked_elsewhere_counts_at_the_next_request(keys: ApiKeys, tmp_path: Path) -> None:
    assert keys.authenticate("tmk_nothing") is None
    elsewhere = ApiKeys(keys_path(tmp_path))
    secret = elsewhere.create("late", is_operator=True)
    assert keys.authenticate(secret) == Principal("late", is_operator=True)
    elsewhere.revoke("late")
    assert keys.authenticate(secret) is None


def test_mistakes_name_the_remedy(keys: ApiKeys) -> None:
    keys.create("shop")
    with pytest.raises(UserError, match=r"'shop' is taken.*revoke shop"):
        keys.create("shop")
    with pytest.raises(UserError, match=r"'shpo' is unknown \(known: shop\)"):
        keys.revoke("shpo")
    with pytest.raises(UserError, match="empty"):
        keys.create(" ")


def test_a_tenant_sees_its_own_receipts_and_an_operator_all() -> None:
    assert Principal("acme").may_see("acme")
    assert not Principal("acme").may_see("other")
    assert Principal("acme", is_operator=True).may_see("other")


def _create(path: Path, name: str) -> None:
    ApiKeys(path).create(name)


def test_keys_made_by_many_processes_at_once_are_all_kept(tmp_path: Path) -> None:
    path = keys_path(tmp_path)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_create, args=(path, f"key{index}")) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert {key.name for key in ApiKeys(path).list()} == {"key0", "key1", "key2", "key3"}
