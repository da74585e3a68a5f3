"""pydantic-ai: an agent that answers in text, whole and streamed, and one whose output is a typed object."""

import asyncio
import json
import os

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings


class Place(BaseModel):
    city: str
    inhabitants: int


async def main() -> None:
    model = OpenAIChatModel(os.environ["MANTA_MODEL"], provider=OpenAIProvider(base_url=os.environ["MANTA_HTTP"], api_key="none"))
    settings = ModelSettings(temperature=0, max_tokens=16)
    agent = Agent(model, model_settings=settings)
    answer = await agent.run("What is the capital of France?")
    async with agent.run_stream("What is the capital of France?") as run:
        streamed = [piece async for piece in run.stream_text(delta=True)]
    told = {"text": answer.output, "streamed": "".join(streamed), "usage": answer.usage.total_tokens}
    if os.environ.get("MANTA_TOOLS"):
        typed = Agent(model, output_type=Place, model_settings=ModelSettings(temperature=0, max_tokens=128))
        told["typed"] = (await typed.run("Paris has two million inhabitants.")).output.model_dump()
    print(json.dumps(told))


asyncio.run(main())
