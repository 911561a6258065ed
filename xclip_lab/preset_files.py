"""Presets: YAML files of settings by name, and what each of them stands for."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xclip_lab.errors import ConfigError
from xclip_lab.registry import did_you_mean
from xclip_lab.validation import merge

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class About:
    """What a preset stands for; all None where it stands for nothing of a paper.

    Attributes:
        script: the authors' script or command. published: where in `published.yaml` its numbers lie
            (protocol, model).
        values: where the script has no batch and epochs for it, whose these are: `ours`, or `B/32` for those
            of the script for ViT-B/32.
    """

    script: str | None = None
    published: tuple[str, str] | None = None
    values: str | None = None


def presets() -> dict[str, dict[str, Any]]:
    """Every preset by name: the common values of its file, the parts that its row uses, then its own."""
    return {name: _values(content, row) for name, (content, row) in _rows().items()}


def about(name: str) -> About:
    """What the preset of this name stands for."""
    told = _rows()[name][1].get("about", {})
    published = told.get("published")
    return About(told.get("script"), published and tuple(published), told.get("values"))


def preset_values(preset: str | Path) -> tuple[dict[str, Any], str]:
    """The settings of a preset, or of a YAML file of one's own, and a name for them.

    Raises:
        ConfigError: no such preset or file, or not a mapping in valid YAML.
    """
    rows = _rows()
    if str(preset) in rows:
        return _values(*rows[str(preset)]), str(preset)
    if not str(preset).endswith((".yaml", ".yml")):
        raise ConfigError(
            f"unknown preset {str(preset)!r}{did_you_mean(str(preset), rows)} "
            f"(known: {', '.join(sorted(rows))})"
        )
    path = Path(preset)
    if not os.path.isfile(path):
        raise ConfigError(f"no config file {path}")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a mapping of config keys")
    return content, path.stem


def read_yaml(path: Path) -> Any:
    """What a YAML file of the user's holds.

    Raises:
        ConfigError: no file, or not valid YAML; a key that stands twice in a mapping is not.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _KeysOnce)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


class _KeysOnce(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                problem = f"the key {key.value!r} stands there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


@functools.cache
def _rows() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Every preset's file content and row, to be read only."""
    contents = [yaml.safe_load(path.read_text()) for path in sorted(PRESETS.glob("*.yaml"))]
    return {name: (content, row or {}) for content in contents for name, row in content["presets"].items()}


def _values(content: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in row.items() if key not in ("use", "about")}
    parts = [content["parts"][part] for part in row.get("use", ())]
    return functools.reduce(merge, [*parts, own], content.get("common") or {})
