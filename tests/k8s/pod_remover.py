"""Remove what a node of pods leaves behind, even if its tests are killed: ``python -m tests.k8s.pod_remover MARK BRIDGE``.

A process of its own with a pipe from the tests, which write a line for each folder that they make; the pipe closes when they end, for
whatever reason. Then the processes with MARK (``NAME=value``) in their environment, BRIDGE, the network namespaces named after it, and the
folders are removed.
"""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from serve.process_reaper import end


def main() -> None:
    mark, bridge = sys.argv[1:]
    folders = [Path(line.rstrip("\n")) for line in sys.stdin]
    end(set(), mark)
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    namespaces = [line.split()[0] for line in listed.splitlines() if line.startswith(f"{bridge}-")]
    for command in (*(["netns", "delete", each] for each in namespaces), ["link", "delete", bridge]):
        subprocess.run(["ip", *command], capture_output=True, check=False)
    for folder in sorted(set(folders), key=lambda each: -len(each.parts)):
        with suppress(OSError):
            folder.rmdir()


if __name__ == "__main__":
    main()
