"""Fifty JSON schemas of the kinds that people send. Whatever could grow without end is bounded, so that random weights come to one."""

from typing import Any

SHORT = {"type": "string", "maxLength": 6}


def thing(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False, **more}


SCHEMAS: list[dict[str, Any]] = [
    thing({"name": SHORT}),
    thing({"age": {"type": "integer", "minimum": 0, "maximum": 150}}),
    thing({"price": {"type": "number", "minimum": 0, "maximum": 9.5}}),
    thing({"ok": {"type": "boolean"}}),
    thing({"nothing": {"type": "null"}}),
    thing({"colour": {"enum": ["red", "green", "blue"]}}),
    thing({"kind": {"const": "fixed"}}),
    thing({"mixed": {"enum": [1, "two", None, True, [3], {"four": 4}]}}),
    thing({"tags": {"type": "array", "items": SHORT, "maxItems": 3}}),
    thing({"pair": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 2}}),
    thing({"tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["a", "b"]}], "items": False, "minItems": 2}}),
    thing({"grid": {"type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 2, "items": {"type": "boolean"}}}}),
    thing({"inner": thing({"deep": thing({"deeper": {"type": "boolean"}})})}),
    thing({"either": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]}}),
    thing({"maybe": {"type": ["boolean", "null"]}}),
    thing({"optional": {"anyOf": [{"enum": ["x", "y"]}, {"type": "null"}]}}),
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}}, "required": ["b"], "additionalProperties": False},
    thing({"code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"}}),
    thing({"id": {"type": "string", "pattern": "^(user|team)_[a-z0-9]{4,8}$"}}),
    thing({"day": {"type": "string", "format": "date"}}),
    thing({"at": {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"}}),
    thing({"uuid": {"type": "string", "format": "uuid"}}),
    thing({"ip": {"type": "string", "format": "ipv4"}}),
    thing({"even": {"type": "integer", "minimum": -20, "maximum": 20, "multipleOf": 2}}),
    thing({"low": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 4}}),
    thing({"Grüße 🙂": {"enum": ["ä", "你好", "🙂"]}}),
    thing({'quo"te\\': {"enum": ['"', "\\", "\n"]}}),
    thing({"ref": {"$ref": "#/$defs/flag"}}, **{"$defs": {"flag": {"type": "boolean"}}}),
    thing(
        {"people": {"type": "array", "items": {"$ref": "#/$defs/person"}, "minItems": 1, "maxItems": 2}},
        **{"$defs": {"person": thing({"name": SHORT, "old": {"type": "boolean"}})}},
    ),
    {"type": "boolean"},
    {"type": "integer", "minimum": 10, "maximum": 99},
    {"type": "string", "maxLength": 5},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 1, "maxItems": 4},
    {"enum": ["north", "south"]},
    {"const": {"a": [1, 2]}},
    {"anyOf": [thing({"cat": {"type": "boolean"}}), thing({"dog": {"enum": [1, 2, 3]}})]},
    {"allOf": [{"type": "integer", "minimum": 0}, {"maximum": 7}]},
    thing({"name": {"const": "search"}, "arguments": thing({"query": SHORT, "top": {"enum": [1, 5, 10]}})}),
    thing({"steps": {"type": "array", "maxItems": 2, "items": thing({"explanation": SHORT, "output": SHORT})}, "final": SHORT}),
    thing({f"field_{number}": {"type": "boolean"} for number in range(20)}),
    thing({"a": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, thing({"b": {"enum": [0]}})]}, "maxItems": 2}}),
    thing({"lat": {"type": "number", "minimum": -90, "maximum": 90}, "lon": {"type": "number", "minimum": -180, "maximum": 180}}),
    thing({"title": SHORT, "description": {"type": "string", "minLength": 1, "maxLength": 12}}, title="A page", description="of a book"),
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
    {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "boolean"}}, "additionalProperties": False, "maxProperties": 1},
    thing({"depth": {"$ref": "#/$defs/one"}}, **{"$defs": {"one": {"$ref": "#/$defs/two"}, "two": {"enum": ["bottom"]}}}),
    thing({"unicode": {"type": "string", "pattern": "^[а-я]{1,5}$"}}),  # noqa: RUF001
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
]
assert len(SCHEMAS) == 50
