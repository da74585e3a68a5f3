"""instructor: a typed object by a forced tool call, and one by a JSON schema."""

import json
import os

import instructor
import openai
from pydantic import BaseModel


class Place(BaseModel):
    city: str
    inhabitants: int


told = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=os.environ["MANTA_HTTP"], api_key="none", max_retries=0), mode=mode)
    place = client.chat.completions.create(
        model=os.environ["MANTA_MODEL"],
        response_model=Place,
        messages=[{"role": "user", "content": "Paris has two million inhabitants."}],
        temperature=0,
        max_tokens=128,
        max_retries=1,
    )
    told[mode.name] = place.model_dump()
print(json.dumps(told))
