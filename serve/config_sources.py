"""Load settings from a YAML file, the environment and flags; each source overrides the ones before.

All problems are reported at once, each with the source it came from.
"""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from serve.config import DERIVED, ModelEntry, ServeConfig

PREFIX = "MANTA_"
SEPARATOR = "__"
"""`MANTA_HTTP__PORT` sets http.port. Variables without a double underscore are ignored: Kubernetes defines some (`MANTA_PORT`,
`MANTA_SERVICE_HOST`) for a service named manta."""
MAX_FILE_BYTES = 1024 * 1024
LIST = "models"


class ConfigError(ValueError):
    """Invalid settings; the message has one line per problem."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class Entry:
    """One setting from one source."""

    path: str
    """section.field, or models.N.section.field for entry N (from 0) of the list of models"""
    value: Any
    origin: str
    """The source, as shown to users: ``manta.yaml:3``, ``MANTA_HTTP__PORT``, ``--http-port``."""


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    config: ServeConfig
    origins: Mapping[str, str]
    """Setting path to the source of its value; settings that are missing here have their default."""


def load(*, file: Path | None = None, environment: Mapping[str, str] | None = None, flags: Iterable[Entry] = ()) -> LoadedConfig:
    """Merge the sources and validate the result.

    Raises:
        ConfigError: a source cannot be read, a setting is unknown, or a value is invalid.
    """
    return merge_entries([*(from_file(file) if file else ()), *from_environment(environment or {}), *flags])


def merge_entries(entries: Iterable[Entry]) -> LoadedConfig:
    """Merge ``entries``, later ones overriding earlier ones, and validate the result.

    Raises:
        ConfigError: see `load`.
    """
    entries = list(entries)
    problems = [unknown_setting_error(entry) for entry in entries if setting_at(entry.path) is None]
    chosen = {entry.path: entry for entry in entries if setting_at(entry.path) is not None}
    problems += _gaps(entries)
    try:
        config = ServeConfig.model_validate(_tree(chosen))
    except ValidationError as error:
        raise ConfigError([*problems, *_wrong_values(error, chosen)]) from None
    if problems:
        raise ConfigError(problems)
    return LoadedConfig(config=config, origins={path: entry.origin for path, entry in chosen.items()})


def _tree(chosen: Mapping[str, Entry]) -> dict[str, Any]:
    """The entries as nested mappings for `ServeConfig`."""
    tree: dict[str, Any] = {}
    models: dict[int, dict[str, Any]] = {}
    for path, entry in chosen.items():
        *place, section, name = path.split(".")
        sections = models.setdefault(int(place[1]), {}) if place else tree
        sections.setdefault(section, {})[name] = entry.value
    return tree | ({"models": [models[index] for index in sorted(models)]} if models else {})


def _gaps(entries: Iterable[Entry]) -> Iterator[str]:
    """Problems for indices of `models` that skip a number: the index was probably mistyped."""
    first: dict[int, Entry] = {}
    for entry in entries:
        if match := re.match(r"models\.(\d{1,3})\.", entry.path):
            first.setdefault(int(match.group(1)), entry)
    for index in sorted(first):
        if index and index - 1 not in first:
            yield f"{first[index].path} ({first[index].origin}): there is no entry models.{index - 1} before it"


def setting_at(path: str) -> str | None:
    """The setting that a path refers to, as section.field; None if there is no such setting."""
    match = re.fullmatch(r"models\.\d{1,3}\.((\w+)\.\w+)", path)
    setting = match.group(1) if match and match.group(2) in ModelEntry.model_fields else path
    return setting if setting in known_settings() else None


@cache
def known_settings() -> Mapping[str, Any]:
    """Path and type of every setting. Settings of a model can also appear in entries of the list `models`."""
    return {
        f"{section}.{name}": hint
        for section, field in ServeConfig.model_fields.items()
        if section != LIST
        for name, hint in _fields(field.annotation).items()
        if f"{section}.{name}" not in DERIVED
    }


def _fields(section: Any) -> dict[str, Any]:
    if issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    return typing.get_type_hints(section)


def unknown_setting_error(entry: Entry) -> str:
    """Error message for an unknown setting, with the closest existing one."""
    near = difflib.get_close_matches(entry.path, known_settings(), n=1, cutoff=0.6) or _same_words(entry.path)
    advice = f"; did you mean {near[0]}?" if near else "; `manta config` lists them all"
    return f"unknown setting {entry.path} ({entry.origin}){advice}"


def _same_words(path: str) -> list[str]:
    """The setting that shares most words with the path, as for ``tensor_parallel`` or ``max_step_tokens`` without a section."""
    words = set(re.split(r"[._-]", path.lower()))
    best = max(known_settings(), key=lambda known: len(words & set(re.split(r"[._]", known))) / len(words))
    return [best] if len(words & set(re.split(r"[._]", best))) * 2 > len(words) else []


def from_file(file: Path) -> list[Entry]:
    """The settings of a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or does not consist of sections of settings.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"cannot read {file}: {error.strerror}"]) from None
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError([f"{file} is larger than {MAX_FILE_BYTES} bytes"])
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        return list(_entries(loader, root, file.name)) if root is not None else []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file} is not YAML: {' '.join(str(error).split())}"]) from None


def from_tree(tree: Mapping[str, Any], origin: str) -> list[Entry]:
    """Entries of a nested mapping, as programs pass it. Also accepts ``section.field`` keys whose value may be text, as on command lines.

    Raises:
        ConfigError: a section is not a mapping.
    """
    entries: list[Entry] = []
    for section, fields in tree.items():
        place = f"{origin}.{section}"
        if section == LIST and isinstance(fields, list | tuple):
            for index, each in enumerate(fields):
                inner = from_tree(_mapping(each, f"{place}.{index}"), f"{place}.{index}")
                entries.extend(Entry(f"{LIST}.{index}.{entry.path}", entry.value, entry.origin) for entry in inner)
        elif "." in section:
            entries.append(from_text(section, fields, place) if isinstance(fields, str) else Entry(section, fields, place))
        elif isinstance(fields, Mapping):
            entries.extend(Entry(f"{section}.{name}", value, f"{place}.{name}") for name, value in fields.items())
        elif section not in ServeConfig.model_fields:
            entries.append(Entry(section, None, place))
        elif fields is not None:
            _mapping(fields, place)
    return entries


def _mapping(given: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError([f"{place} must be a mapping of names to values"])
    return given


def _entries(loader: yaml.SafeLoader, root: yaml.Node, file: str) -> Iterator[Entry]:
    for section, where, node in _pairs(loader, root, file, "the whole file"):
        if section == LIST and isinstance(node, yaml.SequenceNode):
            for index, entry in enumerate(node.value):
                for part, place, inner in _pairs(loader, entry, file, f"each entry of {LIST}"):
                    yield from _section(loader, inner, file, part, place, known=ModelEntry, prefix=f"{LIST}.{index}.")
        elif section == LIST and not _is_empty(node):
            raise ConfigError([f"{LIST} must be a list, one entry for each model ({where})"])
        else:
            yield from _section(loader, node, file, section, where, known=ServeConfig)


def _section(
    loader: yaml.SafeLoader, node: yaml.Node, file: str, section: str, where: str, *, known: type[BaseModel], prefix: str = ""
) -> Iterator[Entry]:
    if _is_empty(node):
        return
    if section not in known.model_fields:
        if isinstance(node, yaml.MappingNode):
            yield from (Entry(f"{prefix}{section}.{name}", None, place) for name, place, _ in _pairs(loader, node, file, section))
        else:
            yield Entry(f"{prefix}{section}", None, where)
        return
    for name, place, value in _pairs(loader, node, file, section):
        yield Entry(f"{prefix}{section}.{name}", loader.construct_object(value, deep=True), place)


def _is_empty(node: yaml.Node) -> bool:
    """Whether a section is empty, for example because all of its settings are commented out."""
    return isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~")


def _pairs(loader: yaml.SafeLoader, node: yaml.Node, file: str, what: str) -> Iterator[tuple[str, str, yaml.Node]]:
    """(key, source, value) of a mapping. A duplicate key is an error; YAML loaders would accept it silently."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([f"{what} must be a mapping of names to values ({file}:{node.start_mark.line + 1})"])
    seen: dict[str, str] = {}
    for key_node, value in node.value:
        key, place = str(loader.construct_object(key_node)), f"{file}:{key_node.start_mark.line + 1}"
        if key in seen:
            raise ConfigError([f"{key} is there twice ({seen[key]} and {place})"])
        seen[key] = place
        yield key, place, value


def from_environment(environment: Mapping[str, str]) -> list[Entry]:
    """Variables ``MANTA_<SECTION>__<FIELD>``."""
    ours = (name for name in sorted(environment) if name.startswith(PREFIX) and SEPARATOR in name.removeprefix(PREFIX))
    return [from_text(name.removeprefix(PREFIX).lower().replace(SEPARATOR, "."), environment[name], name) for name in ours]


def from_assignment(text: str) -> Entry:
    """``--set section.field=value``.

    Raises:
        ConfigError: there is no ``=``.
    """
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError([f"--set {text}: write section.field=value"])
    return from_text(path.strip(), value, f"--set {path.strip()}")


def from_text(path: str, text: str, origin: str) -> Entry:
    """An entry whose value is text: taken as it is if the setting is text, else parsed as YAML."""
    types_of_setting = _flat(known_settings().get(setting_at(path) or "", str))
    if type(None) in types_of_setting and text.strip().lower() in ("", "null", "none"):
        return Entry(path, None, origin)
    if any(kind is str or isinstance(kind, str) for kind in types_of_setting):
        return Entry(path, text, origin)
    try:
        return Entry(path, yaml.safe_load(text), origin)
    except yaml.YAMLError:
        return Entry(path, text, origin)  # pydantic reports the expected type


def _flat(hint: Any) -> tuple[Any, ...]:
    """Members of a union, values of a Literal, or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in _flat(part))
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else (hint,)


def _wrong_values(error: ValidationError, chosen: Mapping[str, Entry]) -> Iterator[str]:
    for problem in error.errors(include_url=False, include_context=False):
        depth = 4 if problem["loc"][:1] == (LIST,) else 2
        path = ".".join(str(part) for part in problem["loc"][:depth])
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if path in chosen:
            yield f"{path} {message}, got {chosen[path].value!r:.100} ({chosen[path].origin})"
        else:  # a check of a section or between sections; or an entry of `models` inherited the value, which is reported at the top level
            within = [entry for entry in chosen.values() if entry.path.startswith(path)]
            named = [entry for entry in within if re.search(rf"\b{re.escape(entry.path)}\b", message)]  # prefer settings that are named
            involved = sorted({entry.origin for entry in named or within})
            if involved or depth == 2:
                yield f"{f'{path}: ' if path else ''}{message} ({', '.join(involved) or 'default'})"
