"""Time all-reduces between ranks on this host's devices, as in captured steps: through symmetric memory and over the process group."""

import multiprocessing
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue

import torch
from torch import Tensor

from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import replayed_s
from parallel.collectives import all_reduce, broadcast
from parallel.groups import Group, Rendezvous, free_rendezvous, open_groups
from parallel.topology import Topology

Figure = tuple[str, float, str]
"""(name, value, unit)"""
SIZES = (16 << 10, 128 << 10, 256 << 10, 1 << 20, 8 << 20, 64 << 20)
START_S = 180.0


def measure(results: Results, device: torch.device, *, tiny: bool) -> None:
    """
    Raises:
        RuntimeError: a rank died, or the ranks took too long.
    """
    ranks = min(torch.cuda.device_count(), 8) if device.type == "cuda" else 2
    for name, value, unit in figures_of(_rank, ranks, device.type, SIZES[:1] if tiny else SIZES):
        results.add("collectives", f"{name}, {ranks} ranks", value, unit)


def figures_of(rank_main: Callable[..., None], ranks: int, *arguments: object) -> list[Figure]:
    """Run ``rank_main`` in a process per rank and return the figures that rank 0 puts into the queue. Its arguments: rank, number of ranks,
    rendezvous, the first of ``arguments``, the queue, and the other ``arguments``.

    Raises:
        RuntimeError: a rank died, or the ranks took too long.
    """
    context = multiprocessing.get_context("spawn")
    told: Queue[list[Figure]] = context.Queue()
    given = (ranks, free_rendezvous(), arguments[0], told, *arguments[1:])
    processes = [context.Process(target=rank_main, args=(rank, *given), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        figures = _figures(told, processes)
        for process in processes:  # all leave the group before any is killed
            process.join(timeout=5)
    finally:
        for process in processes:
            process.kill()
    return figures


def _figures(told: "Queue[list[Figure]] | queue.Queue[list[Figure]]", processes: Sequence[BaseProcess]) -> list[Figure]:
    deadline = time.monotonic() + START_S
    while True:
        lost = [f"rank {rank}: {each.exitcode}" for rank, each in enumerate(processes) if each.exitcode]
        try:
            return told.get(timeout=1)
        except queue.Empty:  # `lost` was read before this get: rank 0 may have put its figures before it ended
            if lost:
                raise RuntimeError(f"ranks ended before there were figures, with exit codes {', '.join(lost)}") from None
            if time.monotonic() > deadline:
                raise RuntimeError(f"no figures of {len(processes)} ranks within {START_S:g} s") from None


def _rank(rank: int, ranks: int, rendezvous: Rendezvous, kind: str, told: "Queue[list[Figure]]", sizes: tuple[int, ...]) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cpu":
        torch.set_num_threads(1)
    with open_groups(Topology(tp=ranks), rank, rendezvous=rendezvous, device=device, timeout_s=START_S, transport="auto") as groups:
        assert groups.tp.transport is not None
        faster, plain = groups.tp, replace(groups.tp, transport=replace(groups.tp.transport, symmetric_memory=None))
        figures: list[Figure] = [("symmetric memory is used", float(groups.tp.transport.symmetric_memory is not None), "yes or no")]
        for num_bytes in sizes:
            x = torch.randn(num_bytes // 2, device=device).to(torch.bfloat16)
            for name, group in (("as it is", faster), ("the process group alone", plain)):
                figures.append((f"sum of {num_bytes >> 10} KiB, {name}", 1e6 * _seconds(all_reduce, x, group, device), "us"))
        tokens = torch.zeros(256, dtype=torch.int64, device=device)
        figures.append(("tokens of 256 rows handed on", 1e6 * _seconds(_hand_on, tokens, plain, device), "us"))
        if rank == 0:
            told.put(figures)


def _hand_on(x: Tensor, group: Group) -> Tensor:
    return broadcast(x, 0, group)


def _seconds(collective: Callable[[Tensor, Group], Tensor], x: Tensor, group: Group, device: torch.device) -> float:
    return replayed_s(lambda: collective(x, group), device)
