"""Which Manta this is."""

from importlib import metadata


def version() -> str:
    try:
        return metadata.version("manta")
    except metadata.PackageNotFoundError:  # a checkout on sys.path, as `ray job submit --working-dir .` has it
        return "0+checkout"
