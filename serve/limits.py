"""Place 2 of a request: the limits of what a client may ask for. All of them are here."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Checked by the fronts (sizes on the wire) and by `serve.validation` (values).

    The number of open connections and HTTP/2 streams is not limited here: Ray Serve's proxy holds the sockets.
    """

    header_bytes: int = 16 * 1024
    """All headers of a request together."""
    headers: int = 100
    body_bytes: int = 4 * 1024 * 1024
    """HTTP body or gRPC message."""
    json_depth: int = 64
    messages: int = 2_048
    embedding_inputs: int = 2_048
    """Texts in one request for embeddings (OpenAI's own limit)."""
    prompts: int = 128
    """Prompts in one completion request."""
    choices: int = 8
    """``n`` of one prompt."""
    total_choices: int = 128
    """``n`` times the number of prompts."""
    detokenize_tokens: int = 262_144
    """Ids in one request for their text: as many as the longest context of these models."""
    stop_strings: int = 4
    stop_string_bytes: int = 256
    stop_token_ids: int = 64
    logit_bias_entries: int = 1_024
    logit_bias: float = 100.0
    """Greatest absolute value of one bias."""
    top_logprobs: int = 20
    prompt_logprobs: int = 262_144
    """Log-probabilities of prompts in one request: tokens, times one and the alternatives asked for, of all its choices."""
    temperature: float = 2.0
    penalty: float = 2.0
    """Greatest absolute value of presence and frequency penalty."""
    repetition_penalty: float = 10.0
    least_repetition_penalty: float = 0.01
    """Logits are divided by it, and must stay numbers."""
    priority: int = 1_000
    """Greatest absolute value."""
    id_chars: int = 128
    """Length of request ids, ``user`` and salts; their characters are ``A-Z a-z 0-9 . _ : -``."""
    remembered_s: float = 60.0
    """How long a finished answer is kept for a client that sends its request again under the same idempotency key."""
    remembered_tokens: int = 256 * 1024
    """Of all answers kept, alternatives to tokens included, half a KiB of vectors counting as one; one answer may have a 32nd of it."""
    template_s: float = 2.0
    """Time a chat template may take."""
    template_chars: int = 8 * 1024 * 1024
    """Characters a chat template may write."""

    metadata: int = 16
    """Entries (OpenAI's own limit)."""
    include: int = 16
    """What an answer is to tell beside itself, by name."""

    schema_bytes: int = 64 * 1024
    """A JSON schema, a regular expression or a grammar."""
    schema_depth: int = 32
    """Levels of a JSON schema."""
    guided_choices: int = 1_024
    tools: int = 128
    tool_calls: int = 128
    """Of one message."""
    tools_chars: int = 256 * 1024
    """Names, descriptions and schemas of all tools together."""
    grammar_compile_s: float = 1.5
    """Seconds of a CPU that compiling a client's grammar may take, in a process that is ended after it."""
    grammar_memory_bytes: int = 512 * 1024 * 1024
    """Memory that it may take, beyond the vocabulary."""
    grammar_cache_bytes: int = 16 * 1024 * 1024
    """Verdicts on grammars that a front keeps."""

    @property
    def entries(self) -> Mapping[str, int]:
        """The most entries of lists and maps in a request, by their names in HTTP or gRPC. Both check them before they read an
        entry, because a body of four megabytes can hold millions."""
        return {
            "messages": self.messages,
            "tools": self.tools,
            "prompts": self.prompts,
            "inputs": self.embedding_inputs,
            "so_far": self.total_choices,
            "logit_bias": self.logit_bias_entries,
            "stop": self.stop_strings,
            "stop_token_ids": self.stop_token_ids,
            "tokens": self.detokenize_tokens,
            "token_ids": self.detokenize_tokens,
            "guided_choice": self.guided_choices,
            "texts": self.guided_choices,
            "metadata": self.metadata,
            "include": self.include,
        }

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")

    def __str__(self) -> str:
        return ", ".join(f"{field.name}={getattr(self, field.name)}" for field in dataclasses.fields(self))


def is_identifier(text: str, limits: Limits) -> bool:
    return len(text) <= limits.id_chars and re.fullmatch(r"[A-Za-z0-9._:-]+", text) is not None
