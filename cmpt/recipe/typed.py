"""Strict conversion of plain values (from YAML) to the recipe's dataclasses, and the faults that come of it."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from cmpt.recipe.schema import Recipe

Report = Callable[[str, Any, str], None]
"""Takes (dotted key, value, constraint): notes one fault."""

_DURATION_FIELDS = {"duration", "log_every", "checkpoint_every", "stop_after", "every", "warmup"}


class Absent(str):
    """A constraint, or the line of a fault, about what is not on this machine; the recipe may run on another."""

    __slots__ = ()


class RecipeError(ValueError):
    """Everything that is wrong with a recipe; `faults` holds one line for each."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = list(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)


def show(value: Any, limit: int | None = 120) -> str:
    """A value on one line, in YAML's flow notation, cut to `limit` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."


def fault_line(key: str, value: Any, constraint: str, origin: str = "") -> str:
    return f"{key} = {show(value)}: {constraint}" + (f" ({origin})" if origin else "")


def plain(value: Any) -> Any:
    """Dataclasses as nested dicts, tuples as lists: what YAML can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested dicts and lists of dicts as {dotted key: leaf}; a list of plain values is one leaf."""
    if isinstance(value, dict) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {key: value}
    leaves: dict[str, Any] = {}
    for name, item in items:
        leaves |= flat(item, f"{key}.{name}" if key else str(name))
    return leaves


@cache
def field_types(owner: Any) -> dict[str, Any]:
    """Field name -> type of a schema dataclass."""
    hints = get_type_hints(owner)
    return {item.name: hints[item.name] for item in fields(owner)}


def _leaf_names(owner: Any = Recipe, prefix: str = "") -> Iterator[str]:
    for name, expected in field_types(owner).items():
        key = prefix + name
        element = get_args(expected)[0] if get_origin(expected) is list else None
        if is_dataclass(expected):
            yield from _leaf_names(expected, key + ".")
        elif is_dataclass(element):
            yield key
            yield from _leaf_names(element, key + ".0.")
        else:
            yield key


def nearest_key(key: str, names: Iterable[str]) -> str:
    """ "; did you mean ...?" for an unknown dotted key, or "" where nothing is near."""
    last = key.rsplit(".", 1)[-1]
    ranked = sorted(names, key=lambda name: -_likeness(key, name))
    same_name = [name for name in ranked if name.rsplit(".", 1)[-1] == last]
    if same_name:
        sure = _likeness(key, same_name[0]) > 1.85  # a slip of the pen in the section, not another section
        return f"; did you mean {' or '.join(same_name[: 1 if sure else 2])}?"
    return f"; did you mean {ranked[0]}?" if _likeness(key, ranked[0]) >= 1.1 else ""


def _likeness(key: str, name: str) -> float:
    """0 … 2: of the whole dotted key, plus of its last part, so that a wrong section still finds its field."""
    pairs = ((key, name), (key.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1]))
    return sum(SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs)


def nearest_choice(value: str, choices: Collection[str]) -> str:
    """ "expected ...; did you mean ...?" for a name that is not among the choices."""
    folded = {choice.lower(): choice for choice in choices}
    near = get_close_matches(value.lower(), folded, n=1, cutoff=0.5)
    best = folded[near[0]] if near else ""
    return f"expected one of {', '.join(choices)}" + (f"; did you mean {best}?" if best else "")


def without_unknown(section: dict[str, Any], prefix: str, names: Collection[str], report: Report) -> dict[str, Any]:
    """The section without the keys that it must not have, which are reported."""
    for name in [name for name in section if name not in names]:
        report(prefix + name, section[name], "unknown key" + nearest_key(name, names))
    return {name: value for name, value in section.items() if name in names}


def convert(expected: Any, value: Any, key: str, report: Report) -> Any:
    """`value` as type `expected`, with no lenience but int -> float and null -> empty list or mapping.

    Every fault goes to `report`; the result is then unusable.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else convert(inner, value, key, report)
    if is_dataclass(expected):
        return _section(expected, value, key, report)
    if origin in (list, dict) and value is None:
        return origin()
    if origin is list and isinstance(value, list):
        return [convert(arguments[0], item, f"{key}.{index}", report) for index, item in enumerate(value)]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        pairs = enumerate(zip(arguments, value, strict=True))
        return tuple(convert(argument, item, f"{key}.{index}", report) for index, (argument, item) in pairs)
    if origin is dict and isinstance(value, dict):
        return value
    if expected is float and type(value) in (int, float):
        return float(value)
    if type(value) is expected:
        return value
    report(key, value, f"expected {_describe(expected, key, value)}")
    return None


def _section(owner: Any, value: Any, key: str, report: Report) -> Any:
    hints = field_types(owner)
    prefix = f"{key}." if key else ""
    if not isinstance(value, dict):
        report(key, value, f"expected a section with any of {', '.join(hints)}")
        return None
    names = list(dict.fromkeys([*_leaf_names(), *_leaf_names(owner, prefix)]))
    names += ["extends"] if not key else []
    for name in [name for name in value if name not in hints]:
        for leaf, item in flat(value[name], prefix + name).items():
            if leaf in names:
                report(leaf, item, "dots do not nest in a recipe file; write each part as a section of its own")
            else:
                report(leaf, item, "unknown key" + nearest_key(leaf, names))
    return owner(**{name: convert(hints[name], value[name], prefix + name, report) for name in hints if name in value})


def _describe(expected: Any, key: str, value: Any) -> str:
    if expected is str:
        if key.rsplit(".", 1)[-1] in _DURATION_FIELDS:
            return 'text with a unit, such as "2000 steps"'
        return "text; put it in quotes" if isinstance(value, bool | int | float) else "text"
    if get_origin(expected) is list:
        return {str: "a list of texts", int: "a list of whole numbers"}.get(get_args(expected)[0], "a list of sections")
    if get_origin(expected) is tuple:
        return f"a list of {len(get_args(expected))} numbers"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(expected, "a mapping")
