"""Place 3 of a request: validates it, turns its prompts into tokens and its options into sampling parameters."""

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
from serve.structured.compiler import GrammarCompiler
from serve.structured.grammar_source import GrammarSource, compile_grammar, grammar_source_of
from serve.text.chat_template import ChatTemplate
from serve.text.sandbox import TemplateRefused
from serve.text.threads import run_in_thread_if_long
from serve.text.tokenizer import Tokenizer
from serve.token_source import check_could_fit
from serve.tools.protocol import ProtocolName, render_without_tools
from serve.tools.request_tools import RequestTools, choose_protocol
from serve.validation import COMPLETION_MAX_TOKENS, Validator

CHARS_PER_MESSAGE = 32
"""Rendering a message costs about as much time as this many more characters, however short it is."""


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A valid request with what the engine needs. `prompts`, `echoes` and `sampling` have one entry per prompt."""

    request: ChatRequest | CompletionRequest
    prompts: Sequence[tuple[int, ...]]
    """Token ids."""
    echoes: Sequence[str]
    """Text that the answer begins with."""
    sampling: Sequence[SamplingParams]
    stopwatch: Stopwatch
    tools: RequestTools | None = None


class RequestPreparer:
    """Prepares requests to one model."""

    def __init__(
        self,
        model: ModelFacts,
        tokenizer: Tokenizer,
        validator: Validator,
        *,
        limits: Limits,
        compiler: GrammarCompiler,
        tool_protocol: ProtocolName,
        check_admission: Callable[[ChatRequest | CompletionRequest], None],
    ) -> None:
        """``check_admission`` raises if the request is refused at the moment; it runs before anything that costs time.

        Raises:
            InvalidTokenizer: the model's chat template is damaged.
        """
        self._model, self._tokenizer, self._validator = model, tokenizer, validator
        self._limits, self._compiler, self._check_admission = limits, compiler, check_admission
        self._template = ChatTemplate.from_folder(model.folder, tokenizer, seconds=limits.template_s, chars=limits.template_chars)
        self.tool_protocol = choose_protocol(tool_protocol, tokenizer, self._template.source if self._template else None)

    async def prepare_chat(self, request: ChatRequest, stopwatch: Stopwatch) -> PreparedRequest:
        """Validate a chat request, render and tokenize its messages, and compile its grammar.

        Raises:
            ServeError, EngineError: it cannot be answered. The engine has not seen it.
        """
        self._validator.chat(request)
        self._check_admission(request)
        tools = RequestTools.of(request, self.tool_protocol, self._limits)
        ids = await self.encode_messages(request.messages, tools)
        sampling = self._resolve(request, len(ids), param="messages", max_tokens=None)
        sampling = await self._with_grammar(sampling, tools.grammar_source if tools else self._grammar_source(request))
        return PreparedRequest(request=request, prompts=[ids], echoes=[""], sampling=[sampling], stopwatch=stopwatch, tools=tools)

    async def prepare_completion(self, request: CompletionRequest, stopwatch: Stopwatch) -> PreparedRequest:
        """Raises as `prepare_chat`."""
        self._validator.completion(request)
        self._check_admission(request)
        prompts = [await self._prompt_ids(prompt) for prompt in request.prompts]
        sampling = [self._resolve(request, len(ids), param="prompt", max_tokens=COMPLETION_MAX_TOKENS) for ids in prompts]
        top = self._validator.prompt_logprobs(request, sum(map(len, prompts)))
        sampling = [dataclasses.replace(one, prompt_logprobs=top) for one in sampling]
        source = self._grammar_source(request)
        return PreparedRequest(
            request=request,
            prompts=prompts,
            echoes=[self._echo(prompt) if request.echo else "" for prompt in request.prompts],
            sampling=[await self._with_grammar(one, source) for one in sampling],
            stopwatch=stopwatch,
        )

    async def encode_messages(self, conversation: Sequence[Message], tools: RequestTools | None) -> tuple[int, ...]:
        """The token ids of a conversation and of the tools that it may use.

        Raises:
            ServeError: there is no chat template, or it does not accept the messages, or they are too long.
        """
        template = self._template
        if template is None:
            raise NotSupported("this model has no chat template (it is a base model); use completions instead", param="messages")
        rendered = tools.rendered if tools else render_without_tools(conversation)
        messages, prefix = rendered.messages, rendered.prefix
        check_could_fit((prefix, *(message["content"] for message in messages)), self._tokenizer, self._model, param="messages")
        num_chars = len(prefix) + sum(CHARS_PER_MESSAGE + len(message["content"]) for message in messages)
        try:
            return tuple(await run_in_thread_if_long(num_chars, lambda: template.encode(messages, prefix)))
        except TemplateRefused as refusal:
            raise InvalidRequest(str(refusal), param="messages") from refusal

    def _grammar_source(self, request: ChatRequest | CompletionRequest) -> GrammarSource | None:
        wanted = request.options.format
        return None if wanted is None else grammar_source_of(wanted, self._limits)

    async def _with_grammar(self, sampling: SamplingParams, source: GrammarSource | None) -> SamplingParams:
        return sampling if source is None else dataclasses.replace(sampling, grammar=await compile_grammar(source, self._compiler))

    async def _prompt_ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        check_could_fit([prompt], self._tokenizer, self._model, param="prompt")
        return await run_in_thread_if_long(len(prompt), lambda: self._tokenizer.encode(prompt))

    def _echo(self, prompt: str | tuple[int, ...]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _resolve(self, request: ChatRequest | CompletionRequest, num_tokens: int, *, param: str, max_tokens: int | None) -> SamplingParams:
        seed = secrets.randbits(63)
        return self._validator.sampling(request.options, num_prompt_tokens=num_tokens, param=param, max_tokens=max_tokens, seed=seed)
