"""instructor: a typed object by a forced tool call, whole and in pieces, by a JSON schema, and from whatever JSON the model makes."""

import json
import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: Literal["Paris", "London"]
    millions: int = Field(ge=0, le=9)


class Anything(BaseModel):
    """What any JSON object is."""

    note: object = None


client = openai.OpenAI(base_url=os.environ["MANTA_HTTP"], api_key="none", max_retries=0)
asked = {
    "model": os.environ["MANTA_MODEL"],
    "messages": [{"role": "user", "content": "Paris has two million inhabitants."}],
    "temperature": 0,
    "max_tokens": 128,
    "max_retries": 0,
}
told = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    place = instructor.from_openai(client, mode=mode).chat.completions.create(response_model=Place, **asked)
    told[mode.name] = type(place).__name__
told["JSON"] = type(
    instructor.from_openai(client, mode=instructor.Mode.JSON).chat.completions.create(response_model=Anything, **asked)
).__name__
partly = list(instructor.from_openai(client, mode=instructor.Mode.TOOLS).chat.completions.create_partial(response_model=Place, **asked))
told["partly"] = [len(partly) > 1, partly[-1].city in ("Paris", "London")]
print(json.dumps(told))
