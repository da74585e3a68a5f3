"""CPU seconds by process of a server, read with psutil."""

import contextlib
from collections import defaultdict
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class CpuSeconds:
    """Snapshot of the CPU time of a process and all its descendants."""

    taken: dict[tuple[int, float], tuple[str, float]]
    """(pid, start time) to (name, user plus system seconds)."""

    @classmethod
    def of(cls, pid: int) -> "CpuSeconds":
        root = psutil.Process(pid)
        taken = {}
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                times = process.cpu_times()
                taken[process.pid, process.create_time()] = (_called(process), times.user + times.system)
        return cls(taken)

    def since(self, before: "CpuSeconds") -> dict[str, float]:
        """CPU seconds by process name since ``before``, the busiest first. Processes that ended in between are not counted."""
        seconds: defaultdict[str, float] = defaultdict(float)
        for key, (name, taken) in self.taken.items():
            seconds[name] += taken - before.taken.get(key, (name, 0.0))[1]
        return dict(sorted(seconds.items(), key=lambda one: -one[1]))


def _called(process: psutil.Process) -> str:
    """Name of a process: the title of Ray's workers (``ray::ServeReplica:app:Deployment``), else program and script or module."""
    command = process.cmdline() or [process.name()]
    if command[0].startswith("ray::"):
        return command[0].split("(")[0].strip()
    words = [command[0], *(word for word in command[1:4] if not word.startswith("-"))]
    return " ".join(word.rpartition("/")[2] for word in words[:2])
