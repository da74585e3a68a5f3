"""The policy as Ray Serve has it: carried by value to a place without Manta, and careful where it knows nothing."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.autoscaler import MAX_AGE_S, ReplicaAutoscaler, serve_autoscaling
from cluster.autoscaling import AutoscalingConfig, Demand

ELSEWHERE = """
import sys, ray.cloudpickle
policy = ray.cloudpickle.loads(open(sys.argv[1], "rb").read())
config = {"scale_down_after_s": 1.0}
made = policy(model="m", max_running=4, config=config)
assert made._decider.config.scale_down_after_s == 1.0
assert not [name for name in sys.modules if name.split(".")[0] in ("cluster", "engine", "serve")], sys.modules
print("made")
"""


@dataclass
class Context:
    app_name: str = "manta"
    target_num_replicas: int = 3
    capacity_adjusted_min_replicas: int = 0
    capacity_adjusted_max_replicas: int = 5


def policy() -> ReplicaAutoscaler:
    return ReplicaAutoscaler(model="m", max_running=4, config={})


def test_without_news_everything_stays_as_it_is() -> None:
    decides = policy()
    assert decides(Context())[0] == 3
    decides._seen = (time.monotonic() - MAX_AGE_S - 1, Demand(num_held=99))
    assert decides(Context())[0] == 3


def test_with_news_it_decides_within_the_bounds_of_the_deployment() -> None:
    decides = policy()
    decides._seen = (time.monotonic(), Demand(num_held=99))
    assert decides(Context())[0] == 5


def test_it_can_be_made_where_no_module_of_manta_is(tmp_path: Path) -> None:
    config = serve_autoscaling(AutoscalingConfig(), model="m", max_running=4, least=0, most=2, initial=0)
    file = tmp_path / "policy"
    file.write_bytes(config.policy.get_serialized_policy_def())
    done = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, str(file)], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.stdout == "made\n", done.stderr
    assert (config.min_replicas, config.max_replicas, config.initial_replicas) == (0, 2, 0)
