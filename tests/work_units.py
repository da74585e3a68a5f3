"""How `make test` divides the tests between two processes: all that start Ray in one, and the other files wherever there is room."""

import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

RAY = "everything that starts Ray"


class FilesAndRay(LoadScopeScheduling):
    """A file is never divided, because its tests share servers and models. No two processes have a Ray at the same time.

    Starting and ending Ray's processes is most of what those tests wait for, and while they wait, the others compute.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return RAY if starts_ray(file) else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        if RAY in self.workqueue:  # first, because it is the largest; the others follow by the number of their tests
            self.workqueue.move_to_end(RAY, last=False)
        super()._assign_work_unit(node)


@cache
def starts_ray(file: str) -> bool:
    """Whether a test file, relative to the repository's root, starts Ray, or makes the demo model, which one process should do."""
    return bool(re.search(r"\bown_ray\b|mark\.system\b|\bdemo_folder\b", (Path(__file__).parents[1] / file).read_text()))
