"""The command `manta`, as a person calls it."""

import contextlib
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import manta_client
import pytest
import yaml
from grpc import StatusCode
from manta_client.endpoint import Endpoint
from manta_client.testing import FakeServer
from typer.testing import CliRunner, Result

from serve.cli import app
from serve.commands.chat import HINT, Conversation, LossNotice, _cause, converse
from serve.commands.flag_hints import HINTS
from serve.commands.flags import APP, SERVER
from serve.commands.serve import greeting
from serve.config import AuthSettings, GrpcSettings, HttpSettings, ParallelSettings, ServeConfig
from serve.config_sources import known_settings

COMMANDS = ("serve", "chat", "config", "demo-model")
ROOT = Path(__file__).parents[2]


def manta(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, arguments, **options)


def test_help_names_every_command_and_shows_how_to_begin() -> None:
    told = manta("--help").output
    assert all(command in told for command in COMMANDS)
    assert "manta serve demo --tensor-parallel 2" in told
    assert 'manta chat "Why is the sky blue?"' in told


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_teaches_by_examples(command: str) -> None:
    told = manta(command, "--help").output
    examples = [line for line in told.splitlines() if line.startswith("    manta ") or f"| manta {command}" in line]
    assert len(examples) >= 2


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from serve.cli import app; "
        "assert CliRunner().invoke(app, ['serve', '--help']).exit_code == 0; "
        "print([name for name in ('torch', 'ray', 'fastapi', 'grpc', 'tokenizers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "serve", "--version"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("manta ")


def test_config_prints_what_is_set_and_where() -> None:
    told = manta("config", "--set", "http.port=8123", env={"MANTA_GRPC__PORT": "9123"}).output
    assert (yaml.safe_load(told)["http"]["port"], yaml.safe_load(told)["grpc"]["port"]) == (8123, 9123)
    assert "# from MANTA_GRPC__PORT" in told


def test_config_explains_one_setting() -> None:
    told = manta("config", "--explain", "parallel.tensor").output
    assert "ranks that split attention heads" in told


def test_config_prints_a_schema() -> None:
    assert yaml.safe_load(manta("config", "--schema").output)["additionalProperties"] is False


@pytest.mark.parametrize("command", ["config", "serve"])
def test_wrong_settings_end_with_one_line_each_before_anything_starts(command: str, tmp_path: Path) -> None:
    file = tmp_path / "manta.yaml"
    file.write_text("http: {prot: 1}\nengine: {block_tokens: 0}\n")
    done = manta(command, "-c", str(file))
    assert done.exit_code == 2
    assert "manta: unknown setting http.prot (manta.yaml:1); did you mean http.port?" in done.output
    assert "block_tokens must be at least 1" in done.output
    assert "Traceback" not in done.output


def test_serve_names_the_flag_that_is_wrong() -> None:
    done = manta("serve", "demo", "--http-port", "99999", "--dtype", "float8")
    assert done.exit_code == 2
    assert "got 99999 (--http-port)" in done.output
    assert "got 'float8' (--dtype)" in done.output


def test_serve_of_a_model_that_is_nowhere_says_what_would_do() -> None:
    done = manta("serve", "/nowhere/at/all")
    assert done.exit_code == 1
    assert "manta: there is no folder '/nowhere/at/all'" in done.output


def test_the_greeting_has_lines_that_can_be_pasted(tmp_path: Path) -> None:
    config = ServeConfig(http=HttpSettings(host="0.0.0.0", port=8001), grpc=GrpcSettings(port=9001), parallel=ParallelSettings(tensor=2))
    told = greeting(config, ["it's"], program=".venv/bin/manta")
    assert "1 replica of 2 ranks (tp 2)" in told
    assert "Manta serves one: one rank\n" in greeting(ServeConfig(), ["one"], program="manta")
    assert '.venv/bin/manta chat --endpoint grpc://127.0.0.1:9001 "Why is the sky blue?"' in told
    (curl,) = (line for line in told.splitlines() if line.startswith("  curl"))
    shown = subprocess.run(["bash", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; {curl}"], capture_output=True, text=True, check=True)
    assert '{"model": "it\'s", "messages"' in shown.stdout
    assert "http://127.0.0.1:8001/v1/chat/completions" in shown.stdout
    (python,) = (line for line in told.splitlines() if "manta_client" in line)
    script = subprocess.run(
        ["bash", "-c", f"shown() {{ printf '%s' \"$3\"; }}; shown {python}"], capture_output=True, text=True, check=True
    )
    compile(script.stdout, "pasted", "exec")
    assert 'Client("grpc://127.0.0.1:9001")' in script.stdout


def test_the_greeting_of_a_server_with_keys_says_where_the_commands_get_theirs() -> None:
    told = greeting(ServeConfig(auth=AuthSettings(keys_file="my keys.json")), ["one"], program="manta")
    assert "with MANTA_API_KEY set to a key (`manta keys create --file 'my keys.json'` makes one):" in told
    (curl,) = (line for line in told.splitlines() if line.startswith("  curl"))
    pasted = f"export MANTA_API_KEY=manta-1; curl() {{ printf '%s\\n' \"$@\"; }}; {curl}"
    shown = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, check=True)
    assert "authorization: Bearer manta-1" in shown.stdout.splitlines()
    assert "KEY" not in greeting(ServeConfig(), ["one"], program="manta")


class ScriptedStream:
    """An answer of three deltas; at "stop me" the user presses Ctrl-C after the first."""

    def __init__(self, messages: list[dict[str, str]]) -> None:
        self.messages, self.text, self.closed = messages, "", False

    def __enter__(self) -> "ScriptedStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True

    def __iter__(self) -> Iterator[Any]:
        for word in ("You said ", self.messages[-1]["content"], "."):
            self.text += word
            yield SimpleNamespace(text=word)
            if self.messages[-1]["content"] == "stop me":
                raise KeyboardInterrupt
            if self.messages[-1]["content"] == "break":
                raise manta_client.StreamBroken("the stream ended early")
            if self.messages[-1]["content"] == "lose":
                raise manta_client.Unavailable("ipv4:127.0.0.1:9000: Connection refused", code=StatusCode.UNAVAILABLE)


class ScriptedClient:
    def __init__(self, endpoint: str | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self.chat = SimpleNamespace(stream=self._stream)
        self.models = SimpleNamespace(only=lambda timeout: "demo")

    def _stream(self, **asked: Any) -> ScriptedStream:
        self.asked.append(asked)
        return ScriptedStream(asked["messages"])

    def __enter__(self) -> "ScriptedClient":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> ScriptedClient:
    client = ScriptedClient()
    monkeypatch.setattr(manta_client, "Client", lambda _endpoint, api_key, on_retry: client)
    return client


@pytest.fixture
def conversation(client: ScriptedClient) -> Conversation:
    return Conversation(client=client, model=None, system="Be brief.", options={}, notice=LossNotice("grpc://here:1"))  # type: ignore[arg-type]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What the user types; after it, Ctrl-D."""
    waiting = iter((*lines, EOFError))

    def read(_prompt: str) -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_chat_prints_one_answer(client: ScriptedClient) -> None:
    done = manta("chat", "Hi", "--system", "Be brief.", "--seed", "3", "--temperature", "0")
    assert (done.exit_code, done.output) == (0, "You said Hi.\n")
    assert client.asked[0]["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (client.asked[0]["seed"], client.asked[0]["temperature"]) == (3, 0)


def test_chat_takes_what_is_piped_in(client: ScriptedClient) -> None:
    assert manta("chat", input="from a pipe\n").output == "You said from a pipe.\n"
    assert manta("chat", input="").exit_code == 1


def test_chat_takes_what_is_no_utf8_as_well(client: ScriptedClient) -> None:
    assert manta("chat", input=b"caf\xe9 \xff\n").output == "You said caf\ufffd \ufffd.\n"
    assert manta("chat", "caf\udce9").output == "You said caf\ufffd.\n"


def test_a_server_that_is_lost_in_an_answer_is_told_on_a_line_of_its_own(client: ScriptedClient) -> None:
    done = manta("chat", "lose")
    assert done.exit_code == 1
    assert done.output.splitlines()[0] == "You said "
    assert "was lost and did not come back; the answer is not whole (Connection refused)" in done.output.splitlines()[1]


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("last error: UNKNOWN: ipv4:127.0.0.1:9777: Tls handshake failed (TSI): SSL_ERROR_SSL: error: OK", "no TLS there"),
        ("Failed parsing HTTP/2 (...) (Trying to connect an http1.x server (HTTP status 400))", "that is an HTTP port"),
        ("errors resolving x:1: [field:hostname lookup error:failed for x:1: Domain name not found]", "Domain name not found"),
        ("last error: ipv4:127.0.0.1:9000: Failed to connect to remote host: Connection refused", "Connection refused"),
    ],
)
def test_why_no_server_answers_is_told_in_few_words(message: str, cause: str) -> None:
    assert _cause(message).startswith(cause)
    assert not _cause(message).endswith("]")


def test_chat_sends_its_key_and_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANTA_API_KEY", raising=False)
    with FakeServer(api_key="manta-right") as server:
        server.say("Welcome.", "Welcome.")
        ask = ("chat", "Hi", "--endpoint", server.endpoint)
        needs = f"manta: the server at {server.endpoint} needs {{}} API key: --api-key, or MANTA_API_KEY\n"
        assert (done := manta(*ask)).exit_code == 1
        assert done.output == needs.format("an")
        assert manta(*ask, "--api-key", "manta-wrong").output == needs.format("another")
        assert manta(*ask, "--api-key", "manta-right").output == "Welcome.\n"
        monkeypatch.setenv("MANTA_API_KEY", "manta-right")
        assert manta(*ask).output == "Welcome.\n"


def test_chat_without_a_server_says_so_without_a_traceback() -> None:
    done = manta("chat", "Hi", "--endpoint", "grpc://127.0.0.1:9")
    assert done.exit_code == 1
    assert "manta serve demo" in done.output
    assert "Traceback" not in done.output


def in_terminal(*command: str, last: bytes, typed: bytes = b"") -> tuple[str, int]:
    """What a command shows in a terminal of its own where ``typed`` is typed once ``last`` is shown, and its exit status."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, *command], {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8"})
    shown = b""
    with contextlib.suppress(OSError):  # the terminal has gone
        while last not in shown:
            shown += os.read(terminal, 1000)
        os.write(terminal, typed)
        while True:
            shown += os.read(terminal, 1000)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return shown.decode(), os.waitstatus_to_exitcode(status)


def test_a_conversation_does_not_begin_without_a_server() -> None:
    shown, status = in_terminal("-m", "serve", "chat", "--endpoint", "grpc://127.0.0.1:9", last=b"no server answers")
    assert status == 1
    assert "no server answers at grpc://127.0.0.1:9; `manta serve demo` starts one, --endpoint names another" in " ".join(shown.split())
    assert HINT not in shown


def test_a_conversation_begins_where_a_server_answers() -> None:
    with FakeServer() as server:
        shown, status = in_terminal("-m", "serve", "chat", "--endpoint", server.endpoint, last=b"> ", typed=b"/exit\n")
    assert (status, HINT in shown) == (0, True)
    assert server.requests == []


def test_what_is_piped_in_is_not_awaited_without_a_server() -> None:
    command = [sys.executable, "-m", "serve", "chat", "--endpoint", "grpc://127.0.0.1:9"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert "no server answers" in process.stderr.readline()
        assert process.wait(60) == 1  # its standard input is still open


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "name a model (--model): this server has one, two"),
        (("--model", "three"), "there is no such model"),
        (("--api-key", "manta-wrong", "--model", "one"), "needs another API key: --api-key, or MANTA_API_KEY"),
    ],
)
def test_a_key_or_model_that_the_server_does_not_take_is_told_before_anything_is_asked(arguments: tuple[str, ...], told: str) -> None:
    with FakeServer(models=["one", "two"], api_key="manta-right") as server:
        done = manta("chat", "--endpoint", server.endpoint, "--api-key", "manta-right", *arguments)  # the last of two keys is taken
    assert done.exit_code == 1
    assert told in done.output
    assert server.requests == []


def test_a_server_that_takes_the_connection_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.commands.chat.CHECK_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = manta("chat", "--endpoint", f"grpc://127.0.0.1:{silent.getsockname()[1]}")
    assert done.exit_code == 1
    assert "does not answer; --endpoint names another" in done.output


def test_the_endpoint_in_the_help_of_chat_is_one() -> None:
    (example,) = re.findall(r"--endpoint (\w+://\S+)", manta("chat", "--help").stdout)
    assert Endpoint.parse(example).secure


def test_chat_refuses_what_is_no_endpoint() -> None:
    done = manta("chat", "Hi", "--endpoint", "http://127.0.0.1:8000")
    assert done.exit_code == 1
    assert "grpc://host:port" in done.output


def test_a_conversation_remembers_what_was_said(conversation: Conversation, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "one", "", KeyboardInterrupt, "two")
    converse(conversation)
    assert [message["content"] for message in client.asked[1]["messages"]] == ["Be brief.", "one", "You said one.", "two"]


def test_reset_forgets_the_conversation(conversation: Conversation, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "one", "/reset", "two")
    converse(conversation)
    assert [message["content"] for message in client.asked[1]["messages"]] == ["Be brief.", "two"]


def test_a_stopped_answer_ends_alone_and_is_remembered_as_far_as_it_came(
    conversation: Conversation, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "stop me", "go on")
    converse(conversation)
    assert [message["content"] for message in client.asked[1]["messages"]] == ["Be brief.", "stop me", "You said ", "go on"]


def test_a_failed_answer_is_told_and_not_remembered(
    conversation: Conversation, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "break", "again")
    converse(conversation)
    assert "manta: the stream ended early" in capsys.readouterr().err
    assert [message["content"] for message in client.asked[1]["messages"]] == ["Be brief.", "again"]


def test_a_question_whose_answer_is_lost_stands_in_the_next_line(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drafts, waiting = [], iter(["lose", "fine"])

    def read(_prompt: str, draft: str) -> str:
        drafts.append(draft)
        if (line := next(waiting, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("serve.commands.chat.read_line", read)
    converse(conversation)
    assert drafts == ["", "lose", ""]
    assert "the server at grpc://here:1 was lost" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye"])
def test_a_conversation_ends_by_a_word_and_help_is_not_sent_to_the_model(
    word: str, conversation: Conversation, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "/help", "/?", word, "never read")
    converse(conversation)
    assert client.asked == []
    assert capsys.readouterr().out == f"{HINT}\n" * 3


def test_a_line_begins_with_its_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal of its own."""
    script = "from serve.commands.chat import read_line; print('read:', read_line('> ', 'a dräft'))"
    shown, _ = in_terminal("-c", script, last="a dräft".encode(), typed=b", and more\n")
    assert "read: a dräft, and more" in shown


def test_a_lost_connection_is_told_while_the_rest_is_still_tried_for(capsys: pytest.CaptureFixture[str]) -> None:
    notice = LossNotice("grpc://here:1")
    refused = manta_client.Unavailable("ipv4:127.0.0.1:9000: Connection refused", code=StatusCode.UNAVAILABLE)
    for number in (1, 2, 3):
        notice(refused, number)
    assert capsys.readouterr().err == "", "the answer has not begun: it fails soon enough"
    notice.begun = True
    notice(refused, 1)
    assert capsys.readouterr().err == "", "only a front may have been lost"
    for number in (2, 3, 4):
        notice(refused, number)
    told = capsys.readouterr().err
    assert told.count("the connection to the server at grpc://here:1 was lost (Connection refused)") == 1
    assert "Ctrl-C gives up" in told


def test_ctrl_c_during_a_single_answer_ends_as_interrupted(client: ScriptedClient) -> None:
    assert manta("chat", "stop me").exit_code == 130


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MANTA_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("flag", "ours"),
    [
        ("--port=80", "--http-port"),
        ("--max-model-len", "--max-context-tokens"),
        ("--tp", "--tensor-parallel"),
        ("--tp-size", "--tensor-parallel"),
    ],
)
def test_a_flag_of_other_servers_is_answered_with_ours(flag: str, ours: str) -> None:
    done = manta("serve", "demo", flag, "2")
    assert done.exit_code == 2
    assert f"No such option: {flag.partition('=')[0]}; it is {ours}" in done.output


def test_every_flag_and_setting_that_other_names_are_answered_with_exists() -> None:
    shown = manta("serve", "--help").output
    for help in HINTS.values():
        for flag in re.findall(r"(?<!name )--[a-z-]+", help.replace("keys create --name", "")):
            assert flag in shown, help
        for setting in re.findall(r"--set ([a-z_]+\.[a-z_]+)=", help):
            assert setting in known_settings(), help


def options(command: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+", manta(command, "--help").output.partition("Options:")[2]))


def test_what_serve_has_a_flag_for_up_has_as_well() -> None:
    served, put_up = (options(command) for command in ("serve", "up"))
    assert {"--http-port", "--quantize", "--draft-model"} < served
    assert put_up - served == {"--app"}
    assert served - put_up == set()


def test_every_flag_of_the_table_is_about_a_setting() -> None:
    assert {flag.setting for flag in (*SERVER, APP)} <= set(known_settings())


def test_up_names_the_flag_that_is_wrong() -> None:
    done = manta("up", "demo", "--http-port", "99999", "--ray-address", "head:6379")
    assert done.exit_code == 2
    assert "got 99999 (--http-port)" in done.output


def test_help_is_a_command_too() -> None:
    assert manta("help").output == manta("--help").output
    assert manta("help", "plan").output == manta("plan", "--help").output


def test_a_section_is_explained_by_the_first_sentence_of_each_of_its_settings() -> None:
    lines = manta("config", "--explain", "http").output.splitlines()
    assert {line.split()[0] for line in lines} == {name for name in known_settings() if name.startswith("http.")}


def test_a_flag_that_nobody_has_is_answered_with_how_any_setting_is_said() -> None:
    done = manta("up", "demo", "--zzz", "2")
    assert "No such option: --zzz; settings without a flag are set by --set" in done.output
    assert "(Possible options: --replicas)" in manta("up", "demo", "--replica", "2").output


def test_a_full_disk_behind_the_output_is_told_in_a_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "serve", "config"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    assert (done.returncode, done.stderr) == (1, "manta: [Errno 28] No space left on device\n")


def test_sigterm_cleans_up_as_ctrl_c_does() -> None:
    program = """
import os, signal, time
from serve import cli

def app():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        print("cleaned up")

cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, "KeyboardInterrupt" in done.stderr) == ("cleaned up\n", True)
