"""`python -m benchmarks.run`: compare Manta with other engines in alternating rounds, each round in its own process.

Every process runs all workloads. Rounds alternate between engines, so that changes of the machine's speed affect all of them alike.
Results are appended to a JSON file, so that a long comparison can be done in pieces; `--report` writes table and plots.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoints import SHAPES, checkpoint
from benchmarks.peers.llama_cpp import converted

ROOT = Path(__file__).parent.parent
FORMATS = ("bf16", "int8", "int4")
PEERS = {
    "transformers_eager": {"dense": FORMATS[:1], "moe": FORMATS[:1]},
    "llama_cpp": {"dense": FORMATS, "moe": FORMATS},
    "openvino": {"dense": FORMATS, "moe": FORMATS[:2]},  # `openvino_experts` writes none of 4 bits
    "onnxruntime_genai": {"dense": FORMATS[1:]},  # its builder knows no Qwen2-MoE, and makes no bfloat16 for CPUs
    "vllm_cpu": {"dense": FORMATS[:2], "moe": FORMATS[:1]},
}
"""Which weight formats each engine supports, by model shape."""
MAKE_FILES = ("openvino", "onnxruntime_genai", "vllm_cpu")
"""Engines that convert the checkpoint in their own environment, when called without TOKENS_OUT."""
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
"""Preloaded for vLLM, as its documentation recommends for CPUs (Debian: libtcmalloc-minimal4)."""


def ours(place: Path, form: str, tokens_out: int, only: list[str]) -> dict:
    """Run `manta bench` and return its JSON."""
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
            "--no-warm-up",
            "--tokens-out",
            str(tokens_out),
            "--json",
            str(output),
        ]
        command += ["--set", "runner.kv_cache_bytes=300000000"]  # 24,000 tokens of the dense shape: more than any workload needs
        command += [] if form == "bf16" else ["--quantize", form]
        subprocess.run([*command, *(part for name in only for part in ("--only", name))], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())


def peer(name: str, python: str, place: Path, form: str, tokens_out: int, only: list[str]) -> dict:
    command = [python, "-m", f"benchmarks.peers.{name}", str(place), form, str(tokens_out), *only]
    done = subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **({"LD_PRELOAD": str(TCMALLOC)} if name == "vllm_cpu" and TCMALLOC.exists() else {})},
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def add(results: Path, entry: dict) -> None:
    found = json.loads(results.read_text()) if results.exists() else []
    results.write_text(json.dumps([*found, entry], indent=1) + "\n")


def table(results: list[dict]) -> str:
    """Markdown tables of the medians over the rounds, with the ratio of ours to the best other engine's."""
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


def peers_of(choices: list[str], shape: str, form: str) -> list[tuple[str, str]]:
    """(name, Python) of the engines that support this shape and format."""
    named = [(name, python or sys.executable) for name, _, python in (choice.partition("=") for choice in choices)]
    return [(name, python) for name, python in named if form in PEERS[name].get(shape, ())]


def report(results: Path) -> None:
    """Print the table, and write table and plots next to the results."""
    found = json.loads(results.read_text())
    lines = [line for entry in found if entry["engine"] == "manta" for line in entry["lines"] if line.startswith("machine:")]
    peaks = {(entry["shape"], entry["format"], entry["engine"]): entry["peak_bytes"] / 2**30 for entry in found if entry.get("peak_bytes")}
    text = table(found) + "\n" + "\n".join(f"{' '.join(key)}: at most {gib:.2f} GiB" for key, gib in peaks.items())
    text += "\n\n" + "\n".join(dict.fromkeys(lines)) + "\n"
    print(text)
    results.with_suffix(".md").write_text(text)
    try:
        from benchmarks.plots import draw

        for shape, form in sorted({(entry["shape"], entry["format"]) for entry in found}):
            draw(found, shape, form, results.with_name(f"{results.stem}_{shape}_{form}.png"))
    except ImportError:
        print("no pictures without matplotlib", file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be repeated; dense without it")
    parser.add_argument("--format", choices=FORMATS, action="append", help="may be repeated; all without it (of moe: bf16)")
    parser.add_argument("--peer", action="append", metavar="NAME=PYTHON", default=[], help=f"NAME is one of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further process after this time")
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--checkpoints", type=Path, default=Path.home() / ".cache" / "manta" / "benchmarks")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "rounds.json")
    parser.add_argument("--fresh", action="store_true", help="forget what is in --results")
    parser.add_argument("--prepare", action="store_true", help="write the checkpoints and the other engines' files, and measure nothing")
    parser.add_argument("--report", action="store_true", help="write table and plots of --results, and measure nothing")
    options = parser.parse_args()
    for choice in options.peer:
        if choice.partition("=")[0] not in PEERS:
            parser.error(f"--peer {choice}: there is none of this name")
    return options


def prepare(options: argparse.Namespace, rounds: list[tuple[str, str]]) -> dict[str, Path]:
    places = {shape: checkpoint(shape, options.checkpoints) for shape, _ in rounds}
    for shape, form in rounds:
        for name, python in peers_of(options.peer, shape, form):
            if name in ("llama_cpp", "openvino"):
                converted(places[shape], form)  # needs torch, which their environments lack
            if name in MAKE_FILES:
                command = [python, "-m", f"benchmarks.peers.{name}", str(places[shape]), form]
                try:
                    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
                except subprocess.CalledProcessError as error:  # it fails again in its turn, and the others are measured
                    print(f"{name}, {shape} {form}: its files were not written ({error})", file=sys.stderr, flush=True)
    return places


def main() -> None:
    options = arguments()
    if options.report:
        report(options.results)
        return
    shapes = options.shape or ["dense"]
    rounds = [(shape, form) for shape in shapes for form in (options.format or (FORMATS if shape == "dense" else FORMATS[:1]))]
    places = prepare(options, rounds)
    if options.prepare:
        return
    if options.fresh:
        options.results.unlink(missing_ok=True)
    until = time.monotonic() + 60 * options.minutes
    for number in range(options.rounds):
        for shape, form in rounds:
            runs = [("manta", ""), *peers_of(options.peer, shape, form)]
            for name, python in runs if number % 2 == 0 else reversed(runs):
                if time.monotonic() > until:
                    return
                common = (places[shape], form, options.tokens_out, options.only)
                try:
                    found = ours(*common) if name == "manta" else peer(name, python, *common)
                except (subprocess.CalledProcessError, json.JSONDecodeError, IndexError) as error:  # the others go on
                    said = (getattr(error, "stderr", None) or "").strip().splitlines()[-3:]
                    print(f"{name}, {shape} {form}: {error}", *said, sep="\n    ", file=sys.stderr, flush=True)
                    continue
                add(options.results, {"shape": shape, "format": form, "engine": name} | found)
            print(f"round {number + 1} of {options.rounds}, {shape} {form}: done", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
