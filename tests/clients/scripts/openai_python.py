"""openai-python, 2.x and 3.x alike: whole and streamed chat, completions, models, an error."""

import json
import os

import openai

MODEL, MESSAGES = os.environ["MANTA_MODEL"], [{"role": "user", "content": "What is the capital of France?"}]

client = openai.OpenAI(base_url=os.environ["MANTA_HTTP"], api_key="none", max_retries=0)
asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
whole = client.chat.completions.create(**asked)
streamed, usage = "", None
for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
    streamed += chunk.choices[0].delta.content or "" if chunk.choices else ""
    usage = chunk.usage or usage
logprobs = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0].logprobs.content
prompt = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"type": "string", "enum": ["C", "F"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}
tools = {**asked, "max_tokens": 64, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
(call,) = client.chat.completions.create(**tools).choices[0].message.tool_calls
name, arguments = "", ""
for chunk in client.chat.completions.create(**tools, stream=True):
    for delta in chunk.choices[0].delta.tool_calls or ():
        name += delta.function.name or ""
        arguments += delta.function.arguments or ""
assert (name, arguments) == (call.function.name, call.function.arguments)
conversation = [
    *MESSAGES,
    {"role": "assistant", "tool_calls": [call.model_dump()]},
    {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
]
after = client.chat.completions.create(**{**tools, "messages": conversation, "tool_choice": "none", "max_tokens": 8})
tool = {"type": "function", **WEATHER["function"]}
asked_with_tool = {
    "model": MODEL,
    "temperature": 0,
    "max_output_tokens": 64,
    "tools": [tool],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}
response = client.responses.create(input=MESSAGES, **asked_with_tool)
(item,) = response.output
assert (item.name, item.arguments) == (call.function.name, call.function.arguments)
with client.responses.stream(input=MESSAGES, **asked_with_tool) as stream:
    assert stream.get_final_response().output[0].arguments == item.arguments
result = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
after_the_result = client.responses.create(
    input=[*MESSAGES, *response.output, result], **{**asked_with_tool, "tool_choice": "none", "max_output_tokens": 8}
)
assert after_the_result.output_text == after.choices[0].message.content
try:
    client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=3)
    refused = None
except openai.BadRequestError as error:
    refused = error.param
print(
    json.dumps(
        {
            "version": openai.__version__,
            "text": whole.choices[0].message.content,
            "response": client.responses.create(model=MODEL, input=MESSAGES, temperature=0, max_output_tokens=16).output_text,
            "streamed": streamed,
            "usage": [whole.usage.total_tokens, usage.total_tokens],
            "logprobs": [len(logprobs), len(logprobs[0].top_logprobs)],
            "completion": prompt.choices[0].text,
            "models": [model.id for model in client.models.list()],
            "refused": refused,
            "called": [name, sorted(json.loads(arguments))],
            "after the result": bool(after.choices[0].message.content),
        }
    )
)
