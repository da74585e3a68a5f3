"""What is known of a rank that ended, and whether its own words blame another."""

from typing import Any

import ray

from cluster.messages import RankFailed


def how_it_ended(life: Any) -> str:
    """``life``: ObjectRef of the call that lasts as long as a rank, and is over."""
    try:
        ray.get(life)
    except ray.exceptions.RayActorError as error:
        return f"its process died ({_first_line(error)})"
    except ray.exceptions.RayError as error:
        return _first_line(error)
    return "it left its loop"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def is_about_peers(failure: RankFailed | None) -> bool:
    """Whether a rank raised because it lost the connection to another, as gloo, NCCL and our own exchange report it."""
    text = failure.message.lower() if failure else ""
    return any(word in text for word in ("connection closed by peer", "connection reset", "broken pipe", "nccl", "gloo", "exchangefailed"))
