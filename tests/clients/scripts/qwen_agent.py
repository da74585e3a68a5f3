"""qwen-agent: its chat model streams and does not, and its own function calling sends the tools in its prompt and parses the answer."""

import json
import os

from qwen_agent.llm import get_chat_model

llm = get_chat_model(
    {
        "model": os.environ["MANTA_MODEL"],
        "model_server": os.environ["MANTA_HTTP"],
        "model_type": "oai",
        "api_key": "none",
        "generate_cfg": {"temperature": 0, "max_tokens": 16, "max_input_tokens": 4000},
    }
)
messages = [{"role": "user", "content": "What is the capital of France?"}]
*_, streamed = llm.chat(messages=messages, stream=True)
(whole,) = llm.chat(messages=messages, stream=False)
weather = {
    "name": "get_current_weather",
    "description": "Get the current weather in a given location",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
*_, called = llm.chat(messages=[{"role": "user", "content": "What's the weather like in Paris?"}], functions=[weather], stream=True)
print(
    json.dumps(
        {
            "text": whole["content"],
            "streamed": streamed[-1]["content"],
            "with functions": [[message["role"], bool(message.get("content") or message.get("function_call"))] for message in called],
        }
    )
)
