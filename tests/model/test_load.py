"""Loading checks everything before it allocates, and each rank reads only its own share."""

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread, local

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from model.checkpoint_error import CheckpointError
from model.config import ModelConfig
from model.load import CheckpointMismatch, LoadReport, load_model
from model.qwen2 import Qwen2
from model.weight_loading import _threads, load_layers
from model.weight_names import Binding
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.linear import Linear, Slot
from parallel.packed_format import PackedFormat
from parallel.quantised_format import QuantisedFormat
from parallel.topology import Topology
from parallel.weight_format import PIECE_MULTIPLE, Dense, StoredTensor, WeightFormat, stream_pieces
from tests.model.driver import CPU, logits_of, mismatch_of, read_report, seeded_prompts
from tests.model.oracle import Oracle, make_oracle
from tests.parallel.memory_tensor import MemoryTensor
from tests.ranks import run_ranks

MakeOracle = Callable[[str], Oracle]
MakeCopy = Callable[[str], Path]


def load(
    folder: Path,
    groups: ParallelGroups | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    format: WeightFormat | None = None,
) -> tuple[Qwen2, LoadReport]:
    with Checkpoint(folder) as checkpoint:
        return load_model(
            checkpoint,
            ModelConfig.from_checkpoint(folder),
            groups or single_rank_groups(),
            device=CPU,
            dtype=torch.float32,
            block_tokens=4,
            on_progress=on_progress,
            format=format,
        )


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)
    return folder


def test_one_rank_reads_every_byte_once(oracle: MakeOracle) -> None:
    for name in ("9_heads", "14_heads_tied", "moe"):
        _, report = load(oracle(name).folder)
        assert report.bytes_read == report.bytes_of_checkpoint
        assert report.ignored == ()


@pytest.mark.parametrize(
    ("name", "topology", "most"),
    [
        ("28_heads", Topology(tp=2), 0.52),
        ("28_heads", Topology(tp=4), 0.27),
        ("moe", Topology(tp=2), 0.56),  # 9 heads and 3 KV heads: the middle KV head is on both ranks
        ("moe", Topology(tp=2, ep=2), 0.56),
        ("28_heads", Topology(pp=3), 0.46),
    ],
    ids=str,
)
def test_each_rank_reads_its_own_share_only(name: str, topology: Topology, most: float, oracle: MakeOracle) -> None:
    reports = run_ranks(topology, read_report, oracle(name).folder)
    whole = reports[0].bytes_of_checkpoint
    assert sum(report.bytes_read for report in reports) >= whole
    assert max(report.bytes_read for report in reports) <= most * whole


def test_progress_runs_from_zero_to_the_total(oracle: MakeOracle) -> None:
    seen: list[tuple[int, int]] = []
    _, report = load(oracle("moe").folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, report.bytes_read)
    assert seen[-1] == (report.bytes_read, report.bytes_read)
    assert seen == sorted(seen)
    assert len(seen) > 50


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "format", [PackedFormat("int8", torch.float32), QuantisedFormat("int8", torch.float32)], ids=lambda one: type(one).__name__
)
def test_many_tensors_get_a_thread_each_and_few_share_torchs_threads(
    format: WeightFormat, oracle: MakeOracle, four_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[bool, set[int]] = {}
    load_part = Linear.load

    def noting(layer: Linear, part: str, tensor: str, stored: StoredTensor) -> int:
        used.setdefault(layer.is_streaming, set()).add(torch.get_num_threads())
        return load_part(layer, part, tensor, stored)

    monkeypatch.setattr(Linear, "load", noting)
    load(oracle("moe").folder, format=format)
    assert used[isinstance(format, PackedFormat)] == {1 if isinstance(format, PackedFormat) else 2}
    assert torch.get_num_threads() == 4


def test_threads_that_load_launch_kernels_on_the_device_of_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's current device is a property of the thread. For a new thread it is the first device, and Triton launches there."""
    current = local()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    device = torch.device("cuda", 1)
    with _threads(2, 1, Event(), device) as threads:
        assert {threads.submit(getattr, current, "device", None).result() for _ in range(4)} == {device}


def test_a_thread_that_begins_while_weights_are_loaded_computes_with_as_many_as_before(oracle: MakeOracle, four_threads: None) -> None:
    found: list[int] = []

    def begin(_done: int, _total: int) -> None:
        other = Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()

    load(oracle("moe").folder, on_progress=begin)
    assert set(found) == {4}


@dataclass
class Layer:
    """A layer that converts its tensors piece by piece."""

    take: Callable[[int], None]
    is_streaming: bool = True

    def slots(self) -> Iterator[Slot]:
        yield Slot("", "weight", (PIECE_MULTIPLE * 5, 1))

    def allocate(self, device: torch.device) -> None: ...

    def load(self, part: str, tensor: str, stored: StoredTensor) -> int:
        return stream_pieces(stored, (slice(None), slice(None)), lambda first, _, __: self.take(first))

    def finish(self) -> None: ...

    __hash__ = object.__hash__


def test_pending_reads_are_cancelled_once_a_tensor_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, cancelled, taken = Event(), Event(), []

    class Threads(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            cancelled.set()
            super().shutdown(wait, cancel_futures=cancel_futures)

    def fail(_: int) -> None:
        assert begun.wait(60)
        raise CheckpointError("damaged", file="x")

    def take(first: int) -> None:
        taken.append(first)
        begun.set()
        assert cancelled.wait(60)

    monkeypatch.setattr("model.weight_loading.ThreadPoolExecutor", Threads)
    bindings = [Binding(name, layer, next(layer.slots())) for name, layer in (("a", Layer(fail)), ("b", Layer(take)))]
    tensors = {binding.name: MemoryTensor(binding.name, torch.zeros(binding.slot.shape)) for binding in bindings}
    with pytest.raises(CheckpointError, match="damaged"):
        load_layers(bindings, tensors, 2, CPU, lambda _done, _total: None)
    assert taken == [0]


@pytest.mark.parametrize("format", [Dense(torch.float32), PackedFormat("int8", torch.float32)], ids=lambda one: type(one).__name__)
def test_an_expert_with_a_missing_tensor_is_not_considered_complete(format: WeightFormat, oracle: MakeOracle) -> None:
    folder = oracle("moe").folder
    model, _ = load(folder, format=format)
    bindings = [binding for binding in model.bindings() if binding.name != "model.layers.0.mlp.experts.3.up_proj.weight"]
    with Checkpoint(folder) as checkpoint, pytest.raises(AssertionError, match=r"never came, by expert: \{3: 1\}"):
        load_layers(bindings, checkpoint.tensors, checkpoint.concurrent_reads, CPU, lambda _done, _total: None)


@pytest.mark.parametrize(("name", "shard_size"), [("9_heads", "40KB"), ("moe", "60KB"), ("14_heads_tied", "40KB")])
def test_shards_load_as_one_file_does(name: str, shard_size: str, oracle: MakeOracle, tmp_path: Path) -> None:
    sharded = make_oracle(name, tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX_FILE).exists()
    (prompt,) = seeded_prompts(sharded.vocab_size, [9])
    assert torch.equal(logits_of(single_rank_groups(), tmp_path, prompt), logits_of(single_rank_groups(), oracle(name).folder, prompt))


def test_missing_superfluous_and_misshapen_tensors_are_reported_together(copied: MakeCopy) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(72)
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(71)

    with pytest.raises(CheckpointMismatch) as caught:
        load(edit(copied("9_heads"), change))
    assert caught.value.missing == ("model.layers.1.self_attn.k_proj.bias",)
    assert caught.value.unused == ("model.layers.1.self_attn.o_proj.bias", "model.layers.9.mlp.up_proj.weight")
    assert caught.value.misshapen == (("model.norm.weight", (71,), (72,)),)
    for name in (*caught.value.missing, *caught.value.unused, "model.norm.weight [71] instead of [72]"):
        assert name in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.missing) == (str(caught.value), caught.value.missing)


def test_a_missing_expert_is_seen_by_the_ranks_that_would_not_hold_it(copied: MakeCopy) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.mlp.experts.5.down_proj.weight"]

    folder = edit(copied("moe"), change)
    for name in run_ranks(Topology(tp=2, ep=2), mismatch_of, folder):
        assert name == ("model.layers.0.mlp.experts.5.down_proj.weight",)


def test_every_stage_sees_what_is_missing_in_another(copied: MakeCopy) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.input_layernorm.weight"]

    folder = edit(copied("9_heads"), change)
    for name in run_ranks(Topology(pp=3), mismatch_of, folder):
        assert name == ("model.layers.0.input_layernorm.weight",)


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(copied: MakeCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]

    folder = edit(copied("9_heads"), change)
    monkeypatch.setattr("model.load.load_layers", lambda *_: pytest.fail("began to load"))
    with pytest.raises(CheckpointMismatch):
        load(folder)


def test_a_stored_head_is_ignored_and_reported_if_it_is_tied(copied: MakeCopy, oracle: MakeOracle) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], 7.0)

    folder = edit(copied("14_heads_tied"), change)
    _, report = load(folder)
    assert report.ignored == ("lm_head.weight",)
    (prompt,) = seeded_prompts(97, [9])
    wanted = oracle("14_heads_tied").logits(prompt)
    torch.testing.assert_close(logits_of(single_rank_groups(), folder, prompt), wanted, atol=1e-4, rtol=0)


def test_an_untied_head_must_be_there(copied: MakeCopy) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]

    with pytest.raises(CheckpointMismatch, match=r"lm_head\.weight"):
        load(edit(copied("9_heads"), change))


def test_a_truncated_file_names_itself_and_the_tensor(copied: MakeCopy) -> None:
    file = copied("9_heads") / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"truncated") as caught:
        load(file.parent)
    assert caught.value.file == str(file)
    assert caught.value.tensor is not None


def test_weights_are_converted_to_the_dtype_asked_for(tmp_path: Path) -> None:
    one = make_oracle("9_heads", tmp_path, dtype=torch.bfloat16)
    (prompt,) = seeded_prompts(one.vocab_size, [12])
    wanted = one.truth().logits(prompt)
    torch.testing.assert_close(logits_of(single_rank_groups(), tmp_path, prompt), wanted, atol=1e-4, rtol=0)


def test_more_ranks_than_heads_are_refused(oracle: MakeOracle) -> None:
    """`parallel.axes.head_share` raises; here, that nothing hides it."""
    with pytest.raises(ValueError, match="4 query heads cannot be shared over 5 ranks"):
        run_ranks(Topology(tp=5), read_report, oracle("moe_renormalised").folder)
