"""litellm as a library: tools, whole and streamed, by name and required; a pydantic model as response_format."""

import json
import os
from typing import Literal

import litellm
from pydantic import BaseModel, Field


class Place(BaseModel):
    city: Literal["Paris", "London"]
    millions: int = Field(ge=0, le=9)


def offered(name: str, field: str, values: list[str]) -> dict:
    parameters = {
        "type": "object",
        "properties": {field: {"type": "string", "enum": values}},
        "required": [field],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": f"Tells {field}.", "parameters": parameters}}


asked = {
    "model": f"openai/{os.environ['MANTA_MODEL']}",
    "api_base": os.environ["MANTA_HTTP"],
    "api_key": "none",
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "temperature": 0,
    "max_tokens": 96,
}
tools = {"tools": [offered("get_weather", "unit", ["C", "F"]), offered("get_time", "zone", ["CET", "UTC"])]}
named = tools | {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "parallel_tool_calls": False}
answer = litellm.completion(**asked, **named)
message = answer.choices[0].message
(call,) = message.tool_calls
chunks = list(litellm.completion(**asked, **named, stream=True))
(streamed,) = litellm.stream_chunk_builder(chunks, messages=asked["messages"]).choices[0].message.tool_calls
required = litellm.completion(**asked, **tools, tool_choice="required").choices[0].message.tool_calls
told = [*asked["messages"], message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
after = litellm.completion(**{**asked, "messages": told, "max_tokens": 8}, **tools, tool_choice="none")
place = litellm.completion(**asked, response_format=Place).choices[0].message.content
print(
    json.dumps(
        {
            "called": [call.function.name, sorted(json.loads(call.function.arguments)), answer.choices[0].finish_reason],
            "streamed": [streamed.function.name, streamed.function.arguments] == [call.function.name, call.function.arguments],
            "required": {one.function.name for one in required} <= {"get_weather", "get_time"},
            "after the result": bool(after.choices[0].message.content),
            "place": sorted(Place.model_validate_json(place).model_dump()),
        }
    )
)
