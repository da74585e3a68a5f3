"""What is wrong with a checkpoint's files. Without torch: fronts read a checkpoint's small files, and have no tensors."""

from functools import partial
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint folder is not what it should be. ``file`` and, where it is about one, ``tensor`` say where."""

    def __init__(self, message: str, *, file: Path | str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file, self.tensor = str(file), tensor
        """``file`` is a path, or a URL where the checkpoint is elsewhere."""

    def __reduce__(self) -> tuple[partial["CheckpointError"], tuple[str]]:
        """Pickled by its fields, so that a rank's error can reach another process."""
        return partial(CheckpointError, file=self.file, tensor=self.tensor), (str(self),)
