"""`manta chat`: an answer in the terminal, over gRPC, as any other client would get it."""

import contextlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.commands.settings import exit_with_error

if TYPE_CHECKING:
    from manta_client import Client

HINT = "Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D leaves."


def chat(
    prompt: Annotated[str | None, typer.Argument(help="What to ask. Without it: a conversation, or what is piped in.")] = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", "-e", envvar="MANTA_ENDPOINT", help="grpc://host:port or grpcs://host:port.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Needed only where several are served.")] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system message.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 = always the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Length of an answer at most.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed, the same answer.")] = None,
) -> None:
    """Talk to a running server.

    \b
      manta chat "Why is the sky blue?"                  one answer
      manta chat                                         a conversation; /reset forgets it, Ctrl-D leaves
      git diff | manta chat --system "Review this."      what is piped in is the prompt
      manta chat --endpoint grpcs://models.example:443   another server; $MANTA_ENDPOINT says the same
    """
    from manta_client import Client, MantaError, Unavailable
    from manta_client.endpoint import DEFAULT

    options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip() or exit_with_error("nothing was piped in, and no prompt was given")
    try:
        with Client(endpoint) as client:
            conversation = Conversation(client=client, model=model, system=system, options=options)
            if prompt is None:
                converse(conversation)
            elif not conversation.ask(prompt):
                raise typer.Exit(130)
    except Unavailable as error:
        if error.reason is not None:  # told by a server
            exit_with_error(str(error))
        exit_with_error(
            f"no server answers at {endpoint or DEFAULT}; `manta serve demo` starts one, --endpoint names another ({_cause(error.message)})"
        )
    except MantaError as error:
        exit_with_error(str(error))


def _cause(message: str) -> str:
    """The end of gRPC's sentence, "...: ipv4:127.0.0.1:9000: Failed to connect to remote host: Connection refused"."""
    return message.rpartition(": ")[2] or message


@dataclass(kw_only=True)
class Conversation:
    """What was said so far, and whom to ask next."""

    client: "Client"
    model: str | None
    system: str | None
    options: dict[str, Any]
    said: list[dict[str, str]] = field(default_factory=list)

    def ask(self, prompt: str) -> bool:
        """Print the answer while it comes; false if the user stopped it. What was printed counts as said.

        Raises:
            MantaError: and then the question counts as not asked.
        """
        question = {"role": "user", "content": prompt}
        opening = [{"role": "system", "content": self.system}] if self.system else []
        whole = True
        with self.client.chat.stream(messages=[*opening, *self.said, question], model=self.model, **self.options) as stream:
            try:
                for delta in stream:
                    print(delta.text, end="", flush=True)
            except KeyboardInterrupt:
                stream.close()
                whole = False
            answer = stream.text
        print(flush=True)
        if answer:
            self.said += [question, {"role": "assistant", "content": answer}]
        return whole

    def reset(self) -> None:
        self.said.clear()


def converse(conversation: Conversation) -> None:
    """Questions from the terminal until Ctrl-D."""
    from manta_client import MantaError

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and editing)
    typer.echo(HINT)
    while True:
        try:
            question = input("\n> ").strip()
        except KeyboardInterrupt:
            continue  # throws the line away, as shells do
        except EOFError:
            return typer.echo()
        if question == "/reset":
            conversation.reset()
            typer.echo("Forgotten.")
        elif question:
            try:
                conversation.ask(question)
            except MantaError as error:
                typer.echo(f"manta: {error}", err=True)
