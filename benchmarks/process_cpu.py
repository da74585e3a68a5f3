"""What the processes of a server take of the CPUs: seconds by process, from /proc by way of psutil."""

import contextlib
from collections import defaultdict
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class CpuSeconds:
    """As of one moment, of a process and all that descend from it."""

    taken: dict[tuple[int, float], tuple[str, float]]
    """By number and time of start: what it is, and user and system time together."""

    @classmethod
    def of(cls, pid: int) -> "CpuSeconds":
        root = psutil.Process(pid)
        taken = {}
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has ended since
                times = process.cpu_times()
                taken[process.pid, process.create_time()] = (_called(process), times.user + times.system)
        return cls(taken)

    def since(self, before: "CpuSeconds") -> dict[str, float]:
        """What each kind of process took, the busiest first. Of a process that has ended in between nothing is known."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for key, (name, taken) in self.taken.items():
            seconds[name] += taken - before.taken.get(key, (name, 0.0))[1]
        return dict(sorted(seconds.items(), key=lambda one: -one[1]))


def _called(process: psutil.Process) -> str:
    """Ray's workers carry a title (``ray::ServeReplica:app:Deployment``); of others the program, and the script or module it runs."""
    command = process.cmdline() or [process.name()]
    if command[0].startswith("ray::"):
        return command[0].split("(")[0].strip()
    words = [command[0], *(word for word in command[1:4] if not word.startswith("-"))]
    return " ".join(word.rpartition("/")[2] for word in words[:2])
