"""Reading a YAML file of settings or of a workflow: plain values only, and no key twice in one mapping."""

from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, which YAML forbids and PyYAML settles in silence: the last one wins."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and seen.setdefault(key.value, line) != line:
                raise yaml.YAMLError(f"line {line}: key {key.value!r} stands in line {seen[key.value]} already")
        return node


def load_yaml(file: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        UserError: not UTF-8, not YAML, a key twice, or nested beyond all measure.
    """
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}: nested too deeply") from error
