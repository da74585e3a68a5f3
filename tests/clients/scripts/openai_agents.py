"""openai-agents over /v1/responses, its default: a tool called and answered, whole and streamed, a typed output, a hand-over, a session."""

import asyncio
import json
import os
from typing import Literal

from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, SQLiteSession, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=os.environ["MANTA_HTTP"], api_key="none", max_retries=0)
model = OpenAIResponsesModel(os.environ["MANTA_MODEL"], client)
ASK = "What is the weather in Paris?"
asked: list[str] = []


class Place(BaseModel):
    city: Literal["Paris", "London"]
    millions: int = Field(ge=0, le=9)


@function_tool
def get_weather(unit: Literal["C", "F"]) -> str:
    """Weather of Paris."""
    asked.append(unit)
    return f"sunny, 21 degrees {unit}"


def settings(tool_choice: str | None = None) -> ModelSettings:
    return ModelSettings(tool_choice=tool_choice, temperature=0, parallel_tool_calls=False if tool_choice else None)


def kinds(result) -> list[str]:
    return [item.type for item in result.new_items]


async def main() -> None:
    weather = Agent(name="Weather", instructions="Be brief.", tools=[get_weather], model=model, model_settings=settings("required"))
    first = await Runner.run(weather, ASK)
    streamed = Runner.run_streamed(weather, ASK)
    text = "".join(
        [
            event.data.delta
            async for event in streamed.stream_events()
            if getattr(event, "data", None) and event.data.type == "response.output_text.delta"
        ]
    )
    typed = await Runner.run(
        Agent(name="Places", output_type=Place, model=model, model_settings=settings()), "Paris has two million inhabitants."
    )
    desk = Agent(
        name="Desk",
        handoffs=[Agent(name="Clerk", model=model, model_settings=settings())],
        model=model,
        model_settings=settings("required"),
    )
    handed = await Runner.run(desk, "Hello")
    session = SQLiteSession("one")
    talker = Agent(name="Talker", model=model, model_settings=settings())
    await Runner.run(talker, "What is the capital of France?", session=session)
    again = await Runner.run(talker, "And of Italy?", session=session)
    print(
        json.dumps(
            {
                "asked": len(asked),
                "kinds": kinds(first),
                "answered": bool(first.final_output),
                "streamed": text.endswith(streamed.final_output) and kinds(streamed) == kinds(first),
                "typed": type(typed.final_output).__name__,
                "handed": [handed.last_agent.name, kinds(handed)],
                "session": [bool(again.final_output), len(await session.get_items())],
                "usage": first.context_wrapper.usage.requests,
            }
        )
    )


asyncio.run(main())
