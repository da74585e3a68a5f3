"""Starting a rank: what it measures, reports and refuses."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import InvalidLogits, WorkersLost
from engine.plan import NewSequence, StepPlan, Work
from engine.request import SamplingParams
from engine.run.memory import NoRoomForKv, measure_capacity
from engine.run.process_executor import ProcessExecutor, assign_device
from engine.run.settings import RunnerConfig
from engine.run.start import StartProgress, resolve_device, resolve_dtype, start_rank
from engine.run.warm_up import full_step, run_once, warm_up
from model.config import ContextTooLong
from model.kv_cache import KvLayout
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.layout_check import InvalidLayout
from parallel.topology import Topology
from tests.engine.run.tiny_models import FLOAT32_BLOCK_BYTES, engine_config, float32_config, greedy
from tests.ranks import run_ranks

ALONE = {"topology": Topology(), "rank": 0, "rendezvous": None}


def start(folder: Path, runner_config: RunnerConfig, **more):
    settings = {"engine_config": engine_config(), **ALONE, **more}
    return start_rank(checkpoint_folder=folder, runner_config=runner_config, **settings)


def test_the_cache_fills_its_budget(dense_folder):
    with start(dense_folder, RunnerConfig(device="cpu", dtype="float32", kv_cache_bytes=10 * 4 * FLOAT32_BLOCK_BYTES - 1)) as runner:
        assert (runner.capacity.num_blocks, runner.capacity.block_tokens, runner.capacity.max_context_tokens) == (9, 4, 36)
        assert runner.cache.num_blocks == 9


def test_a_cache_is_never_larger_than_all_sequences_at_their_longest(dense_folder):
    with start(dense_folder, RunnerConfig(device="cpu", dtype="float32")) as runner:
        assert runner.capacity.num_blocks == 16 * 256 // 4
        assert runner.capacity.max_context_tokens == 256


def test_keys_and_values_in_fp8_take_a_quarter_of_float32(dense_folder):
    config = float32_config(num_blocks=20, block_tokens=4, kv_dtype="fp8", attention_backend="reference")
    with start(dense_folder, config) as runner:
        assert runner.cache.keys_NBGK[0].dtype == torch.float8_e4m3fn
        assert runner.capacity.num_blocks == 4 * 20


def test_a_backend_that_cannot_hold_fp8_is_refused_before_anything_is_loaded(dense_folder):
    wanted = "does not support a KV cache in torch.float8_e4m3fn; it computes in torch.float32"
    with pytest.raises(ValueError, match=wanted), start(dense_folder, float32_config(num_blocks=8, block_tokens=4, kv_dtype="fp8")):
        pass


def test_a_setting_caps_the_context(dense_folder):
    with start(dense_folder, float32_config(num_blocks=200, block_tokens=4, max_context_tokens=50)) as runner:
        assert runner.capacity.max_context_tokens == 50


def test_a_setting_that_would_raise_the_models_context_is_refused_before_anything_is_loaded(dense_folder, monkeypatch):
    monkeypatch.setattr("engine.run.start.Checkpoint", None)  # nothing is even opened
    config = float32_config(num_blocks=8, block_tokens=4, max_context_tokens=257)
    with pytest.raises(ContextTooLong, match="257 is more than the 256 tokens"), start(dense_folder, config):
        pass


def test_no_room_for_one_block_is_an_error_that_says_how_much_is_missing(dense_folder):
    config = RunnerConfig(device="cpu", dtype="float32", kv_cache_bytes=100)
    with pytest.raises(NoRoomForKv, match=f"{4 * FLOAT32_BLOCK_BYTES} bytes"), start(dense_folder, config):
        pass


def test_progress_goes_from_the_first_byte_to_the_warm_up(dense_folder):
    told: list[StartProgress] = []
    with start(dense_folder, float32_config(num_blocks=8, block_tokens=4), on_progress=told.append):
        pass
    phases = [progress.phase for progress in told]
    assert [phase for i, phase in enumerate(phases) if phase not in phases[:i]] == ["weights", "memory", "warm_up"]
    weights = [progress.done for progress in told if progress.phase == "weights"]
    assert weights == sorted(weights)
    assert weights[0] == 0
    assert weights[-1] == told[0].total > 0


def test_weights_that_overflow_are_found_before_any_request(dense_folder, tmp_path):
    shutil.copytree(dense_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InvalidLogits, match="weights are broken"), start(tmp_path, float32_config(num_blocks=8, block_tokens=4)):
        pass


@pytest.mark.parametrize(
    ("topology", "reason"),
    [(Topology(tp=5), "4 query heads"), (Topology(pp=3), "2 layers cannot fill 3 stages"), (Topology(tp=2, ep=2), "no routed experts")],
    ids=str,
)
def test_an_impossible_layout_is_refused_before_waiting_for_other_ranks(dense_folder, topology, reason):
    config = float32_config(num_blocks=8, block_tokens=4)
    with pytest.raises(InvalidLayout, match=reason), start(dense_folder, config, topology=topology, rendezvous="tcp://127.0.0.1:1"):
        pass


def test_more_real_tokens_than_rows_is_refused(dense_folder):
    config = RunnerConfig(device="cpu", num_real_tokens=301)
    with pytest.raises(ValueError, match="num_real_tokens=301 of a vocabulary of 300"), start(dense_folder, config):
        pass


def test_several_ranks_without_a_rendezvous_are_refused(dense_folder):
    with pytest.raises(ValueError, match="tcp://"), start(dense_folder, RunnerConfig(), topology=Topology(tp=2)):
        pass


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_the_smallest_caches_still_warm_up(dense_folder, num_blocks):
    with start(dense_folder, float32_config(num_blocks=num_blocks, block_tokens=4)) as runner:
        assert runner.capacity.max_context_tokens == 4 * num_blocks


def test_the_heaviest_step_fills_the_budget_and_leaves_nothing_open(dense_folder):
    plan = full_step(max_step_tokens=64, max_running=16, num_blocks=8, block_tokens=4)
    assert plan.num_tokens == 64
    assert len(plan.works) == 16
    with start(dense_folder, float32_config(num_blocks=8, block_tokens=4)) as runner:
        run_once(runner, plan)
        assert "0 open" in repr(runner)


def test_warm_up_steps_have_sequences_on_every_shard():
    plans = [full_step(max_step_tokens=64, max_running=16, num_blocks=8, block_tokens=4, num_shards=2)]
    runner = SimpleNamespace(capacity=SimpleNamespace(max_context_tokens=32, block_tokens=4, num_blocks=8), shard=1, run=plans.append)
    warm_up(runner)
    assert {opening.shard for opening in plans[0].opened} == {0, 1}
    for plan in plans:
        assert {work.sequence: work.shard for work in plan.works} == {o.sequence: o.shard for o in plan.opened} or plan.closed
        assert all(work.samples and not work.num_draft for work in plan.works)
    assert {work.shard for plan in plans[1:] for work in plan.works} == {1}


def test_auto_selects_the_device_of_the_machine():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("device", "count", "taken"),
    [("auto", 4, "cuda:1"), ("cuda", 2, "cuda:1"), ("auto", 1, "auto"), ("auto", 0, "auto"), ("cuda:3", 4, "cuda:3"), ("cpu", 4, "cpu")],
)
def test_ranks_of_one_host_are_distributed_over_its_devices(monkeypatch: pytest.MonkeyPatch, device: str, count: int, taken: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert assign_device(RunnerConfig(device=device), 5).device == taken


@pytest.mark.parametrize("changes", [{"kv_cache_bytes": 0}, {"num_threads": 0}, {"kv_memory_fraction": 1.1}, {"collective_timeout_s": 0}])
def test_an_invalid_setting_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        RunnerConfig(**changes)


class FakeModel:
    """The parts of a model that are read when memory is measured. The size of its blocks differs between ranks."""

    def __init__(self, rank: int) -> None:
        self.device = torch.device("cpu")
        self.kv_layout = KvLayout(num_layers=1 + rank, num_kv_heads=1, head_dim=8, block_tokens=4, dtype=torch.float32)
        self.config = SimpleNamespace(context_limit=lambda lowered_to: lowered_to or 1000)


def _capacity(groups: ParallelGroups, budget: int):
    config = RunnerConfig(kv_cache_bytes=budget)
    return measure_capacity(
        FakeModel(groups.rank), None, runner_config=config, engine_config=engine_config(), groups=groups, ranks_sharing_memory=2
    )


def test_ranks_agree_on_what_the_smallest_can_hold():
    capacities = run_ranks(Topology(tp=2), _capacity, 256 * 2 * 7)
    assert [capacity.num_blocks for capacity in capacities] == [7, 7]


@pytest.mark.parametrize(("fraction", "budget"), [(None, 96_000), (0.5, 160_000)])
def test_replicas_on_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch, fraction: float | None, budget: int) -> None:
    monkeypatch.setattr("engine.run.memory.available_memory_bytes", lambda: 320_000)
    config, groups = RunnerConfig(kv_memory_fraction=fraction), single_rank_groups()
    for sharers in (1, 2, 5):
        alike = {"runner_config": config, "engine_config": engine_config(), "groups": groups}
        capacity = measure_capacity(FakeModel(0), None, **alike, ranks_sharing_memory=sharers)
        assert capacity.num_blocks == budget // sharers // 256


def _refusal(groups: ParallelGroups, budget: int) -> str:
    with pytest.raises(NoRoomForKv) as caught:
        _capacity(groups, budget)
    return str(caught.value)


def test_no_room_on_one_rank_is_an_error_on_all():
    for refusal in run_ranks(Topology(tp=2), _refusal, 300):
        assert "needs 512 bytes on a rank and 300 are free" in refusal


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(pp=2)], ids=str)
def test_two_processes_answer_as_one(dense_folder, topology):
    from transformers import AutoModelForCausalLM

    prompt, blocks = tuple(range(3, 30)), tuple(range(9))
    oracle = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32).eval()
    executor = ProcessExecutor(
        checkpoint_folder=dense_folder,
        topology=topology,
        runner_config=float32_config(num_blocks=16, block_tokens=4),
        engine_config=engine_config(),
    )
    try:
        opening = NewSequence(0, 0, len(prompt), SamplingParams(temperature=0.0))
        tokens, answer = prompt, []
        for step in range(6):
            start = 0 if step == 0 else len(prompt) + len(answer) - 1
            work = Work(0, start, tokens, blocks if step == 0 else (), True)
            result = executor.submit(StepPlan(step, (work,), (opening,) if step == 0 else ())).result()
            tokens = result.sampled[0].tokens
            answer += tokens
        for pid in executor.pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkersLost, match=r"rank \d on .* ended"):
            executor.wait_for(6)
    finally:
        executor.close()
    with pytest.raises(WorkersLost, match="have been ended"):
        executor.wait_for(6)
    assert tuple(answer) == greedy(oracle, prompt, 6)


def test_an_unsupported_model_is_named(dense_folder, tmp_path):
    raw = json.loads((dense_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(ValueError, match="LlamaForCausalLM"), start(tmp_path, RunnerConfig()):
        pass
