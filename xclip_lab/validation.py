"""Plain values into config dataclasses: every value checked, every error with its key and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser

from xclip_lab.errors import ConfigError
from xclip_lab.registry import did_you_mean


def build(cls: type, values: Any, prefix: str, everywhere: Sequence[str]) -> Any:
    """A dataclass from plain values, each leaf checked by jsonargparse under its dotted name.

    Args:
        prefix: the dotted name so far. everywhere: all keys there are, to guess from where one is unknown.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{prefix}: {values!r} is not allowed (expected keys such as {next(leaf_names(cls, prefix))})"
        )
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise unknown_key(f"{prefix}.{key}", list(leaf_names(cls, prefix)), everywhere)
    built = {}
    for key, value in values.items():
        inner = _dataclass_of(hints[key])
        if inner is not None and value is not None:
            built[key] = build(inner, value, f"{prefix}.{key}", everywhere)
        else:
            built[key] = check(f"{prefix}.{key}", hints[key], value)
    return cls(**built)


def check(key: str, hint: Any, value: Any) -> Any:
    """`value` as `hint`; a string is read as YAML would read it, so command line and notebook agree.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    try:
        checked = _parser(hint).parse_object({"value": _respelled(hint, value)}).value
    except Exception as error:  # jsonargparse raises several kinds
        raise ConfigError(f"{key}: {value!r} is not allowed ({_expected(hint, value)})") from error
    empty = checked is None and not _optional(hint)
    if empty or (isinstance(checked, float) and not math.isfinite(checked)):
        raise ConfigError(f"{key}: {value!r} is not allowed ({_expected(hint, value)})")
    return checked


@functools.cache
def _parser(hint: Any) -> ArgumentParser:
    """Made once a type: a grid checks thousands of values."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _respelled(hint: Any, value: Any) -> Any:
    """What other command lines and libraries call true, false and null: 0 and 1, numpy's kinds, None."""
    if hint is bool:
        return {"0": False, "1": True, "False": False, "True": True}.get(str(value), value)
    return None if isinstance(value, str) and value == "None" and _optional(hint) else value


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _expected(hint: Any, value: Any) -> str:
    if typing.get_origin(hint) is Literal:
        choices = [str(choice) for choice in typing.get_args(hint)]
        return f"allowed: {', '.join(choices)}{did_you_mean(str(value), choices)}"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_expected(part, value) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        part, *more = typing.get_args(hint)
        known = map(str, typing.get_args(part))
        strange = set(re.findall(r"[\w.-]+", str(value))) - {*known}
        each = (
            _expected(part, min(strange, default="")).removeprefix("expected ").replace("allowed:", "one of")
        )
        return f"expected a list{'' if more == [...] else f' of {len(more) + 1}'}, each {each}"
    if hint is type(None):
        return "null"
    ranges = {
        "PositiveInt": "a whole number above 0",
        "NonNegativeInt": "a whole number, 0 or more",
        "PositiveFloat": "a number above 0",
        "NonNegativeFloat": "a number, 0 or more",
        "ClosedUnitInterval": "a number from 0 to 1",
        "Seed": "a whole number from 0 to 4294967295",
        "UnitIntervalBelowOne": "a number from 0 to below 1",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
    }
    name = getattr(hint, "__name__", str(hint))
    return f"expected {ranges.get(name, str(hint).replace('jsonargparse.typing.', ''))}"


def unknown_key(key: str, here: Sequence[str], everywhere: Sequence[str]) -> ConfigError:
    """The error for a key that is not there, with the nearest: the same leaf elsewhere, else by spelling."""
    if key in everywhere:  # only the heads have different keys under one name
        return ConfigError(f"{key} is a key of another head (known here: {', '.join(here)})")
    leaf = key.rsplit(".", 1)[-1]
    near = [name for name in everywhere if name.rsplit(".", 1)[-1] == leaf]
    for names in (here, everywhere):
        near = near or difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown key {key!r}{hint} (known here: {', '.join(here)})")


def leaf_names(cls: type, prefix: str) -> Iterator[str]:
    """The dotted names of all values in a dataclass and those inside it."""
    for name, hint in typing.get_type_hints(cls).items():
        inner = _dataclass_of(hint)
        if inner is None:
            yield f"{prefix}.{name}"
        else:
            yield from leaf_names(inner, f"{prefix}.{name}")


def _dataclass_of(hint: Any) -> type | None:
    for part in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(part) and isinstance(part, type):
            return part
    return None


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """`nest("a.b", 1)` is `{"a": {"b": 1}}`."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in it, mappings merged all the way down."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def plain(value: Any) -> Any:
    """Nested values of a config as what YAML and JSON know."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for kind in (bool, int, float, str):  # jsonargparse's restricted numbers are subclasses
        if isinstance(value, kind):
            return kind(value)
    return value
