"""What people read fits their terminal, and loses nothing by it."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console, RenderableType
from rich.text import Text
from typer.testing import CliRunner

from engine.config import EngineConfig
from serve.bench.report import Figure
from serve.bench.report import table_of as engine_table
from serve.bench.workload import WORKLOADS
from serve.cli import app
from serve.commands.batch import progress_of as batch_progress
from serve.commands.progress import progress_shown
from serve.config_docs import as_yaml, explain
from serve.config_sources import load
from serve.load.client import Answer
from serve.load.report import Objective, summarise
from serve.load.report import table_of as load_table
from serve.overview_table import tables
from serve.terminal import UNLIMITED, Column, ColumnTable, can_redraw, results, wrapped
from tests.serve.test_overview_table import READY, SEEN
from tests.serve.test_plan_command import manta

COLUMNS = (
    Column(heading="name", is_text=True, is_key=True),
    Column(heading="tokens\na second"),
    Column(heading="never"),
    Column(heading="why", is_text=True, wraps=True),
    Column(heading="waits"),
)
ROWS = [("alpha", "12.5", "", "because of something long that takes more than one line", "3"), ("beta", "7", "", Text("so"), "12345")]


def lines(shown: RenderableType, width: int) -> list[str]:
    written = io.StringIO()
    Console(width=width, file=written).print(shown)
    return written.getvalue().splitlines()


def words(shown: list[str]) -> list[str]:
    return re.findall(r"\S+", " ".join(shown))


def test_a_table_that_has_room_is_one_block() -> None:
    shown = lines(ColumnTable(COLUMNS, ROWS), UNLIMITED)
    assert len(shown) == 4
    assert shown[2].split() == ["alpha", "12.5", *ROWS[0][3].split(), "3"]


@pytest.mark.parametrize("width", [20, 30, 40, 54])
def test_a_narrow_terminal_gets_every_entry_in_blocks_that_fit(width: int) -> None:
    shown = lines(ColumnTable(COLUMNS, ROWS), width)
    assert max(map(len, shown)) <= width
    assert {"12.5", "7", "3", "12345"} <= set(words(shown))
    assert "never" not in words(shown), "what has no entry takes no room"
    assert words(shown).count("alpha") == words(shown).count("beta") == words(shown).count("name")


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="2 cells and not 5"):
        ColumnTable(COLUMNS, [("a", "b")])


def test_a_cell_is_shown_as_it_is() -> None:
    names = ("[team] alice", "a[/b]", "[red]x", ":smile:")
    shown = lines(ColumnTable(COLUMNS, [(name, "1", "", "", "") for name in names]), UNLIMITED)
    assert [line.removesuffix("1").strip() for line in (line.rstrip() for line in shown[2:])] == list(names)


def test_the_tables_of_the_commands_fit_80_columns() -> None:
    host, record = SEEN.hosts[0], replace(READY, last_loss="rank 1 on gpu-1 was lost: it was killed by signal 9", num_restarts=2)
    wide = replace(SEEN, hosts=(replace(host, name="a-host-with-a-rather-long-name-1"),), replicas=(("manta", record),))
    figures = [
        Figure(workload=workload, tokens_per_s=12345.6, spread=0.123, ttft_s=12.345, itl_s=0.1234, floor_s=123.45, elapsed_s=234.56)
        for workload in WORKLOADS
    ]
    seconds = Answer(due_s=0.0, token_s=[1000.0, 2000.0, 3000.5], end_s=4000.0, ending="done")
    for table in (tables(wide, None), engine_table(figures), load_table(summarise([seconds], Objective(ttft_s=1, itl_s=1)))):
        narrow, wide_lines = lines(table, 80), lines(table, UNLIMITED)
        assert max(map(len, narrow)) <= 80
        assert len(narrow) >= len(wide_lines)
        cells = set(re.split(r"\s{2,}", "  ".join(line.strip() for line in wide_lines)))
        assert {cell for cell in cells if " " not in cell} - {"tokens/s"} <= set(words(narrow)), "tokens/s has no entries without a window"


def test_a_plan_fits_the_terminal_that_it_is_shown_on(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("serve.planning.render.results", lambda: Console(width=80, file=shown, highlight=False))
    asked = ("Qwen2-57B-A14B", "--gpus", "8xH100-80G")
    code, _ = manta(*asked)
    assert code == 0
    assert max(map(len, shown.getvalue().splitlines())) <= 80
    monkeypatch.undo()
    assert set(words(shown.getvalue().splitlines())) >= set(words(manta(*asked)[1].splitlines()))


def test_what_is_piped_is_not_wrapped() -> None:
    assert results().width == UNLIMITED
    sentence = "word " * 50 + "--a-flag=to-be-copied"
    assert wrapped(sentence, UNLIMITED) == [sentence]
    assert any("--a-flag=to-be-copied" in line for line in wrapped(sentence, 24))
    assert max(map(len, wrapped(sentence, 40, then="    "))) <= 40


def test_settings_are_explained_within_the_terminal() -> None:
    loaded = load()
    for text in (as_yaml(loaded, width=80), explain("engine", loaded, width=80), explain("router", loaded, width=60)):
        assert max(map(len, text.splitlines())) <= 80
        assert len(text.splitlines()) > 10
    assert len(explain("engine", loaded, width=UNLIMITED).splitlines()) == len(fields(EngineConfig))
    assert yaml.safe_load(as_yaml(loaded, width=60)) == yaml.safe_load(as_yaml(loaded))


def test_keys_are_listed_a_line_each_where_a_program_reads_them_and_in_blocks_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ["--file", str(tmp_path / "keys.json")]
    for name in ("alice", "a-team-with-a-long-name"):
        quotas = ("--requests-per-minute", "600", "--tokens-per-minute", "1000000", "--concurrency", "32")
        assert (
            CliRunner().invoke(app, ["keys", "create", "--name", name, "--scope", "infer", "--scope", "metrics", *quotas, *file]).exit_code
            == 0
        )
    listed = CliRunner().invoke(app, ["keys", "list", *file]).stdout.splitlines()
    assert len(listed) == 2
    shown = io.StringIO()
    monkeypatch.setattr("serve.terminal.results", lambda: Console(width=60, file=shown, force_terminal=True, color_system=None))
    assert CliRunner().invoke(app, ["keys", "list", *file]).exit_code == 0
    lines_shown = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()
    assert max(map(len, lines_shown)) <= 60
    assert {word for line in listed for word in line.split()} - {"1000000", "tokens/min,"} <= set(words(lines_shown))


def test_a_batch_without_a_terminal_says_a_line_for_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with batch_progress(40) as report:
        for done in range(41):
            report(done, done // 10)
    said = capsys.readouterr().err.splitlines()
    assert (len(said), said[0], said[-1]) == (10, "4 of 40 done, 0 failed", "40 of 40 done, 4 failed")


COMMANDS = (
    *((), ("bench",), ("bench", "engine"), ("bench", "serve"), ("keys",), ("keys", "create"), ("keys", "rotate")),
    *((name,) for name in ("serve", "up", "down", "status", "top", "chat", "batch", "config", "demo-model", "plan", "doctor")),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_no_summary_is_cut(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="manta").stdout.splitlines()
    assert len(shown) > 4
    assert [line for line in shown if len(line) > 80] == []
    assert [line for line in shown if line.endswith("...") and not line.startswith("Usage")] == []


@pytest.mark.parametrize(("term", "draws"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(term: str, draws: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("TERM", term)
    assert can_redraw() is draws


ESCAPE = re.compile(rb"\x1b\[([0-9;?]*)([A-Za-z])")


def written_to_a_terminal(program: str, **environment: str) -> bytes:
    """What a program writes to stdout and stderr if both are a terminal."""
    ours, theirs = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM")}
    shown = b""
    try:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stderr=theirs, env={**kept, **environment})
        os.close(theirs)
        with contextlib.suppress(OSError):  # Linux: when the other end is closed
            while more := os.read(ours, 65536):
                shown += more
        assert process.wait(60) == 0, shown.decode()
    finally:
        os.close(ours)
    return shown


STYLES = """
import ray  # has colorama, and initialises it when it starts
import colorama
from rich.text import Text
from serve.cli import forget_colorama
from serve.commands.progress import progress_shown
from serve.terminal import results
colorama.init()
results().print(Text("failed", style="bold red"))
with progress_shown() as report:
    report("loading", 0.5)
forget_colorama()
"""


def test_a_dumb_terminal_gets_no_escape_at_all() -> None:
    shown = written_to_a_terminal(STYLES, TERM="dumb")
    assert b"failed" in shown
    assert b"loading" in shown
    assert b"\x1b" not in shown


def test_without_colours_bold_stays_and_bars_are_drawn() -> None:
    coloured, colourless = (ESCAPE.findall(written_to_a_terminal(STYLES, TERM="xterm", NO_COLOR=value)) for value in ("", "1"))
    assert (b"1;31", b"m") in coloured
    styles = {part for codes, end in colourless if end == b"m" for part in codes.split(b";")}
    assert styles <= {b"", b"0", b"1", b"2", b"22"}, "no code from 30 to 49 or 90 to 107"
    assert (b"1", b"m") in colourless
    assert (b"?25", b"l") in colourless, "the cursor is hidden while a bar is drawn"


def test_a_bar_says_what_happens_before_the_first_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Importing torch or ray takes seconds, in which it showed nothing but 0 %."""
    monkeypatch.setattr("serve.terminal.can_redraw", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_shown() as report:
        report("loading", 0.5)
    assert "starting" in capsys.readouterr().err
