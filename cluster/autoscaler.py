"""Ray Serve's autoscaling policy for engine replicas: runs `cluster.autoscaling` on the demand that the directory knows.

Ray Serve's controller calls the policy about ten times a second and must not block, so a thread polls the directory. Like
`cluster.autoscaling` the policy is pickled by value, see there.
"""

import logging
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

import ray
import ray.cloudpickle
from ray.serve.config import AutoscalingConfig as ServeAutoscalingConfig
from ray.serve.config import AutoscalingPolicy

import cluster.autoscaling
from cluster.autoscaling import AutoscalingConfig, Decider, Demand, parse_demand

NAMESPACE = "manta"
POLL_INTERVAL_S = 0.5
MAX_AGE_S = 5.0
"""With a demand older than this the policy keeps the number of replicas."""

ray.cloudpickle.register_pickle_by_value(cluster.autoscaling)


class ReplicaAutoscaler:
    """The policy object of one deployment. Without a recent demand it changes nothing."""

    def __init__(self, *, model: str, max_running: int, config: Mapping[str, Any]) -> None:
        self.model = model
        self.app: str | None = None
        """Set when the controller first calls the policy."""
        self._decider = Decider(config=AutoscalingConfig(**config), max_running=max_running)
        self._seen: tuple[float, Demand] | None = None
        threading.Thread(target=_poll_forever, args=(weakref.ref(self),), name="autoscaler", daemon=True).start()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        self.app = context.app_name
        now, target = time.monotonic(), context.target_num_replicas
        seen = self._seen
        if seen is None or now - seen[0] > MAX_AGE_S:
            return target, {}
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return self._decider.decide(seen[1], target=target, now=now, least=least, most=most), {}

    def refresh(self) -> None:
        """Read the demand from the directory. Raises Ray's errors if the directory is away."""
        if self.app is None:
            return
        actor: Any = ray.get_actor(f"replica-directory:{self.app}", namespace=NAMESPACE)
        reply: Any = ray.get(actor.demand.remote(self.model), timeout=MAX_AGE_S)
        self._seen = (time.monotonic(), parse_demand(reply))


def _poll_forever(reference: "weakref.ref[ReplicaAutoscaler]") -> None:
    """Poll until the policy has been garbage-collected."""
    while (policy := reference()) is not None:
        try:
            policy.refresh()
        except Exception as error:
            logging.getLogger("ray.serve").debug("the directory cannot be asked: %s", error)
        del policy
        time.sleep(POLL_INTERVAL_S)


def serve_autoscaling(
    config: AutoscalingConfig, *, model: str, max_running: int, least: int, most: int, initial: int
) -> ServeAutoscalingConfig:
    """Ray Serve's autoscaling options of a deployment. Its own delays are 0, because the policy has delays of its own."""
    settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return ServeAutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        initial_replicas=initial,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=AutoscalingPolicy(
            policy_function="cluster.autoscaler.ReplicaAutoscaler",
            policy_kwargs={"model": model, "max_running": max_running, "config": settings},
        ),
    )
