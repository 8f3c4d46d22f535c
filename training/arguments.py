"""What a user asks for: a YAML file, and `--key value` over it, as with TRL's own commands. A key is a field of one of the config
classes; a value that does not fit it, or a key that nobody has, is an error that says what would be right.
"""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

COMMAND_LINE = "the command line"
RECIPES = Path(__file__).parent / "recipes"
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}


def recipes() -> list[str]:
    """Names that `--config` takes in place of a file."""
    return sorted(f.stem for f in RECIPES.glob("*.yaml"))


@dataclass(frozen=True)
class Given:
    """values: converted, by key. where: for each key, the file or the command line that it comes from."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def of(self, kind: Any) -> dict[str, Any]:
        """Those that are fields of this config class."""
        return {f.name: self.values[f.name] for f in fields(kind) if f.name in self.values}


def read(argv: Sequence[str], kinds: Sequence[Any], refused: Mapping[str, str] = {}) -> Given:
    """argv: `--config FILE.yaml` (or a recipe's name), and any `--key value`, which wins over the file. kinds: config classes that have
    the keys. refused: keys of theirs that may not be given, each with what to do instead. `env:` in the file sets environment
    variables.

    Raises FileNotFoundError, and ValueError naming the key.
    """
    typed = {f.name: typing.get_type_hints(kind)[f.name] for kind in kinds for f in fields(kind)}
    said = _command_line(argv)
    file = said.pop("config", None)
    given = Given()
    if file is not None:
        if not isinstance(file, str):
            raise ValueError("--config takes one file, such as --config recipe.yaml")
        written = _yaml(Path(file).expanduser())
        _set_environment(written.pop("env", None), file)
        _take(given, written, file, typed, refused)
    _take(given, said, COMMAND_LINE, typed, refused)
    return given


def _take(given: Given, values: Mapping[str, Any], where: str, typed: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    for key, value in values.items():
        if key in refused:
            raise ValueError(f"{where}: {key} cannot be given: {refused[key]}")
        if key not in typed:
            near = difflib.get_close_matches(str(key), [k for k in typed if k not in refused], 1)
            raise ValueError(
                f"{where}: there is no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "; --help lists all keys")
            )
        try:
            given.values[key] = convert(value, typed[key])
        except ValueError as e:
            said = "not given" if value is True and where == COMMAND_LINE else f"{value!r:.80}"
            raise ValueError(f"{where}: {key} is {said}; give {e}") from None
        given.where[key] = where


def _command_line(argv: Sequence[str]) -> dict[str, Any]:
    """{key: text, list of texts, or True where there is none}"""
    found: dict[str, Any] = {}
    key = ""
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            found[key] = value if equals else True
        elif not key:
            raise ValueError(f"cannot read {word!r} on the command line; write --config FILE.yaml, and --key value")
        else:
            before = found[key]
            found[key] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return found


def _yaml(file: Path) -> dict[str, Any]:
    if not file.is_file() and file.name in recipes():
        file = RECIPES / f"{file.name}.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"there is no config file {file}; recipes that come with PromptLoop: {', '.join(recipes())}")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"{file} is no YAML: {' '.join(str(e).split())}") from e
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{file} holds {type(found).__name__}, not lines of the form `key: value`")
    return found or {}


def _set_environment(env: Any, file: str) -> None:
    if env is not None and not isinstance(env, dict):
        raise ValueError(f"{file}: env is {env!r:.80}; give a mapping of environment variables to their values")
    os.environ.update({str(k): str(v) for k, v in (env or {}).items()})


# --- values -------------------------------------------------------------------------------------------------------------


def convert(value: Any, hint: Any) -> Any:
    """The value as the field's type has it: text becomes what it says ("1e-5", which YAML reads as text, becomes a number), and YAML's
    `no` the word where the field takes words. Raises ValueError that says what to give.
    """
    kinds = _kinds(hint)
    optional = type(None) in kinds
    if optional and (value is None or (isinstance(value, str) and value.lower() == "null")):
        return None
    for kind in (bool, int, float, dict, list, str):
        if kind in kinds:
            done, found = _as(value, kind, hint, str in kinds)
            if done:
                return found
    if not set(kinds) & set(KINDS) and value is not None:
        return value  # a type of somebody else's, which checks it itself
    raise ValueError(" or ".join(KINDS[k] for k in KINDS if k in kinds) + (", or null" if optional else ""))


def _as(value: Any, kind: type, hint: Any, or_text: bool) -> tuple[bool, Any]:
    """(whether it is of that kind, the value). or_text: the field takes text too, so that text is it."""
    if kind is bool:
        if isinstance(value, bool):
            return True, value
        text = str(value).lower() if isinstance(value, (str, int)) else ""
        return text in WORDS and not or_text, WORDS.get(text)
    if isinstance(value, bool):
        return (kind is str and value is False), "no"  # YAML's no, as in save_strategy: no
    if kind in (int, float):
        number = _number(value)
        whole = number is not None and number == int(number)
        if number is None or (kind is int and not whole):
            return False, None
        return True, int(number) if kind is int else number
    if kind in (dict, list) and isinstance(value, str) and value.lstrip().startswith("{" if kind is dict else "["):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            return False, None
    if kind is dict:
        return isinstance(value, dict), value
    if kind is list:
        if isinstance(value, str) and not or_text:
            value = [value]
        if not isinstance(value, list):
            return False, None
        element = next((typing.get_args(h) for h in _members(hint) if typing.get_origin(h) is list), (str,))[0]
        return True, [convert(v, element) for v in value]
    return isinstance(value, (str, int, float)), str(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _kinds(hint: Any) -> list[type]:
    """The plain types that a field takes; an enum is told by its text."""
    found = []
    for h in _members(hint):
        origin = typing.get_origin(h)
        if origin is typing.Literal:
            found += [type(a) for a in typing.get_args(h)]
        else:
            kind = origin or h
            found.append(str if isinstance(kind, type) and issubclass(kind, Enum) else kind)
    return found


# --- help ---------------------------------------------------------------------------------------------------------------


def help_text(usage: str, kinds: Mapping[str, Any], named: Mapping[str, Any], refused: Mapping[str, str] = {}) -> str:
    """kinds: by title, classes whose own fields are listed with what they do. named: by title, classes whose fields are listed by
    name and default only."""
    parts, there = [usage.strip()], set(refused)
    for title, kind in kinds.items():
        parts.append(f"\n{title}:")
        for f in _own(kind, there):
            parts.append(f"  {f.name}  ({_default(f)})\n      {' '.join(str(f.metadata.get('help', '')).split())}".rstrip())
    for title, kind in named.items():
        words = [f"{f.name} ({_default(f)})" for f in _own(kind, there)]
        parts.append(f"\n{title}:\n  " + ",\n  ".join(", ".join(words[i : i + 3]) for i in range(0, len(words), 3)))
    return "\n".join(parts)


def _own(kind: Any, there: set[str]) -> list[Field[Any]]:
    """Fields that the class itself declares, less those that were listed."""
    found = [f for f in fields(kind) if f.name in vars(kind).get("__annotations__", {}) and f.name not in there]
    there |= {f.name for f in found}
    return found


def _default(f: Field[Any]) -> str:
    value = f.default_factory() if f.default_factory is not MISSING else f.default
    return f'"{value}"' if isinstance(value, str) and not isinstance(value, Enum) else str(getattr(value, "value", value))
