"""llama-index's OpenAILike: chat, streamed chat, completion."""

import json
import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model=os.environ["MANTA_MODEL"],
    api_base=os.environ["MANTA_HTTP"],
    api_key="none",
    is_chat_model=True,
    context_window=4096,
    temperature=0,
    max_tokens=16,
    max_retries=0,
)
messages = [ChatMessage(role="user", content="What is the capital of France?")]
text = llm.chat(messages).message.content
streamed = "".join(part.delta or "" for part in llm.stream_chat(messages))
raw = OpenAILike(
    model=os.environ["MANTA_MODEL"], api_base=os.environ["MANTA_HTTP"], api_key="none", is_chat_model=False, temperature=0, max_tokens=8
)
print(json.dumps({"text": text, "streamed": streamed, "completion": raw.complete("The capital of France is").text}))
