"""litellm as a library: completion and stream by its OpenAI-compatible provider, and its typed error."""

import json
import os

import litellm

asked = {
    "model": f"openai/{os.environ['MANTA_MODEL']}",
    "api_base": os.environ["MANTA_HTTP"],
    "api_key": "none",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_tokens": 16,
}
answer = litellm.completion(**asked)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True) if chunk.choices)
try:
    litellm.completion(**asked | {"temperature": 3}, num_retries=0)
    refused = None
except litellm.BadRequestError as error:
    refused = type(error).__name__
print(json.dumps({"text": answer.choices[0].message.content, "streamed": streamed, "usage": answer.usage.total_tokens, "refused": refused}))
