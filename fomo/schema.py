"""Named fields of a YAML file -> typed values, or one line that names the field, what was found, what is accepted.

Recipes, data files, methods and merge rules are all read through `build`: a class's constructor is its schema.
PyYAML reads `1e-5` as text; `convert` repairs that.
"""

import dataclasses
import difflib
import inspect
import math
import os
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from fomo.errors import FieldError, UserError, one_line

# What PyYAML's safe loader raises: on `2024-13-01`, `!!int x`, `!!bool x`, a thousand brackets.
NOT_YAML = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError, OverflowError)
VALUES = 1_000_000  # of a file, its aliases written out
WORDS = {str: "text", bool: "true or false", dict: "named fields", int: "a whole number", float: "a number"}


def one_of(name: str, value: Any, accepted: typing.Sequence[str]) -> None:
    if value not in accepted:
        raise FieldError(
            name, f"unknown {value!r}{nearest(value, accepted)}, accepted: {', '.join(accepted)}"
        )


def nearest(found: Any, accepted: typing.Iterable[str]) -> str:
    """What was meant, perhaps, as part of a message."""
    near = difflib.get_close_matches(str(found), accepted, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def differences(before: dict, now: dict, where: str = "") -> list[str]:
    """The dotted names of the fields that differ."""
    found = []
    for key in {**now, **before}:
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{where}{key}.")
        elif a != b:
            found.append(f"{where}{key}")
    return found


@dataclasses.dataclass(frozen=True)
class Range:
    """What numbers a field accepts: Annotated[float, Range(0, 1)]."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # `least` itself is not accepted
    below: bool = False  # `most` itself is not accepted

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"more than {self.least:g}" if self.above else f"at least {self.least:g}"
        refused = f", {self.least:g} not included" if self.above else ""
        refused += f", {self.most:g} not included" if self.below else ""
        return f"a number from {self.least:g} to {self.most:g}{refused}"

    def __contains__(self, value: float) -> bool:
        refused = (self.above and value == self.least) or (self.below and value == self.most)
        return self.least <= value <= self.most and not refused


Share = typing.Annotated[float, Range(0, 1)]
Positive = typing.Annotated[float, Range(0, above=True)]
NotNegative = typing.Annotated[float, Range(0)]
Natural = typing.Annotated[int, Range(0)]
Count = typing.Annotated[int, Range(1)]


def build(cls, values: dict, where: str = ""):
    """Make a `cls` from a nested dict, checked against the signature of its constructor.

    `where` is the dotted path of the dict, for messages.
    """
    if not isinstance(values, dict):
        raise FieldError(where or "recipe", f"expected named fields, got {values!r}")
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    known = inspect.signature(cls).parameters
    refuse_unknown(values, known, where)
    for name, parameter in known.items():
        if name not in values and parameter.default is parameter.empty:
            raise FieldError(dotted(where, name), "missing, and it has no default")
    return cls(**{key: convert(value, hints[key], dotted(where, key)) for key, value in values.items()})


def dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def refuse_unknown(values: dict, known: typing.Iterable[str], where: str) -> None:
    """A FieldError for the first key of `values` that is not known, with the nearest that is."""
    for key in values:
        if key not in known:
            problem = f"unknown field{nearest(key, known)}, accepted: {', '.join(known)}"
            raise FieldError(dotted(where, str(key)), problem)


def convert(value: Any, want: Any, where: str) -> Any:
    """`value` as type `want`, or a FieldError that says what was found and what is accepted.

    want: a class, a dataclass, list[...], Literal[...], Annotated[..., Range(...)], or a union of such.
    """
    want = option_for(value, want)
    origin, arguments = typing.get_origin(want), typing.get_args(want)
    if origin is typing.Annotated:
        converted = convert(value, arguments[0], where)
        if converted not in arguments[1]:
            raise FieldError(where, f"got {value!r}, accepted: {arguments[1]}")
        return converted
    if origin is typing.Literal:
        one_of(where, value, arguments)
        return value
    if dataclasses.is_dataclass(want):
        return value if isinstance(value, want) else build(want, value, where)
    if origin is list and isinstance(value, list):
        return [convert(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value)]
    kind = plain_type(want)
    if kind in (int, float):
        return number(value, kind, where)
    if not isinstance(value, kind):
        raise FieldError(where, f"expected {WORDS.get(kind, kind.__name__)}, got {value!r}")
    return value


def option_for(value: Any, want: Any) -> Any:
    """Of a union the type that the value has, else its first; any other type as it is."""
    if typing.get_origin(want) not in (types.UnionType, typing.Union):
        return want
    options = typing.get_args(want)
    return next((option for option in options if fits(value, option)), options[0])


def fits(value: Any, option: Any) -> bool:
    if typing.get_origin(option) is typing.Literal:
        return value in typing.get_args(option)
    return plain_type(option) is type(value)


def plain_type(want: Any) -> Any:
    """list[int] -> list, Annotated[float, ...] -> float, Literal["a"] -> str."""
    origin, arguments = typing.get_origin(want), typing.get_args(want)
    if origin is typing.Annotated:
        return plain_type(arguments[0])
    return type(arguments[0]) if origin is typing.Literal else origin or want


def number(value: Any, kind: type, where: str) -> int | float:
    try:
        parsed = float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):
        parsed = math.nan
    if not math.isfinite(parsed) or (kind is int and not parsed.is_integer()):
        raise FieldError(where, f"expected {WORDS[kind]}, got {value!r}")
    return kind(value) if isinstance(value, int) else kind(parsed)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses what it would pass over: the first of two fields of one name."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = str(self.construct_object(key)), key.start_mark.line + 1
            if name in lines:
                twice = f"the field {name} stands there twice, in lines {lines[name]} and {line}"
                raise yaml.YAMLError(f"{twice}; rename or delete one")
            lines[name] = line
        return node


def parse_yaml(text: str) -> Any:
    """Raises one of NOT_YAML."""
    return yaml.load(text, Loader)  # which is a safe one


def read_yaml(path: Path) -> dict:
    """A YAML file of named fields; one clear line for everything that can be wrong with it."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
        if endless(values):
            raise yaml.YAMLError(f"its aliases stand for more than {VALUES:,} values")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected named fields at the top, got {type(values).__name__}")
    return values


def endless(values: Any) -> bool:
    """Whether aliases (`*name`) make a few lines stand for far more than anybody wrote, or for themselves."""
    waiting, seen = [values], 0
    while waiting and seen <= VALUES:
        value = waiting.pop()
        seen += 1
        if isinstance(value, (dict, list)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return seen > VALUES


def locate(path: str, beside: Path) -> str:
    """~ is the home directory; a relative path is relative to the file that says it."""
    if "\0" in path:
        raise UserError(f"{beside}: {path!r} is no path, a null character stands in it")
    return str((beside.parent / os.path.expanduser(path)).resolve())
