"""Where the home folder is, and variables that last for a block."""

from pathlib import Path

import pytest

from configs import env


def test_home_is_what_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAILMARK_HOME", str(tmp_path / "mine"))
    assert env.home() == tmp_path / "mine"


def test_home_is_the_nearest_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAILMARK_HOME", raising=False)
    (tmp_path / ".trailmark").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert env.home() == tmp_path / ".trailmark"


def test_temporary_variables_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAILMARK_TEST_OLD", "old")
    with pytest.raises(RuntimeError), env.temporary_variables({"TRAILMARK_TEST_OLD": "x", "TRAILMARK_TEST_NEW": "y"}):
        assert (env.variable("TRAILMARK_TEST_OLD"), env.variable("TRAILMARK_TEST_NEW")) == ("x", "y")
        raise RuntimeError
    assert (env.variable("TRAILMARK_TEST_OLD"), env.variable("TRAILMARK_TEST_NEW", "gone")) == ("old", "gone")


@pytest.mark.parametrize(("value", "expected"), [("", True), ("1", True), ("0", False), ("OFF", False), ("no", False)])
def test_native_kernels(value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAILMARK_NATIVE_KERNELS", value)
    assert env.native_kernels() is expected


def test_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAILMARK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert env.cache_home() == Path.home() / ".cache" / "trailmark"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_home() == tmp_path / "trailmark"
    monkeypatch.setenv("TRAILMARK_CACHE", str(tmp_path / "own"))
    assert env.cache_home() == tmp_path / "own"
