"""vLLM on the same device with the same model shapes and requests: W1, W2 and W4 of `benchmarks.gpu.workloads`.

    python -m benchmarks.gpu.peer_vllm --shape 7B --minutes 4 --out FOLDER

Needs vLLM (written for 0.24.0), but neither weights nor network. Each shape runs in its own process (`benchmarks.gpu.peer_vllm_parts`),
which starts vLLM with its defaults. If that yields no figures, another process starts it with fewer features (`WAYS` there); the figures'
names say which. Names match ours, so that two `gpu.json` can be compared. vLLM's output shows how long it compiled and captured, and
which kernels it chose.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.results import HANG_S, Results

NUM_WAYS = 2


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.peer_vllm", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", required=True, help="of a part of `python -m benchmarks.gpu`; may be repeated")
    parser.add_argument(
        "--only", action="append", default=[], help="W1, W2, W4, or a context or cell of them as 512 or 128/2048 (may be repeated)"
    )
    parser.add_argument("--also", default="{}", help="arguments of vllm.LLM beside ours, as JSON")
    parser.add_argument("--way", type=int, choices=range(NUM_WAYS), help="only this one")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all of it")
    parser.add_argument("--out", type=Path, default=Path(os.environ["OUT"], "vllm") if "OUT" in os.environ else None)
    options = parser.parse_args(arguments)
    rest = ["--also", options.also] + [word for only in options.only for word in ("--only", only)]
    ways = range(NUM_WAYS) if options.way is None else [options.way]
    out: Path = options.out or Path(tempfile.mkdtemp(prefix="manta-gpu-"))
    (out / "gpu.json").unlink(missing_ok=True)  # of another call
    deadline = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the process group is killed too
    found = [any(_measures(shape, way, rest, out, deadline) for way in ways) for shape in options.shape]
    results = Results(out, 0.0)
    results.take_up()
    print(results.table(), flush=True)
    return 0 if all(found) else 1


def _measures(shape: str, way: int, rest: list[str], out: Path, deadline: float) -> bool:
    """Run one shape in a process; returns whether it added any figures."""
    left_s = max(0.0, deadline - time.monotonic())
    before = Results(out, 0.0)
    before.take_up()
    command = [sys.executable, "-m", "benchmarks.gpu.peer_vllm_parts", "--shape", shape, "--way", str(way), "--out", str(out)]
    # Its own process group: if this process is killed, vLLM's engine process would live on and keep the device's memory.
    process = subprocess.Popen([*command, "--minutes", str(left_s / 60), *rest], process_group=0)
    try:
        # Normally the process's own watchdog ends it first; this timeout is for one that does not get that far.
        code = process.wait(left_s + 2 * HANG_S)
    except subprocess.TimeoutExpired:
        code = -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    results = Results(out, 0.0)
    results.take_up()
    if results.under_way is not None:
        results.lose(code)
    return len(results.figures) > len(before.figures)


if __name__ == "__main__":
    sys.exit(main())
