"""Ray Serve's autoscaling policy for engine replicas: `cluster.autoscaling`, fed from the directory.

Ray Serve's controller calls it about ten times a second and must not be kept waiting, so a thread beside asks the directory.
Like the decisions it travels by value: see there.
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
"""Nothing is decided on what was seen longer ago."""

ray.cloudpickle.register_pickle_by_value(cluster.autoscaling)


class ReplicaAutoscaler:
    """A policy object of Ray Serve, one for each deployment. Without news it leaves everything as it is."""

    def __init__(self, *, model: str, max_running: int, config: Mapping[str, Any]) -> None:
        self.model = model
        self.app: str | None = None
        """Known once the controller has asked."""
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
        """Raises what Ray raises while the directory is away."""
        if self.app is None:
            return
        actor: Any = ray.get_actor(f"replica-directory:{self.app}", namespace=NAMESPACE)
        told: Any = ray.get(actor.demand.remote(self.model), timeout=MAX_AGE_S)
        self._seen = (time.monotonic(), parse_demand(told))


def _poll_forever(reference: "weakref.ref[ReplicaAutoscaler]") -> None:
    """As long as the policy is used."""
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
    """For the deployment's options. Ray Serve adds no delays of its own: the policy has its."""
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
