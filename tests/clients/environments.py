"""Environments of the clients that drive a running server: `python -m tests.clients.environments [NAME ...]` makes them.

Each client lives alone, since several of them ask for different versions of the same packages. They are kept in
MANTA_CLIENT_ENVIRONMENTS (a folder; default: the user's cache), and made once: an environment knows what it was asked to hold.
"""

import os
import subprocess
import sys
from pathlib import Path

PYTHON_CLIENTS: dict[str, tuple[str, ...]] = {
    "openai2": ("openai>=2,<3",),
    "openai3": ("openai>=3,<4",),
    "openai_agents": ("openai-agents",),
    "langchain": ("langchain-openai",),
    "litellm": ("litellm",),
    "pydantic_ai": ("pydantic-ai-slim[openai]",),
    "instructor": ("instructor",),
    "llama_index": ("llama-index-llms-openai-like",),
    "qwen_agent": ("qwen-agent", "soundfile", "python-dateutil", "tqdm"),
    "lm_eval": ("lm-eval[api]",),
    "aiperf": ("aiperf",),
    "guidellm": ("guidellm",),
    "k6": ("k6",),
}
NODE_CLIENTS: dict[str, tuple[str, ...]] = {
    "openai_node": ("openai",),
    "vercel_ai": ("ai", "@ai-sdk/openai-compatible"),
}
DONE = ".made-of"
"""File of an environment that is whole: the packages it was asked for."""


def folder() -> Path:
    return Path(os.environ.get("MANTA_CLIENT_ENVIRONMENTS") or Path.home() / ".cache/manta/clients")


def is_made(name: str) -> bool:
    asked = (PYTHON_CLIENTS | NODE_CLIENTS)[name]
    done = folder() / name / DONE
    return done.exists() and done.read_text().split() == list(asked)


def interpreter(name: str) -> list[str]:
    """The command that runs a script of this client."""
    return ["node"] if name in NODE_CLIENTS else [str(folder() / name / "bin/python")]


def make(name: str) -> None:
    """
    Raises:
        CalledProcessError: a package cannot be had.
    """
    place = folder() / name
    place.mkdir(parents=True, exist_ok=True)
    if name in NODE_CLIENTS:
        asked = NODE_CLIENTS[name]
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(place), *asked], check=True)
    else:
        asked = PYTHON_CLIENTS[name]
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(place / "bin/python"), "-m", "pip", "install", "--quiet", *asked], check=True)
    (place / DONE).write_text(" ".join(asked))


def main(names: list[str]) -> int:
    failed = []
    for name in names or [*PYTHON_CLIENTS, *NODE_CLIENTS]:
        if is_made(name):
            print(f"{name}: there already")
            continue
        try:
            make(name)
            print(f"{name}: made")
        except (subprocess.CalledProcessError, OSError) as error:
            failed.append(name)
            print(f"{name}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
