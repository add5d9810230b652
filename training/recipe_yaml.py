"""Reading a recipe's YAML strictly: what trl's parser would take in silence, or break at later, names its key and line."""

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from vreflection_hub_card.errors import InputError, reading


class StrictLoader(yaml.SafeLoader):
    """YAML without keys that come twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Raises a `yaml.YAMLError` for a key that comes twice, or that is none."""
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            where = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise yaml.YAMLError(f"{where}: a key must be a name, got {key!r}")
            if key in keys:
                raise yaml.YAMLError(f"{where}: the key {key!r} comes twice")
            keys.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that is a mapping of keys.

    Raises:
        InputError: Something else, with the line where it breaks off.
    """
    with reading(path):
        text = path.read_text(encoding="utf-8")
    with reading(path, "no YAML that can be read"):
        try:
            content = yaml.load(text, StrictLoader)  # a SafeLoader
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise InputError(f"{path}, line {mark.line + 1}: {error.problem}") from error
        if not isinstance(content, dict):
            raise ValueError(f"a recipe must be `key: value` lines, got {type(content).__name__}")
    return content


def check_recipe(path: Path, recipe: dict[str, Any], dataclasses: Iterable[type]) -> None:
    """Checks that each key is a field of one of the dataclasses, and its value of the field's type.

    Raises:
        InputError: The first key that isn't, with its value.
    """
    hints = {name: hint for kind in dataclasses for name, hint in get_type_hints(kind).items()}
    for key, value in recipe.items():
        if key in ("env", "config"):  # trl's own
            continue
        if key not in hints:
            raise InputError(f"{path}: there is no setting {key!r}; is it spelt right?")
        if not fits(value, hints[key]):
            raise InputError(f"{path}: `{key}` must be {describe(hints[key])}, got {value!r}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is of a type; numbers may be texts, since YAML reads 1e-5 as one."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if kind is Literal:
        return value in inner
    kind = kind or hint
    if kind is Any or not isinstance(kind, type):
        return True
    if kind in (int, float):
        if isinstance(value, str):
            try:
                kind(value)
            except ValueError:
                return False
            return True
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false", "yes", "no", "0", "1")
    if kind is str:
        return isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if kind in (dict, list):
        return isinstance(value, kind)
    return value is None if kind is type(None) else isinstance(value, (str, kind))


def describe(hint: Any) -> str:
    """A type as a person calls it."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, inner)))
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    names |= {dict: "a mapping", list: "a list"}
    return names.get(kind or hint, getattr(hint, "__name__", str(hint)))
