"""`python -m benchmarks.gpu`: on one GPU, check correctness, measure the device's peak rates, then models against their floors and
transformers.

The most informative parts run first. A part that fails or exceeds its minutes does not stop the next one, and results are written after
every figure (`gpu.json`, `gpu.md` in `--out`). Parts run in a separate process (`benchmarks.gpu.parts`); if a part crashes it or hangs in
the device, a new process continues after that part. With `--device cpu --tiny` everything runs on a CPU, which tests the script and
measures nothing.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.results import HANG_S, Results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: to prove the script")
    parser.add_argument("--only", action="append", default=[], help="parts whose name, or a word of it, begins so (may be repeated)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--each", type=float, default=math.inf, help="minutes for each part at most")
    parser.add_argument("--out", type=Path, default=Path(os.environ["OUT"]) if "OUT" in os.environ else None)
    options = parser.parse_args(arguments)
    command = [sys.executable, "-m", "benchmarks.gpu.parts", "--device", options.device]
    command += [part for name in options.only for part in ("--only", name)] + ["--tiny"] * options.tiny
    command += ["--each", str(options.each)]
    return attend(command, options.out or Path(tempfile.mkdtemp(prefix="manta-gpu-")), options.minutes)


def attend(command: list[str], out: Path, minutes: float) -> int:
    """Run ``command`` until every part has run: if its process is lost during a part, start another one after that part."""
    deadline = time.monotonic() + 60 * minutes
    (out / "gpu.json").unlink(missing_ok=True)  # left by another call: it may name a part that was running there
    behind: list[str] = []
    while True:
        left_s = max(0.0, deadline - time.monotonic())
        try:
            # Normally the process's own watchdog ends it first; this timeout is for one that does not get as far as its parts.
            process = [*command, "--out", str(out), "--minutes", str(left_s / 60), *behind]
            code = subprocess.run(process, timeout=left_s + 2 * HANG_S, check=False).returncode
        except subprocess.TimeoutExpired:
            code = -9
        results = Results(out, 0.0)
        results.take_up()
        if results.under_way is None:
            return code
        behind = ["--behind", results.under_way]
        results.lose(code)


if __name__ == "__main__":
    sys.exit(main())
