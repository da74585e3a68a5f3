"""The engines beside which Manta is measured: which of them runs what, and what vLLM is given for int8."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.checkpoints import SHAPES
from benchmarks.peers import vllm_cpu
from benchmarks.run import FORMATS, PEERS, ROOT, peers_of
from tests.engine.run.tiny_models import write_dense


def test_vllms_int8_is_the_checkpoint_rounded_output_by_output(tmp_path: Path) -> None:
    source = write_dense(tmp_path)
    folder = vllm_cpu.converted(source, "int8")
    plain, stored = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    rounded = {name for name in plain if name.endswith("_proj.weight")}
    assert len(rounded) == 2 * 7
    assert stored.keys() == plain.keys() | {f"{name}_scale" for name in rounded}
    for name, tensor in plain.items():
        if name not in rounded:
            assert torch.equal(stored[name], tensor), name
            continue
        scale = stored[f"{name}_scale"]
        assert stored[name].dtype == torch.int8
        assert scale.shape == (len(tensor), 1)
        assert ((stored[name] * scale - tensor).abs() <= 0.501 * scale).all(), name
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config") == vllm_cpu.QUANTIZATION
    assert config == json.loads((source / "config.json").read_text())
    assert not (source / "vllm-int8.part").exists()


def test_what_is_there_is_not_written_again_and_bf16_is_the_checkpoint_itself(tmp_path: Path) -> None:
    source = write_dense(tmp_path)
    written = (vllm_cpu.converted(source, "int8") / "model.safetensors").stat()
    assert (vllm_cpu.converted(source, "int8") / "model.safetensors").stat() == written
    assert vllm_cpu.converted(source, "bf16") == source
    with pytest.raises(AssertionError, match="W8A8"):
        vllm_cpu.converted(source, "int4")


@pytest.mark.parametrize(
    ("shape", "form", "expected"),
    [
        ("dense", "bf16", ["transformers_eager", "llama_cpp", "openvino", "vllm_cpu"]),
        ("dense", "int8", ["llama_cpp", "openvino", "onnxruntime_genai", "vllm_cpu"]),
        ("dense", "int4", ["llama_cpp", "openvino", "onnxruntime_genai"]),
        ("moe", "bf16", ["transformers_eager", "llama_cpp", "openvino", "vllm_cpu"]),
        ("moe", "int8", ["llama_cpp", "openvino"]),
        ("moe", "int4", ["llama_cpp"]),
    ],
)
def test_each_runs_what_it_has(shape: str, form: str, expected: list[str]) -> None:
    assert peers_of([f"{name}=python" for name in PEERS], shape, form) == [(name, "python") for name in expected]


def test_make_bench_peers_names_every_one_and_each_is_a_file() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name, shapes in PEERS.items():
        assert f"--peer {name}=" in makefile
        assert (ROOT / "benchmarks" / "peers" / f"{name}.py").exists()
        assert shapes.keys() <= SHAPES.keys()
        assert all(set(forms) <= set(FORMATS) for forms in shapes.values())
