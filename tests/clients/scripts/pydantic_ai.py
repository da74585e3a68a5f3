"""pydantic-ai: an agent that answers in text, whole and streamed."""

import asyncio
import json
import os

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings


async def main() -> None:
    model = OpenAIChatModel(os.environ["MANTA_MODEL"], provider=OpenAIProvider(base_url=os.environ["MANTA_HTTP"], api_key="none"))
    settings = ModelSettings(temperature=0, max_tokens=16)
    agent = Agent(model, model_settings=settings)
    answer = await agent.run("What is the capital of France?")
    async with agent.run_stream("What is the capital of France?") as run:
        streamed = [piece async for piece in run.stream_text(delta=True)]
    told = {"text": answer.output, "streamed": "".join(streamed), "usage": answer.usage.total_tokens}
    print(json.dumps(told))


asyncio.run(main())
