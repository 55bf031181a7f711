"""What the fields of adapter_config.json may hold, so that one that holds something else is refused by its name."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve_apps.engine.errors import CorruptAdapter


def check_fields(config: dict[str, Any], path: Path) -> None:
    """Raise CorruptAdapter naming the first field whose value its rule could not be followed with."""
    for name, (is_sound, wanted) in _FIELDS.items():
        if name in config and not is_sound(config[name]):
            raise CorruptAdapter(f"{name}={config[name]!r} in {path} is not {wanted}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(of(item) for item in value)


def _is_names(value: Any) -> bool:
    return value is None or _is_pattern(value) or _is_list(value, lambda item: isinstance(item, str))


def _is_table(value: Any, of: Callable[[Any], bool]) -> bool:
    is_table = isinstance(value, dict) and all(_is_pattern(key) and of(item) for key, item in value.items())
    return value is None or is_table


_NAMES = "a list of names, or a regular expression"
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_whole, "a whole number"),
    "lora_alpha": (_is_number, "a finite number"),
    "use_rslora": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "rank_pattern": (lambda value: _is_table(value, _is_whole), "whole numbers by regular expression"),
    "alpha_pattern": (lambda value: _is_table(value, _is_number), "finite numbers by regular expression"),
    "target_modules": (_is_names, _NAMES),
    "exclude_modules": (_is_names, _NAMES),
    "layers_to_transform": (
        lambda value: value is None or _is_whole(value) or _is_list(value, _is_whole),
        "a layer or a list of layers",
    ),
    "layers_pattern": (
        lambda value: value is None or _is_pattern(value) or _is_list(value, _is_pattern),
        "a regular expression or a list of them",
    ),
}
