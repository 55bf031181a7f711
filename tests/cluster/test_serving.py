"""The first key that `up` prints."""

from pathlib import Path

from cluster import serving
from serve_apps.apikeys import ApiKeys, Principal, keys_path


def test_first_key_is_an_ordinary_tenants(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    secret = serving.ensure_api_key(tmp_path)
    assert secret is not None
    assert ApiKeys(keys_path(tmp_path)).authenticate(secret) == Principal(serving.FIRST_KEY_NAME, is_operator=False)
    assert serving.ensure_api_key(tmp_path) is None
