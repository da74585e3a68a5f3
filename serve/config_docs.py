"""The output of `manta config`: the settings in effect with their documentation, the JSON schema, or one setting explained.

All of it is derived from the section classes, so that a setting is documented in one place only: below its field.
"""

import json
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from serve.config import DERIVED, ServeConfig
from serve.config_sources import LIST, PREFIX, SEPARATOR, ConfigError, Entry, LoadedConfig, known_settings, unknown_setting_error

WIDTH = 110
"""Of a file."""


@dataclass(frozen=True, kw_only=True)
class SettingDoc:
    path: str
    kind: str
    """The type in words."""
    default: Any
    doc: str


def json_schema() -> dict[str, Any]:
    """JSON schema of a settings file."""
    schema = ServeConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for path in DERIVED:
        section, name = path.split(".")
        del _section(schema, section)["properties"][name]
    return schema


def _section(schema: Mapping[str, Any], section: str) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"][schema["properties"][section]["$ref"].rsplit("/", 1)[1]]
    return found


@cache
def setting_docs() -> Mapping[str, SettingDoc]:
    schema = json_schema()
    return {path: _setting_doc(path, _section(schema, path.split(".")[0])["properties"][path.split(".")[1]]) for path in known_settings()}


def _setting_doc(path: str, schema: Mapping[str, Any]) -> SettingDoc:
    return SettingDoc(
        path=path, kind=_in_words(known_settings()[path]), default=schema.get("default"), doc=_plain(schema.get("description", ""))
    )


def _plain(doc: str) -> str:
    """A docstring in YAML's terms: one line, null instead of None."""
    return re.sub(r"\bNone\b", "null", " ".join(doc.split()).replace("``", "`"))


def _in_words(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(json.dumps(value) for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_in_words(typing.get_args(hint)[0])}"
    if members := typing.get_args(hint):
        return " or ".join(_in_words(member) for member in members)
    return str({str: "text", bool: "true or false"}.get(hint, hint.__name__))


def as_yaml(loaded: LoadedConfig, *, width: int = WIDTH) -> str:
    """The settings in effect as a file for `-c`: documentation above each setting, the origin of its value behind it."""
    return "\n".join(_yaml_lines(loaded, width)) + "\n"


def _yaml_lines(loaded: LoadedConfig, width: int) -> Iterator[str]:
    schema = json_schema()
    values = loaded.config.model_dump(mode="json")
    for section, fields in values.items():
        if section == LIST:
            yield from _model_lines(values, loaded, width)
            continue
        yield from ("", *_comment(_section(schema, section).get("description", ""), width, indent=""), f"{section}:")
        for name, value in fields.items():
            path = f"{section}.{name}"
            if path in DERIVED:
                continue
            origin = loaded.origins.get(path)
            yield from _comment(setting_docs()[path].doc, width, indent="  ")
            yield f"  {name}: {json.dumps(value)}{f'  # from {origin}' if origin else ''}"


def _model_lines(values: Mapping[str, Any], loaded: LoadedConfig, width: int) -> Iterator[str]:
    """The list of models: for each entry the settings that differ from the top-level sections."""
    doc = json_schema()["properties"][LIST]["description"]
    yield from ("", *_comment(doc, width, indent=""), f"{LIST}:{'' if values[LIST] else ' []'}")
    for index, entry in enumerate(values[LIST]):
        bullet = "- "
        for section, fields in entry.items():
            own = {name: value for name, value in fields.items() if section == "model" or value != values[section][name]}
            if not own:
                continue
            yield f"  {bullet}{section}:"
            bullet = "  "
            for name, value in own.items():
                origin = loaded.origins.get(f"{LIST}.{index}.{section}.{name}")
                yield f"      {name}: {json.dumps(value)}{f'  # from {origin}' if origin else ''}"


def _comment(text: str, width: int, *, indent: str) -> list[str]:
    return textwrap.wrap(_plain(text), width, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def explain(path: str, loaded: LoadedConfig, *, width: int = WIDTH) -> str:
    """Explain one setting: meaning, type, current value and its origin. For a section: the first sentence about each of its settings.

    Raises:
        ConfigError: there is no such setting; the message suggests the closest one.
    """
    if within := [name for name in setting_docs() if name.startswith(f"{path}.")]:
        return "\n".join(line for name in within for line in _in_a_list(name, max(map(len, within)), width))
    if path not in setting_docs():
        raise ConfigError([unknown_setting_error(Entry(path, None, "--explain"))])
    doc = setting_docs()[path]
    section, name = path.split(".")
    value = json.dumps(loaded.config.model_dump(mode="json")[section][name])
    return "\n".join(
        (
            path,
            *textwrap.wrap(doc.doc, min(width, WIDTH), initial_indent="  ", subsequent_indent="  "),
            "",
            f"  type         {doc.kind}",
            f"  default      {json.dumps(doc.default)}",
            f"  now          {value} ({loaded.origins.get(path, 'default')})",
            f"  in a file    {section}: {{{name}: {value}}}",
            f"  environment  {PREFIX}{section.upper()}{SEPARATOR}{name.upper()}={value}",
            f"  flag         --set {path}={value}",
        )
    )


def _in_a_list(path: str, column: int, width: int) -> list[str]:
    """The setting's name and first sentence as lines of a list; the sentence is below the name if there is no room beside it."""
    sentence, indent = _first_sentence(setting_docs()[path].doc), column + 2
    if width - indent < column:
        return [path, *textwrap.wrap(sentence, width, initial_indent="    ", subsequent_indent="    ")]
    return textwrap.wrap(sentence, width, initial_indent=f"{path:<{column}}  ", subsequent_indent=" " * indent)


def _first_sentence(doc: str) -> str:
    return re.split(r"(?<=[.;:])\s", " ".join(doc.split()), maxsplit=1)[0].rstrip(".;:")
