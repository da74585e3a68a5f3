"""langchain-openai over /v1/responses: a text whole and streamed, a tool called and answered, a typed output."""

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


class Place(BaseModel):
    """A city."""

    city: Literal["Paris", "London"]
    millions: int = Field(ge=0, le=9)


chat = ChatOpenAI(
    model=os.environ["MANTA_MODEL"],
    base_url=os.environ["MANTA_HTTP"],
    api_key="none",
    temperature=0,
    max_tokens=96,
    max_retries=0,
    use_responses_api=True,
    store=False,
)
capital, question = HumanMessage("What is the capital of France?"), HumanMessage("What is the weather in Paris?")
whole, pieces = chat.invoke([capital]), reduce(add, chat.stream([capital]))
named = chat.bind_tools([get_weather], tool_choice="get_weather", parallel_tool_calls=False)
called, streamed = named.invoke([question]), reduce(add, named.stream([question]))
(call,) = called.tool_calls
after = chat.bind_tools([get_weather], tool_choice="none").invoke([question, called, get_weather.invoke(call)])
print(
    json.dumps(
        {
            "text": whole.text,
            "streamed text": pieces.text == whole.text,
            "usage": whole.usage_metadata["total_tokens"],
            "called": [call["name"], call["args"]["unit"] in ("C", "F")],
            "streamed": [(one["name"], one["args"]) for one in streamed.tool_calls] == [(call["name"], call["args"])],
            "after the result": bool(after.text),
            "place": type(chat.with_structured_output(Place, method="json_schema").invoke("Paris has two million inhabitants.")).__name__,
        }
    )
)
