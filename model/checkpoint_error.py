"""The error for damaged checkpoint files. Does not import torch: fronts read a checkpoint's small files, but no tensors."""

from functools import partial
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint folder is not what it should be. ``file`` and, if it is about one, ``tensor`` say where."""

    def __init__(self, message: str, *, file: Path | str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.file, self.tensor = str(file), tensor
        """``file`` is a path, or the URL of a remote file."""

    def __reduce__(self) -> tuple[partial["CheckpointError"], tuple[str]]:
        """Pickle the fields, so that a rank's error can reach another process."""
        return partial(CheckpointError, file=self.file, tensor=self.tensor), (str(self),)


def byte_count(number: int) -> str:
    """``1 byte``, ``2 bytes``. (`engine.counted`, which writes any number of things, is in a package that this one does not import.)"""
    return "1 byte" if number == 1 else f"{number} bytes"
