"""Two raylets, one replica over both: what must share a host does, and what lies on the other answers."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import ray._private.state
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.util.placement_group import placement_group_table
from transformers import AutoModelForCausalLM

from cluster import replica as replica_module
from cluster.channel import PrivateFolder
from cluster.config import RankResources, ReplicaConfig
from cluster.directory import directory_actor, end_directory
from cluster.errors import StartFailed
from cluster.executor import RayExecutor
from cluster.placement_group import ReplicaPlacementGroup
from cluster.replica import Replica
from cluster.worker import ModelRankLauncher, RankLauncher
from engine.config import EngineConfig
from engine.errors import WorkersLost
from engine.plan import StepPlan, Work
from engine.request import Request, SamplingParams
from parallel.topology import Topology
from tests.cluster.conftest import ROOT
from tests.cluster.fake_ranks import CRASH, FakeRankLauncher
from tests.cluster.fronts import answer, front
from tests.engine.run.tiny_models import NUM_REAL_TOKENS, float32_config, greedy, write_dense, write_moe

CPUS = (3, 2)
"""Of the two hosts: the first has room for a replica's engine beside two ranks."""
ADDRESSES = ("127.0.0.2", "127.0.0.3")
START_S = 300.0
ENGINE = EngineConfig(max_step_tokens=64)
CONFIG = ReplicaConfig(first_step_timeout_s=120, step_timeout_s=60, drain_timeout_s=2)
GREEDY = Request(id="greedy", prompt=tuple(range(5, 45)), sampling=SamplingParams(temperature=0.0, max_tokens=24))


@pytest.fixture(scope="module")
def two_raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As `own_ray`, with a second host. Each has a loopback address of its own (that of 127.0.0.1 Ray would take for another)."""
    from ray.cluster_utils import Cluster

    tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_AUTH_TOKEN_PATH", os.path.join(folder, "no-token"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "300")
        patch.setenv("RAY_TMPDIR", folder)  # the cluster writes its address there, in a folder that others make
        os.mkdir(os.path.join(folder, "ray"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        place = {"temp_dir": folder, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        cluster = Cluster()
        try:
            for address, cpus in zip(ADDRESSES, CPUS, strict=True):
                cluster.add_node(wait=False, num_cpus=cpus, node_ip_address=address, **place)
                cluster.wait_for_nodes(START_S)
            ray.init(address=cluster.address, log_to_driver=False, _node_ip_address=ADDRESSES[0])
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


pytestmark = [pytest.mark.system, pytest.mark.timeout(900), pytest.mark.usefixtures("two_raylets")]


@contextmanager
def running(launcher: RankLauncher, app: str, resources: RankResources) -> Iterator[Replica]:
    replica = Replica(id=app, app=app, model="tiny", launcher=launcher, engine_config=ENGINE, resources=resources, config=CONFIG)
    replica.start()
    try:
        yield replica
    finally:
        replica.close(drain=False)


def hosts_of(replica: Replica) -> list[str]:
    """Of every rank the raylet under which it runs, as it says itself, and as Ray has placed its bundle."""
    assert replica._executor is not None
    assert replica._placement_group is not None
    nodes = [place.node for place in replica._executor.locations]
    placed = placement_group_table(replica._placement_group.group)["bundles_to_node_id"]
    assert set(nodes) <= set(placed.values())
    return nodes


def letters(nodes: list[str]) -> str:
    """a, b, a: who is with whom, whatever the names are."""
    names = list(dict.fromkeys(nodes))
    return "".join("ab"[names.index(node)] for node in nodes)


TWO_PER_HOST = RankResources(cpus=1)
ONE_PER_HOST = RankResources(cpus=2)


@pytest.mark.parametrize(
    ("topology", "resources", "together"),
    [
        pytest.param(Topology(pp=2), ONE_PER_HOST, "ab", id="stages"),
        pytest.param(Topology(dp=2), ONE_PER_HOST, "ab", id="shards"),
        pytest.param(Topology(tp=2, pp=2), TWO_PER_HOST, "aabb", id="a stage's heads within a host"),
        pytest.param(Topology(tp=2, dp=2, ep=4), TWO_PER_HOST, "aabb", id="a shard's heads within a host, its experts over both"),
        pytest.param(Topology(dp=4, ep=2), TWO_PER_HOST, "aabb", id="ranks that share an expert within a host"),
        pytest.param(Topology(tp=2), RankResources(cpus=2, ranks_per_host=1), "ab", id="heads over hosts, if that is asked for"),
        pytest.param(Topology(tp=3), RankResources(cpus=1.1, ranks_per_host=2), "aab", id="unevenly"),
    ],
)
def test_ranks_land_as_planned(topology: Topology, resources: RankResources, together: str) -> None:
    with running(FakeRankLauncher(topology=topology), "landing", resources) as replica:
        assert letters(hosts_of(replica)) == together


@pytest.mark.parametrize("resources", [RankResources(cpus=2, one_host=True), RankResources(cpus=2)], ids=["one_host", "tensor parallel"])
def test_who_must_share_a_host_waits_rather_than_being_torn_apart(resources: RankResources, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four CPUs are free, but no host has them all."""
    monkeypatch.setattr(replica_module, "PLACEMENT_TIMEOUT_S", 3.0)
    topology = Topology(pp=2) if resources.one_host else Topology(tp=2)
    with pytest.raises(StartFailed, match="could not set aside"), running(FakeRankLauncher(topology=topology), "torn", resources):
        pass


LAYOUTS = [
    pytest.param("dense", Topology(tp=2, pp=2), TWO_PER_HOST, id="stages of two"),
    pytest.param("dense", Topology(tp=3), RankResources(cpus=1.1, ranks_per_host=2), id="three ranks share two KV heads over hosts"),
    pytest.param("moe", Topology(tp=2, dp=2, ep=4), TWO_PER_HOST, id="experts over both"),
]


@pytest.mark.parametrize(("kind", "topology", "resources"), LAYOUTS)
async def test_one_replica_over_both_answers_as_transformers(
    kind: str, topology: Topology, resources: RankResources, tmp_path: Path
) -> None:
    checkpoint = (write_dense if kind == "dense" else write_moe)(tmp_path, num_hidden_layers=2)
    runner = float32_config(num_blocks=64, block_tokens=16)
    launcher = ModelRankLauncher(checkpoint_folder=checkpoint, topology=topology, runner_config=runner, engine_config=ENGINE)
    app = f"over-both-{kind}-{topology.size}-{topology.tp}"
    with running(launcher, app, resources) as replica:
        assert len(set(hosts_of(replica))) == 2
        async with front(app) as router:
            tokens = await answer(router, GREEDY)
    assert max(GREEDY.prompt) < NUM_REAL_TOKENS
    assert tokens == list(greedy(AutoModelForCausalLM.from_pretrained(checkpoint), GREEDY.prompt, 24))


def test_a_rank_that_crashes_on_the_other_host_leaves_word_too() -> None:
    """And so it is blamed for its end, and with it the request that it was at."""
    launcher = FakeRankLauncher(topology=Topology(pp=2))
    folder, placement_group = PrivateFolder(), ReplicaPlacementGroup.current_or_new(launcher, ONE_PER_HOST, timeout_s=30)
    try:
        executor = RayExecutor(launcher=launcher, resources=ONE_PER_HOST, config=CONFIG, placement_group=placement_group, folder=folder)
        try:
            far = executor.locations[1]
            assert far.crash_report_file is not None, "it is on the other host than this process"
            crash = StepPlan(0, (Work(sequence=0, start=0, tokens=(CRASH,), new_blocks=(), samples=True),))
            with pytest.raises(WorkersLost, match=r"rank 1 .*Segmentation fault") as caught:
                executor.submit(crash).result()
            assert "fake_ranks.py" in (caught.value.rank_traceback or "")
            assert not caught.value.from_outside
            assert not Path(far.crash_report_file).exists()
        finally:
            executor.close()
    finally:
        placement_group.close()
        folder.close()


def test_the_directory_is_lost_with_no_host_but_the_heads() -> None:
    directory = directory_actor("somewhere")
    ray.get(directory.records.remote())
    placed = ray._private.state.actors(directory._actor_id.hex())["Address"]["NodeID"]
    assert [node["NodeID"] for node in ray.nodes() if HEAD_NODE_RESOURCE_NAME in node["Resources"]] == [placed]
    end_directory("somewhere")
