"""langchain-openai: bind_tools whole, streamed and answered; with_structured_output by schema and by a forced call."""

import json
import os
from functools import reduce
from operator import add
from typing import Literal

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


@tool
def get_weather(unit: Literal["C", "F"]) -> str:
    """Weather of Paris."""
    return f"21 degrees {unit}"


@tool
def get_time(zone: Literal["CET", "UTC"]) -> str:
    """Time of day."""
    return f"noon {zone}"


class Place(BaseModel):
    """A city."""

    city: Literal["Paris", "London"]
    millions: int = Field(ge=0, le=9)


chat = ChatOpenAI(
    model=os.environ["MANTA_MODEL"], base_url=os.environ["MANTA_HTTP"], api_key="none", temperature=0, max_tokens=96, max_retries=0
)
question, tools = HumanMessage("What is the weather in Paris?"), [get_weather, get_time]
named = chat.bind_tools(tools, tool_choice="get_weather", parallel_tool_calls=False)
called = named.invoke([question])
streamed = reduce(add, named.stream([question]))
(call,) = called.tool_calls
after = chat.bind_tools(tools, tool_choice="none").invoke([question, called, get_weather.invoke(call)])
any_call = chat.bind_tools(tools, tool_choice="any").invoke([question]).tool_calls
places = {
    method: type(chat.with_structured_output(Place, method=method).invoke("Paris has two million inhabitants.")).__name__
    for method in ("json_schema", "function_calling")
}
print(
    json.dumps(
        {
            "called": [call["name"], call["args"]["unit"] in ("C", "F")],
            "streamed": [(one["name"], one["args"]) for one in streamed.tool_calls] == [(call["name"], call["args"])],
            "any": bool(any_call) and {one["name"] for one in any_call} <= {"get_weather", "get_time"},
            "after the result": bool(after.content),
            "places": places,
        }
    )
)
