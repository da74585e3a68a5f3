"""qwen-agent's own example of function calling, in the three ways it knows: Hermes' prompt, Qwen's prompt, and the server's tools.

In the first two it writes the tools into the prompt and reads the calls out of the answer by itself; what a model that knows neither
would answer is held by a regular expression. In the third it sends `tools`, and the server does the rest.
"""

import json
import os

from qwen_agent.llm import get_chat_model

CALLS = {
    "nous": '<tool_call>\n\\{"name": "get_current_weather", "arguments": \\{"location": "(Paris|London)"\\}\\}\n</tool_call>',
    "qwen": '✿FUNCTION✿: get_current_weather\n✿ARGS✿: \\{"location": "(Paris|London)"\\}\n✿RESULT✿',
}
FUNCTIONS = [
    {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "enum": ["Paris", "London"]}},
            "required": ["location"],
            "additionalProperties": False,
        },
    }
]
NAMED = {"type": "function", "function": {"name": "get_current_weather"}}


def get_current_weather(location: str) -> str:
    return json.dumps({"location": location, "temperature": "21", "unit": "celsius"})


def example(generate_cfg: dict, calling: dict, answering: dict, *, stream: bool = True) -> list:
    """As examples/function_calling.py has it: ask, call the function, send what it said, ask again.

    With Qwen's prompt it cannot read a stream: it falls over a first chunk that has a role and no text, as every server's has.
    """

    def ask() -> list:
        cfg = answering if len(messages) > 1 else calling
        answer = llm.chat(messages=messages, functions=FUNCTIONS, stream=stream, extra_generate_cfg=cfg)
        return list(answer)[-1] if stream else answer

    llm = get_chat_model(
        {
            "model": os.environ["MANTA_MODEL"],
            "model_server": os.environ["MANTA_HTTP"],
            "model_type": "oai",
            "api_key": "none",
            "generate_cfg": {"temperature": 0, "max_tokens": 64, "max_input_tokens": 4000, **generate_cfg},
        }
    )
    messages = [{"role": "user", "content": "What's the weather like in Paris?"}]
    responses = ask()
    messages.extend(responses)
    call = messages[-1].get("function_call")
    assert call, responses
    result = get_current_weather(**json.loads(call["arguments"]))
    messages.append({"role": "function", "name": call["name"], "content": result, "extra": messages[-1].get("extra") or {}})
    responses = ask()
    return [call["name"], sorted(json.loads(call["arguments"])), responses[-1]["role"], bool(responses[-1]["content"])]


told = {}
for kind, form in CALLS.items():
    calling, answering = ({"extra_body": {"structured_outputs": {"regex": one}}} for one in (form, "The weather is [a-z]{3,9}\\."))
    told[kind] = example({"fncall_prompt_type": kind}, calling, answering, stream=kind == "nous")
told["raw"] = example({"use_raw_api": True}, {"tool_choice": NAMED}, {"tool_choice": "none"})
print(json.dumps(told))
