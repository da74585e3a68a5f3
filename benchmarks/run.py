"""`python -m benchmarks.run`: Manta and its peers one after the other, round after round, each round in a process of its own.

Every process runs all cells; the rounds of the engines alternate, so that what the machine does from minute to minute meets all alike.
Results are added to a JSON file, so that a long comparison can be made in pieces; `--report` writes the table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoints import SHAPES, checkpoint
from benchmarks.peers.llama_cpp import converted

ROOT = Path(__file__).parent.parent
PEERS = ("transformers_eager", "llama_cpp")
FORMATS = ("bf16", "int8", "int4")


def ours(place: Path, form: str, tokens_out: int, only: list[str]) -> dict:
    """`manta bench`, as anybody would call it."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            "serve",
            "bench",
            str(place),
            "--rounds",
            "1",
            "--tokens-out",
            str(tokens_out),
            "--json",
            str(output),
        ]
        command += ["--set", "runner.kv_cache_bytes=900000000"]
        command += [] if form == "bf16" else ["--quantize", form]
        subprocess.run([*command, *(part for name in only for part in ("--only", name))], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())


def peer(name: str, python: str, place: Path, form: str, tokens_out: int, only: list[str]) -> dict:
    command = [python, "-m", f"benchmarks.peers.{name}", str(place), form, str(tokens_out), *only]
    done = subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def add(results: Path, entry: dict) -> None:
    found = json.loads(results.read_text()) if results.exists() else []
    results.write_text(json.dumps([*found, entry], indent=1) + "\n")


def table(results: list[dict]) -> str:
    """Medians over the rounds, and ours over the best peer's."""
    lines = []
    for shape, form in sorted({(entry["shape"], entry["format"]) for entry in results}):
        chosen = [entry for entry in results if (entry["shape"], entry["format"]) == (shape, form)]
        engines = sorted({entry["engine"] for entry in chosen}, key=lambda name: (name != "manta", name))
        names = list(dict.fromkeys(cell["name"] for entry in chosen for cell in entry["cells"]))
        lines += [
            f"### {shape}, {form}",
            "",
            f"| tokens/s, median (lowest-highest) | {' | '.join(engines)} | ours / best peer | of floor |",
        ]
        lines.append("|---" * (len(engines) + 3) + "|")
        for name in names:
            rates = {
                e: [c["tokens_per_s"] for entry in chosen if entry["engine"] == e for c in entry["cells"] if c["name"] == name]
                for e in engines
            }
            floors = [c["of_floor"] for entry in chosen for c in entry["cells"] if c["name"] == name and "of_floor" in c]
            medians = {e: statistics.median(values) for e, values in rates.items() if values}
            peers = [value for engine, value in medians.items() if engine != "manta"]
            ratio = f"{medians['manta'] / max(peers):.2f}" if peers and "manta" in medians else ""
            cells = [f"{medians[e]:,.1f} ({min(rates[e]):,.1f}-{max(rates[e]):,.1f})" if e in medians else "" for e in engines]
            lines.append(f"| {name} | {' | '.join(cells)} | {ratio} | {f'{statistics.median(floors):.0%}' if floors else ''} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="dense")
    parser.add_argument("--format", choices=FORMATS, action="append", help="may be repeated; all without it")
    parser.add_argument("--peer", action="append", metavar="NAME=PYTHON", default=[], help=f"NAME is one of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--checkpoints", type=Path, default=Path.home() / ".cache" / "manta" / "benchmarks")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "rounds.json")
    parser.add_argument("--report", action="store_true", help="print the table of what is in --results, and measure nothing")
    options = parser.parse_args()
    if options.report:
        print(table(json.loads(options.results.read_text())))
        return
    place = checkpoint(options.shape, options.checkpoints)
    if any(choice.startswith("llama_cpp") for choice in options.peer):
        for form in options.format or FORMATS:
            converted(place, form)
    for number in range(options.rounds):
        for form in options.format or FORMATS:
            entry = {"shape": options.shape, "format": form, "engine": "manta"}
            add(options.results, entry | ours(place, form, options.tokens_out, options.only))
            for name, _, python in (choice.partition("=") for choice in options.peer):
                if name == "transformers_eager" and form != "bf16":
                    continue
                found = peer(name, python or sys.executable, place, form, options.tokens_out, options.only)
                add(options.results, entry | {"engine": name} | found)
            print(f"round {number + 1} of {options.rounds}, {form}: done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
