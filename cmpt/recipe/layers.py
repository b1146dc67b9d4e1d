"""The layers of a recipe as plain values: YAML files with `extends`, then key=value overrides; and each key's origin.

YAML is read a little stricter than by default: duplicate keys are faults, only true and false are booleans (yes, on
and off are text), integers are decimal, and 1e-3 is a number.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import yaml

from cmpt.recipe.schema import Recipe
from cmpt.recipe.typed import fault_line, plain

COMMAND_LINE = "command line"
SCHEMA_DEFAULT = "schema default"
RESOLVERS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"),
    "float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
_KEY = re.compile(r"[A-Za-z_][\w-]*(?:\.[\w-]+|\[\d+\])*")
_ZERO_PADDED = re.compile(r"[-+]?0[0-9_]+$")  # 010 is text: neither ten nor, as in YAML 1.1, eight


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:str", _ZERO_PADDED, None)
for _tag, _pattern in RESOLVERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)


@dataclass
class Override:
    """One `key=value` of the command line, read but not yet applied."""

    key: str
    value: Any
    origins: dict[str, str]


class Layers:
    """What the files and the command line say, merged over the schema's defaults."""

    def __init__(self) -> None:
        self.tree: dict[str, Any] = plain(Recipe())
        self.faults: list[str] = []
        self._origins: dict[str, str] = {}
        self._faulty: set[str] = set()

    def origin(self, key: str) -> str:
        """Where the value of a dotted key came from: "recipes/base.yaml:12", "command line", ..."""
        return self._origins.get(key, SCHEMA_DEFAULT)

    def fault(self, key: str, value: Any, constraint: str, origin: str | None = None) -> None:
        """Note a value's first fault, with its origin; an element's origin is that of its list."""
        if key in self._faulty:
            return
        self._faulty.add(key)
        owner = key
        while owner not in self._origins and "." in owner:
            owner = owner.rpartition(".")[0]
        self.faults.append(fault_line(key, value, constraint, origin or self.origin(owner)))

    def add_file(self, path: str, chain: tuple[str, ...] = ()) -> bool:
        """Merge a YAML file over the files that it extends; False where one of them could not be read at all."""
        file = os.path.realpath(path)
        if file in chain:
            names = [os.path.basename(link) for link in (*chain[chain.index(file) :], file)]
            self.faults.append(f"{path}: extends itself: {' -> '.join(names)}")
            return False
        try:
            with open(path, encoding="utf-8") as stream:
                text = stream.read()
        except (OSError, UnicodeDecodeError) as error:
            self.faults.append(f"{path}: cannot read this recipe: {getattr(error, 'strerror', None) or error}")
            return False
        marks: dict[str, str] = {}
        parsed = self._parse(text, path, "", marks)
        if not parsed:
            return False
        values = {} if parsed[0] is None else parsed[0]
        if not isinstance(values, dict):
            self.faults.append(f"{path}: expected sections (name: value) at the top, got {type(values).__name__}")
            return False
        bases = values.pop("extends", None) or []
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            self.faults.append(fault_line("extends", bases, "expected a file or a list of files", marks["extends"]))
            return False
        folder = os.path.dirname(path)
        read = [self.add_file(os.path.normpath(os.path.join(folder, base)), (*chain, file)) for base in bases]
        self._merge(self.tree, values, "")
        self._origins |= marks
        return all(read)

    def parse_override(self, override: str) -> Override | None:
        """Read one `dotted.key=value` of the command line; `a.0.b` and `a[0].b` reach into lists."""
        key, equals, text = override.partition("=")
        if not equals or not _KEY.fullmatch(key):
            self.faults.append(f'bad override "{override}": expected key=value ({COMMAND_LINE})')
            return None
        if key == "extends":
            self.faults.append(f'bad override "{override}": extends belongs in a recipe file ({COMMAND_LINE})')
            return None
        key = re.sub(r"\[(\d+)\]", r".\1", key)
        marks = {key: COMMAND_LINE}
        parsed = self._parse(text, COMMAND_LINE, key, marks)
        return Override(key, parsed[0], marks) if parsed else None

    def add_override(self, override: Override) -> None:
        """Merge one override; sections that do not exist are made, entries of lists are not."""
        owner: Any = self.tree
        *path, name = _parts(override.key)
        for depth, part in enumerate(path):
            if isinstance(owner, list):
                if not self._has_entry(owner, part, path[:depth], override):
                    return
                if not isinstance(owner[int(part)], dict | list):
                    owner[int(part)] = {}
                    override.origins[".".join(path[: depth + 1])] = COMMAND_LINE
                owner = owner[int(part)]
                continue
            if not isinstance(owner.get(part), dict | list):
                owner[part] = {}
                override.origins[".".join(path[: depth + 1])] = COMMAND_LINE
            owner = owner[part]
        if isinstance(owner, dict):
            self._merge(owner, {name: override.value}, override.key.removesuffix(name))
        elif isinstance(owner, list) and self._has_entry(owner, name, path, override):
            self._forget(override.key)
            owner[int(name)] = override.value
        self._origins |= override.origins

    def _has_entry(self, entries: list[Any], part: str, path: list[str], override: Override) -> bool:
        there = part.isdigit() and int(part) < len(entries)
        if not there:
            self.fault(override.key, override.value, f"{'.'.join(path)} has no entry {part}", COMMAND_LINE)
        return there

    def fill(self, section: dict[str, Any], name: str, value: Any, key: str, origin: str) -> None:
        """Set a field that neither a file nor the command line has given."""
        if name in section and self.origin(key) == SCHEMA_DEFAULT:
            section[name] = value
            self._origins[key] = origin

    def _merge(self, old: dict[str, Any], new: dict[str, Any], prefix: str) -> None:
        for name, value in new.items():
            if isinstance(value, dict) and isinstance(old.get(name), dict):
                self._merge(old[name], value, f"{prefix}{name}.")
            else:
                self._forget(prefix + name)
                old[name] = value

    def _forget(self, key: str) -> None:
        self._origins = {name: origin for name, origin in self._origins.items() if not name.startswith(key + ".")}

    def _parse(self, text: str, where: str, key: str, marks: dict[str, str]) -> tuple[Any] | None:
        """The value in a tuple, or None where it is not YAML; `marks` gets the origin of each key below `key`."""
        try:
            loader = _Loader(text)  # refuses characters that YAML does not have
            try:
                node = loader.get_single_node()
                return (None if node is None else self._value(loader, node, where, key, marks, ()),)
            finally:
                loader.dispose()
        except (yaml.YAMLError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark and where != COMMAND_LINE else ""
            problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
            if where == COMMAND_LINE and "{" in text:
                problem += "; text with braces, brackets or commas needs quotes inside a list"
            subject = f"{key} = {text}: " if key else ""
            self.faults.append(f"{subject}bad YAML: {problem} ({where}{line})")
            return None

    def _value(
        self, loader: _Loader, node: yaml.Node, where: str, key: str, marks: dict[str, str], inside: tuple[int, ...]
    ) -> Any:
        if id(node) in inside:
            raise yaml.constructor.ConstructorError(None, None, "an alias holds itself", node.start_mark)
        inside = (*inside, id(node))
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self._value(loader, item, where, f"{key}.{index}", marks, inside) for index, item in items]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        values: dict[str, Any] = {}
        for name_node, item in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not plain text", name_node.start_mark)
            name = str(name_node.value)
            child = f"{key}.{name}" if key else name
            origin = where if where == COMMAND_LINE else f"{where}:{name_node.start_mark.line + 1}"
            if name in values:
                self.faults.append(f"{child}: given twice ({marks[child]} and {origin})")
            marks[child] = origin
            values[name] = self._value(loader, item, where, child, marks, inside)
        return values


def _parts(key: str) -> list[str]:
    """A dotted key as the path through the tree; the keys inside a phase's `set` hold dots themselves."""
    parts = key.split(".")
    if len(parts) > 4 and parts[0] == "phases" and parts[2] == "set":
        return [*parts[:3], ".".join(parts[3:])]
    return parts
