"""The Ray placement group of a replica and its ranks: the group of the actor that it runs in, or a new one."""

import ray
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group, remove_placement_group

from cluster import placement
from cluster.config import RankResources
from cluster.errors import StartFailed
from cluster.worker import RankLauncher


class ReplicaPlacementGroup:
    """Outlives the ranks, so that new ranks start in the bundles of the lost ones."""

    def __init__(self, group: PlacementGroup, *, owned: bool) -> None:
        self.group, self._owned = group, owned

    @classmethod
    def current_or_new(cls, launcher: RankLauncher, resources: RankResources, *, timeout_s: float) -> "ReplicaPlacementGroup":
        """The placement group of the current actor (which must come from `placement.bundles`), or a new one if it has none.

        Raises:
            StartFailed: the cluster could not reserve the resources within ``timeout_s``.
        """
        current = get_current_placement_group()
        if current is not None:
            return cls(current, owned=False)
        wanted = placement.bundles(launcher.topology, resources)
        group = placement_group(wanted, strategy=placement.strategy(resources))
        if not group.wait(timeout_s):
            remove_placement_group(group)
            raise StartFailed(f"the cluster could not set aside {wanted} within {timeout_s:g} s; it has {ray.cluster_resources()}")
        return cls(group, owned=True)

    def close(self) -> None:
        if self._owned:
            remove_placement_group(self.group)
            self._owned = False
