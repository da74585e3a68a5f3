"""Step 3 of a request: its prompts become tokens, and its options sampling parameters."""

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.request import SamplingParams
from serve.errors import InvalidRequest, NotSupported
from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request import ChatRequest, CompletionRequest, Message
from serve.request_timing import Stopwatch
from serve.structured.compiler import Compiles
from serve.structured.grammar_source import Draft, compiled, draft_of
from serve.text.chat_template import ChatTemplate
from serve.text.sandbox import TemplateRefused
from serve.text.threads import beside_the_loop
from serve.text.tokenizer import Tokenizer
from serve.token_source import may_fit
from serve.tools.protocol import ProtocolName, plainly_rendered
from serve.tools.request_tools import Toolbox, protocol_of
from serve.validation import COMPLETION_MAX_TOKENS, Validator

CHARS_PER_MESSAGE = 32
"""A message takes about as long as so many more characters, however short it is."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request whose prompts are tokens."""

    request: ChatRequest | CompletionRequest
    prompts: Sequence[tuple[int, ...]]
    echoes: Sequence[str]
    """What comes before the answer to each prompt."""
    sampling: Sequence[SamplingParams]
    stopwatch: Stopwatch
    toolbox: Toolbox | None = None


class Prompts:
    """Of requests to one model."""

    def __init__(
        self,
        model: ModelFacts,
        tokenizer: Tokenizer,
        validator: Validator,
        *,
        limits: Limits,
        compilers: Compiles,
        tool_protocol: ProtocolName,
        must_find_room: Callable[[ChatRequest | CompletionRequest], None],
    ) -> None:
        """``must_find_room`` raises where a request is refused just now.

        Raises:
            InvalidTokenizer: the model's chat template is damaged.
        """
        self._model, self._tokenizer, self._validator = model, tokenizer, validator
        self._limits, self._compilers, self._must_find_room = limits, compilers, must_find_room
        self._template = ChatTemplate.from_folder(model.folder, tokenizer, seconds=limits.template_s, chars=limits.template_chars)
        self.tool_protocol = protocol_of(tool_protocol, tokenizer, self._template.source if self._template else None)

    async def of_chat(self, request: ChatRequest, stopwatch: Stopwatch) -> Asked:
        """
        Raises:
            ServeError, EngineError: it cannot be answered; nothing was asked of the engine.
        """
        self._validator.chat(request)
        self._must_find_room(request)
        toolbox = Toolbox.of(request, self.tool_protocol, self._limits)
        ids = await self.of_messages(request.messages, toolbox)
        sampling = self._resolve(request, len(ids), param="messages", max_tokens=None)
        sampling = await self._guided(sampling, toolbox.draft if toolbox else self._draft(request))
        return Asked(request=request, prompts=[ids], echoes=[""], sampling=[sampling], stopwatch=stopwatch, toolbox=toolbox)

    async def of_completion(self, request: CompletionRequest, stopwatch: Stopwatch) -> Asked:
        """Raises as `of_chat`."""
        self._validator.completion(request)
        self._must_find_room(request)
        prompts = [await self._prompt_ids(prompt) for prompt in request.prompts]
        sampling = [self._resolve(request, len(ids), param="prompt", max_tokens=COMPLETION_MAX_TOKENS) for ids in prompts]
        top = self._validator.prompt_logprobs(request, sum(map(len, prompts)))
        sampling = [dataclasses.replace(one, prompt_logprobs=top) for one in sampling]
        draft = self._draft(request)
        return Asked(
            request=request,
            prompts=prompts,
            echoes=[self._echo(prompt) if request.echo else "" for prompt in request.prompts],
            sampling=[await self._guided(one, draft) for one in sampling],
            stopwatch=stopwatch,
        )

    async def of_messages(self, conversation: Sequence[Message], toolbox: Toolbox | None) -> tuple[int, ...]:
        """The ids of a conversation, and of the tools that it may use.

        Raises:
            ServeError: there is no template, or it does not take them; or they are too long.
        """
        template = self._template
        if template is None:
            raise NotSupported("this model has no chat template (it is a base model); use completions instead", param="messages")
        rendered = toolbox.rendered if toolbox else plainly_rendered(conversation)
        messages, prefix = rendered.messages, rendered.prefix
        may_fit((prefix, *(message["content"] for message in messages)), self._tokenizer, self._model, param="messages")
        num_chars = len(prefix) + sum(CHARS_PER_MESSAGE + len(message["content"]) for message in messages)
        try:
            return tuple(await beside_the_loop(num_chars, lambda: template.encode(messages, prefix)))
        except TemplateRefused as refusal:
            raise InvalidRequest(str(refusal), param="messages") from refusal

    def _draft(self, request: ChatRequest | CompletionRequest) -> Draft | None:
        wanted = request.options.format
        return None if wanted is None else draft_of(wanted, self._limits)

    async def _guided(self, sampling: SamplingParams, draft: Draft | None) -> SamplingParams:
        return sampling if draft is None else dataclasses.replace(sampling, grammar=await compiled(draft, self._compilers))

    async def _prompt_ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        may_fit([prompt], self._tokenizer, self._model, param="prompt")
        return await beside_the_loop(len(prompt), lambda: self._tokenizer.encode(prompt))

    def _echo(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _resolve(self, request: ChatRequest | CompletionRequest, num_tokens: int, *, param: str, max_tokens: int | None) -> SamplingParams:
        seed = secrets.randbits(63)
        return self._validator.sampling(request.options, num_prompt_tokens=num_tokens, param=param, max_tokens=max_tokens, seed=seed)
