"""Peak host memory of a whole start: a rank's share of the weights, its KV cache, and less than 1 GiB.

Real widths and vocabularies, weights of some GB in a sparse file (all 0), one process per rank.
"""

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.run.process_executor import ProcessExecutor
from engine.run.settings import RunnerConfig
from parallel.topology import Topology
from serve.planning.formats import BF16, INT4, INT8, STORED_INT4_ZEROS, Format
from serve.planning.shape import shape_of_checkpoint
from serve.planning.weights import weights_of_rank
from tests.hollow_model import SIZE_7B, SIZE_57B_A14B, write_hollow
from tests.model.quantise_checkpoint import AWQ

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

GIB = 2**30
KV_BYTES = 2**24
VOCAB_7B = 152_064
MODELS = {
    "7B": {**SIZE_7B, "num_hidden_layers": 4, "vocab_size": VOCAB_7B},
    "57B-A14B": {**SIZE_57B_A14B, "num_hidden_layers": 1, "vocab_size": 32_000},
}
FORMATS: dict[str, tuple[Format, dict[str, str]]] = {
    "bfloat16": (BF16, {"dtype": "bfloat16"}),
    "float32": (BF16, {"dtype": "float32"}),
    "int8": (INT8, {"dtype": "float32", "quantize": "int8"}),
    "int8, rounded activations": (INT8, {"quantize": "int8"}),
    "int4": (INT4, {"dtype": "float32", "quantize": "int4"}),
    "AWQ": (STORED_INT4_ZEROS, {"dtype": "float32"}),
}
"""The planner's estimate, and the settings. Weights stored in bfloat16 are held so, even with float32 sums."""


def peak_bytes(pid: int) -> int:
    """VmHWM, see proc(5): the peak memory of the process, libraries included."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("model", "topology"), [("7B", Topology(tp=2)), ("57B-A14B", Topology(tp=2, ep=2))], ids=str)
def test_a_rank_needs_less_than_a_gib_beside_its_share(model: str, topology: Topology, format: str, tmp_path: Path) -> None:
    planned, settings = FORMATS[format]
    stored = {"quantization_config": AWQ | {"group_size": 128}} if planned is STORED_INT4_ZEROS else {}
    folder = write_hollow(tmp_path, **MODELS[model], **stored)
    shape = shape_of_checkpoint(folder, name=model)
    executor = ProcessExecutor(
        checkpoint_folder=folder,
        topology=topology,
        engine_config=EngineConfig(max_step_tokens=64, max_running=4),
        runner_config=RunnerConfig(device="cpu", num_threads=1, kv_cache_bytes=KV_BYTES, **settings),
    )
    try:
        for rank, pid in enumerate(executor.pids):
            share = weights_of_rank(shape, topology, topology.coordinates(rank), planned).num_bytes
            beside = peak_bytes(pid) - share - KV_BYTES
            print(f"{model}, {topology}, {format}: rank {rank} holds {share / GIB:.2f} GiB, and {beside / GIB:.2f} GiB beside it at most")
            assert beside < GIB
    finally:
        executor.close()
