"""langchain-openai: invoke, stream, and a chain with a prompt."""

import json
import os

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

chat = ChatOpenAI(model=os.environ["MANTA_MODEL"], base_url=os.environ["MANTA_HTTP"], api_key="none", temperature=0, max_tokens=16)
answer = chat.invoke("What is the capital of France?")
chain = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")]) | chat
streamed = "".join(str(chunk.content) for chunk in chain.stream({"country": "France"}))
print(json.dumps({"text": answer.content, "streamed": streamed, "usage": answer.usage_metadata["total_tokens"]}))
