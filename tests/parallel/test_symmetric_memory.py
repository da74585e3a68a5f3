"""All-reduce through symmetric memory, as far as a CPU can test it: the kernel chosen, agreement of ranks, checks at startup."""

import logging
import os

import pytest
import torch
from torch import Tensor

from parallel import symmetric_memory
from parallel.collectives import all_reduce
from parallel.groups import Group, ParallelGroups
from parallel.symmetric_memory import OVERLAPPING, Operations, SymmetricMemory, open_symmetric_memory
from parallel.topology import Topology
from parallel.transport import Transport
from tests.fakes.symmetric import SlowMaker, Trouble
from tests.ranks import run_ranks

CPU = torch.device("cpu")
BUFFER_BYTES = 1 << 19


def agreed(groups: ParallelGroups, maker: SlowMaker) -> tuple[SymmetricMemory | None, str]:
    """Also returns the log of the first rank."""
    assert groups.world.transport is not None
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(symmetric_memory, "BUFFER_BYTES", BUFFER_BYTES)
        monkeypatch.setattr(symmetric_memory, "_replayed", maker.capture)
        symmetric_memory.logger.addHandler(handler)
        try:
            return open_symmetric_memory(groups.world.transport.process_group, CPU, name="ranks 0, 1 (tp)", maker=maker), "".join(said)
        finally:
            symmetric_memory.logger.removeHandler(handler)


def sums(groups: ParallelGroups, has_multicast: tuple[bool, bool]) -> tuple[list[tuple[str, Tensor, Tensor]], str]:
    """For several sizes and dtypes: the kernel used, the sum, and gloo's sum."""
    maker = SlowMaker(groups.rank, groups.world.size, has_multicast=has_multicast[groups.rank])
    memory, _ = agreed(groups, maker)
    assert memory is not None
    assert groups.world.transport is not None
    gloo = Transport("gloo", groups.world.transport.process_group)
    plain, faster = (
        Group(axis="world", rank=groups.rank, size=groups.world.size, ranks=groups.world.ranks, transport=transport)
        for transport in (gloo, Transport("gloo", gloo.process_group, symmetric_memory=memory))
    )
    generator, found = torch.Generator().manual_seed(groups.rank), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(symmetric_memory, "BUFFER_BYTES", BUFFER_BYTES)
        for dtype, shape in (
            (torch.bfloat16, (1, 8)),
            (torch.bfloat16, (128, 1024)),
            (torch.bfloat16, (129, 1024)),
            (torch.bfloat16, (257, 1024)),
            (torch.bfloat16, (1, 9)),
            (torch.float32, (4, 8)),
        ):
            x = torch.randn(shape, generator=generator).to(dtype)
            maker.calls.clear()
            total = all_reduce(x.clone(), faster)
            found.append(("".join(maker.calls), total, all_reduce(x.clone(), plain)))
    return found, str(faster.transport)


@pytest.mark.parametrize("has_multicast", [(False, False), (True, True), (True, False)], ids=["none", "all", "multicast on one rank alone"])
def test_the_kernel_is_chosen_by_size(has_multicast: tuple[bool, bool]) -> None:
    (first, name), (second, _) = run_ranks(Topology(tp=2), sums, has_multicast, transport="gloo")
    larger = "multimem" if all(has_multicast) else "two shot"
    for found in (first, second):
        assert [way for way, *_ in found] == ["one shot", "one shot", larger, "", "", ""]
    for (_, ours, gloo), (_, theirs, _) in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, gloo), "two summands are rounded once either way"
    assert name == f"symmetric memory, {'multimem' if all(has_multicast) else 'two-shot'} above 256 KiB, gloo for the rest"


def troubled(groups: ParallelGroups, trouble: Trouble) -> tuple[bool, str]:
    memory, said = agreed(groups, SlowMaker(groups.rank, groups.world.size, trouble=trouble))
    return memory is not None, said


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("no device", "rank 1: a device of long ago"),
        ("same device", "two ranks share a device"),
        ("no rendezvous", "rank 1: RuntimeError: handles do not travel here"),
        ("wrong", "rank 0: sums of 16 bytes differ from NCCL's"),
        ("wrong above", "rank 0: sums of 262160 bytes differ from NCCL's"),
        ("apart", "rank 0: sums of 16 bytes differ from rank to rank"),
        ("raises", "rank 0: sums of 16 bytes raise it cannot be launched"),
        ("no capture", "rank 1: sums are not captured: operation not permitted"),
    ],
)
def test_on_any_problem_all_ranks_use_the_process_group_and_the_log_says_why(trouble: Trouble, why: str) -> None:
    found = run_ranks(Topology(tp=2), troubled, trouble, transport="gloo")
    assert [has for has, _ in found] == [False, False]
    assert found[0][1] == f"ranks 0, 1 (tp) add up over NCCL alone, not through symmetric memory: {why}"


def with_one_ordinal(groups: ParallelGroups) -> tuple[bool, str | None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv(OVERLAPPING, raising=False)
        memory, _ = agreed(groups, SlowMaker(groups.rank, groups.world.size, ordinal=0))
        return memory is not None, os.environ.get(OVERLAPPING)


def test_ranks_that_each_see_one_device_as_ordinal_0_have_different_devices() -> None:
    """As under Ray; torch needs an environment variable for that."""
    assert run_ranks(Topology(tp=2), with_one_ordinal, transport="gloo") == [(True, "1")] * 2


@pytest.mark.parametrize("name", [name for name in vars(Operations) if "all_reduce" in name])
def test_torch_has_the_operations_that_the_fake_implements(name: str) -> None:
    arguments = getattr(torch.ops.symm_mem, name).default._schema.arguments
    assert [(one.name, str(one.type)) for one in arguments] == [("input", "Tensor"), ("reduce_op", "str"), ("group_name", "str")]
    assert (arguments[0].alias_info is not None) == name.endswith("_"), "in place"
