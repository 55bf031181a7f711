"""Settings: defaults, presets, and an error for each way to get a file wrong."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.errors import UserError
from configs.schema import Settings, load_settings, parse_settings, preset_names


def test_nothing_given_is_all_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n")
    assert load_settings() == load_settings(empty) == Settings()


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  rank: 4\n")
    settings = load_settings(file)
    assert settings.model_dump(exclude_defaults=True) == {"train": {"rank": 4}}


@pytest.mark.parametrize(("name", "is_default"), [("h200", False), ("local", True), ("multi-node", False)])
def test_presets_load_by_name(name: str, is_default: bool) -> None:
    assert name in preset_names()
    assert (load_settings(name) == Settings()) is is_default


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().train.rank = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"rnk": 3}}, "settings: train.rnk: no such setting; did you mean 'train.rank'?"),
        ({"trian": {}}, "settings: trian: no such setting; did you mean 'train'?"),
        ({"kv_block_size": 8}, "kv_block_size: no such setting here; it belongs under serve"),
        ({"train": {"port": 1}}, "train.port: no such setting here; it belongs under serve or mlflow"),
        ({"refine": {"quux": 1}}, "refine.quux: no such setting; known here: min_chars, max_chars"),
        ({"train": {"rank": 0}}, "train.rank = 0: input should be greater than or equal to 1"),
        ({"train": {"dtype": "fp8"}}, "train.dtype = 'fp8': input should be 'bfloat16' or 'float32'"),
        ({"train": 3}, "train = 3: input should be a valid dictionary"),
    ],
)
def test_mistakes_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_settings(values)
    assert message in str(caught.value)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_settings({"train": {"rnk": 3, "rank": -1}, "serve": {"port": 0}})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "not valid YAML"),
        ("- train", "holds a list; a configuration is a mapping of contribute, refine"),
        ("train:\n  rank: 4\n  rank: 8\n", "not valid YAML: line 3: key 'rank' stands in line 2 already"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_files_that_are_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_settings(file)


def test_a_missing_file_lists_the_presets() -> None:
    with pytest.raises(UserError, match=r"'no-such': no such file, nor a preset; presets: .*h200, local, multi-node"):
        load_settings("no-such")
