"""pydantic-ai: an agent that calls a tool and then ends with a typed object, whole and streamed; one whose output is a JSON schema."""

import asyncio
import json
import os
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings


class Place(BaseModel):
    city: Literal["Paris", "London"]
    millions: int = Field(ge=0, le=9)


class ToolFirst(AbstractCapability[None]):
    """The model must call a function in the first step, and come to its end in the second."""

    def get_model_settings(self) -> Any:
        return lambda ctx: ModelSettings(tool_choice=["get_weather" if ctx.run_step == 1 else "final_result"])


async def main() -> None:
    profile = OpenAIModelProfile(supports_json_schema_output=True)
    provider = OpenAIProvider(base_url=os.environ["MANTA_HTTP"], api_key="none")
    model = OpenAIChatModel(os.environ["MANTA_MODEL"], provider=provider, profile=profile)
    settings = ModelSettings(temperature=0, max_tokens=96, parallel_tool_calls=False)
    asked: list[str] = []
    agent = Agent(model, output_type=Place, model_settings=settings, capabilities=[ToolFirst()])

    @agent.tool_plain
    def get_weather(unit: Literal["C", "F"]) -> str:
        """Weather of Paris."""
        asked.append(unit)
        return f"21 degrees {unit}"

    whole = await agent.run("How warm is it in Paris?")
    async with agent.run_stream("How warm is it in Paris?") as run:
        partly = [one async for one in run.stream_output(debounce_by=None)]
    native = Agent(model, output_type=NativeOutput(Place), model_settings=settings)
    print(
        json.dumps(
            {
                "asked": len(asked) == 2 and set(asked) <= {"C", "F"},
                "kinds": [[part.part_kind for part in message.parts] for message in whole.all_messages()],
                "typed": type(whole.output).__name__,
                "streamed": partly[-1] == whole.output,
                "native": type((await native.run("Paris has two million inhabitants.")).output).__name__,
            }
        )
    )


asyncio.run(main())
