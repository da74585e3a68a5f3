"""`manta chat`: chat with a running server in the terminal, over gRPC and through the client library."""

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, overload

import typer

from serve.commands.settings import exit_with_error

if TYPE_CHECKING:
    from manta_client import CallFailed, Client, MantaError

HINT = "Ctrl-C stops an answer, /reset starts a new conversation, Ctrl-D or /exit exits."
CHECK_S = 10.0
"""How long the server may take to say which models it has, before anybody types a question."""
EXITS = ("/exit", "/quit", "/bye")
"""`HINT` names the first; the others are what similar programs call it."""


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="The question. Without it: an interactive conversation, or standard input if it is piped.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", "-e", envvar="MANTA_ENDPOINT", help="grpc://host:port or grpcs://host:port.")
    ] = None,
    api_key: Annotated[str | None, typer.Option("--api-key", help="API key; by default $MANTA_API_KEY.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model name; needed only if several are served.")] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Sampling temperature; 0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Maximum length of an answer.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Sampling seed; the same seed gives the same answer.")] = None,
) -> None:
    """Chat with a running server.

    \b
      manta chat "Why is the sky blue?"               one answer
      manta chat                                      a conversation
      git diff | manta chat --system "Review this."   standard input is the prompt
      manta chat --endpoint grpcs://example.org:443   another server
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # a failed handshake is reported below, not by the library
    from manta_client import Client, MantaError
    from manta_client.endpoint import DEFAULT

    options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    place = endpoint or DEFAULT
    notice = LossNotice(place, sends_key=bool(api_key or os.environ.get("MANTA_API_KEY")))
    try:
        with Client(endpoint, api_key=api_key, on_retry=notice) as client:
            if prompt is None:
                check_server(client, model)
                if not sys.stdin.isatty():
                    piped_in = sys.stdin.buffer.read().decode(errors="replace").strip()
                    prompt = piped_in or exit_with_error("nothing was piped in, and no prompt was given")
            conversation = Conversation(client=client, model=model, system=as_text(system), options=options, notice=notice)
            if prompt is None:
                converse(conversation)
            elif not conversation.ask(as_text(prompt)):
                raise typer.Exit(130)
    except MantaError as error:
        exit_with_error(notice.explain(error))


def check_server(client: "Client", model: str | None) -> None:
    """Find out whether there is a server that takes the key and has the model, at the cost of one short call.

    A prompt that is given as an argument needs no check: it is sent at once.

    Raises:
        MantaError: there is none.
    """
    if model is None:
        client.models.only(timeout=CHECK_S)  # the client remembers it for the questions
    else:
        client.models.get(model, timeout=CHECK_S)


class LossNotice:
    """Says that the server was lost, once in an answer, while the client library still tries to have the rest of it."""

    PATIENCE = 2
    """Failed attempts in a row before anything is said. The first is made within half a second, and is enough for a lost front."""

    def __init__(self, place: str, *, sends_key: bool = False) -> None:
        """``place``: the endpoint. ``sends_key``: whether the client sends an API key."""
        self._place = place
        self._sends_key = sends_key
        self.begun = False
        """Whether the latest answer has begun."""
        self._said = False

    def reset(self) -> None:
        """A question is asked."""
        self.begun = self._said = False

    def __call__(self, failure: "CallFailed", num_failed: int) -> None:
        """See `manta_client.retry.RetryPolicy.on_retry`."""
        if self.begun and not self._said and num_failed >= self.PATIENCE:
            self._said = True
            print(flush=True)
            lost = f"the connection to the server at {self._place} was lost ({_cause(failure.message)})"
            typer.echo(f"manta: {lost}; trying for some seconds to have the rest. Ctrl-C gives up.", err=True)

    def explain(self, error: "MantaError") -> str:
        """What the user is told when a question, or `check_server`, fails."""
        from manta_client import AuthenticationFailed, DeadlineExceeded, ModelNotChosen, Unavailable

        if isinstance(error, ModelNotChosen):
            return str(error).replace("model=...", "--model")
        if isinstance(error, DeadlineExceeded) and error.reason is None and not self.begun:
            return f"the server at {self._place} does not answer; --endpoint names another"
        if isinstance(error, AuthenticationFailed):  # the server's own message names the header, which nobody types here
            return f"the server at {self._place} needs {'another' if self._sends_key else 'an'} API key: --api-key, or MANTA_API_KEY"
        if not isinstance(error, Unavailable) or error.reason is not None:  # a server answered
            return str(error)
        cause = _cause(error.message)
        if self.begun:
            return f"the server at {self._place} was lost and did not come back; the answer is not whole ({cause})"
        return f"no server answers at {self._place}; `manta serve demo` starts one, --endpoint names another ({cause})"


def _cause(message: str) -> str:
    """The last part of gRPC's message, "...: ipv4:127.0.0.1:9000: Failed to connect to remote host: Connection refused"."""
    if "handshake failed" in message:
        return "no TLS there, or a certificate that is not trusted; without TLS say grpc://"
    if "http1.x server" in message:
        return "that is an HTTP port; gRPC has one of its own, 9000 by default"
    return message.rpartition(": ")[2].removesuffix("]") or message


@overload
def as_text(typed: str) -> str: ...


@overload
def as_text(typed: None) -> None: ...


def as_text(typed: str | None) -> str | None:
    """User input without surrogates: bytes that are not UTF-8, which Python decodes as surrogates, become U+FFFD."""
    return None if typed is None else typed.encode(errors="surrogateescape").decode(errors="replace")


@dataclass(kw_only=True)
class Conversation:
    """The messages so far, and the client and options for the next question."""

    client: "Client"
    model: str | None
    system: str | None
    options: dict[str, Any]
    notice: LossNotice
    history: list[dict[str, str]] = field(default_factory=list)

    def ask(self, prompt: str) -> bool:
        """Print the answer as it streams. Returns False if the user stopped it; the part that was printed joins the conversation.

        Raises:
            MantaError: the request failed; the question then does not join the conversation.
        """
        question = {"role": "user", "content": prompt}
        opening = [{"role": "system", "content": self.system}] if self.system else []
        whole = True
        self.notice.reset()
        with self.client.chat.stream(messages=[*opening, *self.history, question], model=self.model, **self.options) as stream:
            try:
                for delta in stream:
                    print(delta.text, end="", flush=True)
                    self.notice.begun = self.notice.begun or bool(delta.text)
            except KeyboardInterrupt:
                stream.close()
                whole = False
            except BaseException:
                if self.notice.begun:
                    print(flush=True)  # the error message gets a line of its own
                raise
            answer = stream.text
        print(flush=True)
        if answer:
            self.history += [question, {"role": "assistant", "content": answer}]
        return whole

    def reset(self) -> None:
        self.history.clear()


def converse(conversation: Conversation) -> None:
    """Read questions from the terminal until Ctrl-D or one of `EXITS`.

    A question that fails stands in the next line, to be edited or asked again.
    """
    from manta_client import MantaError

    typer.echo(HINT)
    draft = ""
    while True:
        try:
            question = as_text(read_line("\n> ", draft).strip())
        except KeyboardInterrupt:
            draft = ""
            continue  # discard the line, as shells do
        except EOFError:
            return typer.echo()
        draft = ""
        if question in EXITS:
            return None
        if question == "/reset":
            conversation.reset()
            typer.echo("Forgotten.")
        elif question in ("/help", "/?"):
            typer.echo(HINT)
        elif question:
            try:
                conversation.ask(question)
            except MantaError as error:
                typer.echo(f"manta: {conversation.notice.explain(error)}", err=True)
                draft = question


def read_line(prompt: str, draft: str) -> str:
    """A line from the terminal, which begins with ``draft`` where lines can be edited.

    Raises:
        EOFError, KeyboardInterrupt: as of `input`.
    """
    try:
        import readline  # also gives `input` a history
    except ImportError:
        return input(prompt)

    def insert_draft() -> None:
        readline.insert_text(draft)
        readline.redisplay()

    readline.set_pre_input_hook(insert_draft if draft else None)
    try:
        return input(prompt)
    finally:
        readline.set_pre_input_hook(None)
