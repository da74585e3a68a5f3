"""``python -m serve`` is `manta`, for checkouts that are not installed (``ray job submit --working-dir . -- python -m serve ...``)."""

from serve.cli import main

if __name__ == "__main__":
    main()
