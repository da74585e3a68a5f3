"""Checkpoints that are stored quantised: decoded as by other libraries, held without loss, refused if they are damaged."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.run.settings import RunnerConfig
from engine.run.start import choose_weight_formats
from model.checkpoint import SINGLE_FILE, Checkpoint, write_checkpoint
from model.checkpoint_error import CheckpointError
from model.config import ModelConfig
from model.load import CheckpointMismatch, check_checkpoint
from model.quantisation import Quantisation
from model.quantised_tensor import dequantised_tensors
from parallel.native.linear import unpack
from parallel.packed_format import PackedFormat
from parallel.quantised_format import QuantisedFormat
from parallel.quantised_format import unpack as unpack_scaled
from parallel.topology import Topology
from parallel.weight_format import WeightFormat
from tests.model.driver import CPU, logits_of, read_report, seeded_prompts
from tests.model.oracle import make_oracle
from tests.model.quantise_checkpoint import AWQ, GPTQ, GPTQ_INT8, quantise, store_quantised
from tests.ranks import run_ranks

BY_OTHERS = Path(__file__).with_name("reference_quantised.safetensors")
FLOAT = torch.float32
ACT_ORDER = GPTQ | {"desc_act": True, "sym": False}
ASYMMETRIC = GPTQ | {"sym": False, "group_size": 128}
V2 = GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Mapping[str, Any]], tuple[Path, Path]]:
    """For a shape in `tests.model.oracle.SHAPES` and a `quantization_config`: the quantised folder, and the decoded one."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(shape: str, config: Mapping[str, Any]) -> tuple[Path, Path]:
        key = f"{shape} {json.dumps(config)}"
        if key not in made:
            folder = tmp_path_factory.mktemp("quantised")
            oracle = make_oracle(shape, folder / "source")
            store_quantised(oracle.folder, folder / "stored", folder / "plain", config)
            made[key] = folder / "stored", folder / "plain"
        return made[key]

    return of


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq4", GPTQ),
        ("gptq4", GPTQ | {"sym": False}),
        ("gptq4_act_order", ACT_ORDER),
        ("gptq8", GPTQ_INT8),
        ("awq4", AWQ),
        ("awq4", AWQ | {"version": "GEMM"}),
    ],
)
def test_matrices_are_decoded_as_their_own_packages_do(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    tensors = {part: tensor for part, tensor in load_file(BY_OTHERS).items() if part.startswith(f"{name}.")}
    decoded = tensors.pop(f"{name}.decoded")
    write_checkpoint(tmp_path, tensors, {})
    with Checkpoint(tmp_path) as checkpoint:
        (matrix,) = dequantised_tensors(checkpoint.tensors, Quantisation.from_dict(config | {"group_size": 16})).values()
        assert (matrix.name, matrix.shape, matrix.dtype) == (f"{name}.weight", tuple(decoded.shape), FLOAT)
        assert matrix.num_bytes == checkpoint.num_bytes
        assert torch.equal(matrix.read(), decoded)
        for outputs, inputs in (
            (slice(0, 8), slice(8, 24)),
            (slice(5, 18), slice(3, 31)),
            (slice(31, 32), slice(17, 18)),
            (slice(4, 4), slice(0, 9)),
        ):
            assert torch.equal(matrix.read(outputs, inputs), decoded[outputs, inputs])


@pytest.mark.parametrize("config", [GPTQ, V2, ACT_ORDER, GPTQ_INT8, GPTQ | {"group_size": -1}, AWQ | {"group_size": 64}], ids=str)
def test_gptq_v2_and_all_other_formats_decode_to_what_was_stored(config: dict[str, Any], tmp_path: Path) -> None:
    parts, decoded = quantise(torch.randn(48, 192), config)
    write_checkpoint(tmp_path, {f"x.{part}": tensor for part, tensor in parts.items()}, {})
    with Checkpoint(tmp_path) as checkpoint:
        (matrix,) = dequantised_tensors(checkpoint.tensors, Quantisation.from_dict(config)).values()
        assert torch.equal(matrix.read(), decoded)
        assert torch.equal(matrix.read(slice(3, 40), slice(50, 133)), decoded[3:40, 50:133])


LAYOUTS = [Topology(), Topology(tp=2), Topology(tp=3), Topology(pp=2)]


@pytest.mark.parametrize("topology", LAYOUTS, ids=str)
@pytest.mark.parametrize("config", [GPTQ, ACT_ORDER, AWQ], ids=lambda config: f"{config['quant_method']} {config.get('desc_act')}")
def test_a_quantised_checkpoint_answers_as_its_decoded_weights(
    config: dict[str, Any], topology: Topology, folders: Callable[..., tuple[Path, Path]]
) -> None:
    stored, plain = folders("grouped", config)
    (prompt,) = seeded_prompts(101, [9])
    found, wanted = (run_ranks(topology, logits_of, folder, prompt) for folder in (stored, plain))
    assert torch.equal(found[-1], wanted[-1])


@pytest.mark.parametrize(
    ("shape", "config", "format", "topology"),
    [
        *(("grouped", GPTQ, PackedFormat("int4", FLOAT), topology) for topology in LAYOUTS),
        ("grouped", GPTQ, QuantisedFormat("int4", FLOAT), Topology(tp=2)),
        ("grouped", GPTQ | {"group_size": -1}, PackedFormat("int8", FLOAT), Topology()),
        ("grouped", GPTQ_INT8, PackedFormat("int8", FLOAT), Topology(tp=3)),
        ("grouped", GPTQ_INT8, QuantisedFormat("int8", FLOAT), Topology()),
        ("grouped", AWQ, PackedFormat("int8", FLOAT), Topology()),
        ("grouped", AWQ, PackedFormat("int4_zeros", FLOAT), Topology(tp=2)),
        ("grouped", AWQ, QuantisedFormat("int4_zeros", FLOAT), Topology(tp=2)),
        ("grouped", ASYMMETRIC, PackedFormat("int4_zeros", FLOAT), Topology()),
        ("grouped_moe", GPTQ, PackedFormat("int4", FLOAT), Topology()),
        ("grouped_moe", GPTQ, PackedFormat("int4", FLOAT), Topology(tp=2, ep=2)),
        ("grouped_moe", AWQ, PackedFormat("int4_zeros", FLOAT), Topology(tp=2, ep=2)),
    ],
    ids=str,
)
def test_held_in_few_bits_nothing_is_lost(
    shape: str, config: dict[str, Any], format: WeightFormat, topology: Topology, folders: Callable[..., tuple[Path, Path]]
) -> None:
    """Compared with float32 products of the decoded weights: only the order of sums differs. Rounding would be a hundred times as much."""
    stored, plain = folders(shape, config)
    (prompt,) = seeded_prompts(101, [9])
    found = run_ranks(topology, logits_of, stored, prompt, FLOAT, format)[-1]
    wanted = run_ranks(topology, logits_of, plain, prompt)[-1]
    assert torch.allclose(found, wanted, rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (GPTQ, "int4"),
        (GPTQ | {"group_size": 128}, "int4"),
        (GPTQ_INT8, "int8"),
        (AWQ, "int8"),
        (AWQ, "int4_zeros"),
        (ASYMMETRIC, "int4_zeros"),
    ],
)
def test_every_weight_is_held_as_it_was_stored(config: dict[str, Any], kind: Any) -> None:
    torch.manual_seed(1)
    _, decoded = quantise(torch.randn(200, 384) * 0.05, config)
    held = PackedFormat(kind, FLOAT)
    packed = held.packed(held.prepare({"weight": decoded.clone()}))
    assert torch.equal(unpack(packed), decoded)
    assert torch.equal(unpack_scaled(QuantisedFormat(kind, FLOAT).prepare({"weight": decoded.clone()})), decoded)


def test_groups_that_cross_each_other_lose_a_little(folders: Callable[..., tuple[Path, Path]]) -> None:
    """Groups of 48, and ours of 128."""
    stored, plain = folders("grouped", AWQ | {"group_size": 48})
    (prompt,) = seeded_prompts(101, [9])
    found = run_ranks(Topology(tp=2), logits_of, stored, prompt, FLOAT, PackedFormat("int8", FLOAT))[-1]
    wanted = run_ranks(Topology(tp=2), logits_of, plain, prompt)[-1]
    assert 1e-4 < (found - wanted).abs().max() < 0.2 * wanted.std()


@pytest.mark.parametrize(
    ("config", "quantize", "kind"),
    [
        (GPTQ, None, "int4"),
        (GPTQ | {"group_size": 128}, None, "int4"),
        (GPTQ | {"group_size": -1}, None, "int4"),
        (GPTQ | {"group_size": 48}, None, "int8"),
        (GPTQ | {"sym": False}, None, "int8"),
        (ASYMMETRIC, None, "int4_zeros"),
        (GPTQ | {"desc_act": True}, None, "int8"),
        (GPTQ_INT8, None, "int8"),
        (AWQ, None, "int4_zeros"),
        (AWQ | {"group_size": 128}, None, "int4_zeros"),
        (AWQ | {"group_size": 64}, None, "int8"),
        (AWQ, "int4", "int4"),
        (AWQ, "int8", "int8"),
        (GPTQ, "int8", "int8"),
    ],
)
def test_they_are_held_in_the_fewest_bits_that_lose_nothing_unless_told_otherwise(
    config: dict[str, Any], quantize: Any, kind: Any, folders: Callable[..., tuple[Path, Path]]
) -> None:
    stored, plain = folders("grouped", config)
    runner_config = RunnerConfig(dtype="float32", quantize=quantize)
    with Checkpoint(stored) as checkpoint:
        formats = choose_weight_formats(checkpoint, ModelConfig.from_checkpoint(stored), runner_config, FLOAT, CPU)
    with Checkpoint(plain) as checkpoint:
        of_plain = choose_weight_formats(checkpoint, ModelConfig.from_checkpoint(plain), runner_config, FLOAT, CPU)
    assert formats.matrices == PackedFormat(kind, FLOAT)
    assert formats.table == of_plain.table


def test_with_zeros_four_bits_require_that_shares_begin_at_groups(folders: Callable[..., tuple[Path, Path]]) -> None:
    stored, _ = folders("grouped", AWQ | {"group_size": 128})
    model_config = ModelConfig.from_checkpoint(stored)
    with Checkpoint(stored) as checkpoint:
        for topology, kind in ((Topology(pp=2), "int4_zeros"), (Topology(tp=2), "int8")):  # 192 features in two
            formats = choose_weight_formats(checkpoint, model_config, RunnerConfig(dtype="float32"), FLOAT, CPU, topology=topology)
            assert isinstance(formats.matrices, PackedFormat)
            assert formats.matrices.kind == kind


def test_no_matrix_is_held_in_four_bits_if_a_layer_has_an_unquantised_one(
    folders: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    stored, plain = folders("grouped", AWQ)
    tensors, name = load_file(stored / SINGLE_FILE), "model.layers.1.mlp.down_proj"
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{name}.{part}"]
    tensors[f"{name}.weight"] = load_file(plain / SINGLE_FILE)[f"{name}.weight"]
    write_checkpoint(tmp_path, tensors, json.loads((stored / "config.json").read_text()))
    with Checkpoint(tmp_path) as checkpoint:
        formats = choose_weight_formats(checkpoint, ModelConfig.from_checkpoint(tmp_path), RunnerConfig(dtype="float32"), FLOAT, CPU)
    assert formats.matrices == PackedFormat("int8", FLOAT)


@pytest.mark.parametrize("config", [GPTQ, AWQ], ids=lambda config: str(config["quant_method"]))
def test_a_rank_reads_only_its_share_of_the_words(config: dict[str, Any], folders: Callable[..., tuple[Path, Path]]) -> None:
    stored, _ = folders("grouped", config)
    (report,) = run_ranks(Topology(), read_report, stored)
    assert report.bytes_read == report.bytes_of_checkpoint
    halves = run_ranks(Topology(tp=2), read_report, stored)
    assert max(half.bytes_read for half in halves) < 0.56 * report.bytes_of_checkpoint


Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def _with(name: str, new: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = new(tensors[name]).contiguous()

    return change


def _also(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensor

    return change


SEEN_IN_HEADERS = [
    (GPTQ, _without(f"{Q_PROJ}.qzeros"), f"{Q_PROJ}.qweight is present without {Q_PROJ}.qzeros"),
    (GPTQ, _without(f"{Q_PROJ}.scales"), f"{Q_PROJ}.qweight is present without {Q_PROJ}.scales"),
    (ACT_ORDER, _without(f"{DOWN}.g_idx"), f"{DOWN}.qweight is present without {DOWN}.g_idx"),
    (GPTQ, _without(f"{Q_PROJ}.qweight"), f"missing: {Q_PROJ}.weight"),
    (GPTQ, _with(f"{Q_PROJ}.qweight", lambda t: t[:-1]), rf"{Q_PROJ}.qzeros has the shape|g_idx has the shape"),
    (GPTQ, _with(f"{Q_PROJ}.qweight", lambda t: t[:, :-8]), f"{Q_PROJ}.qzeros has the shape"),
    (GPTQ, _with(f"{Q_PROJ}.qweight", torch.flatten), f"{Q_PROJ}.qweight has the shape"),
    (GPTQ, _with(f"{Q_PROJ}.qweight", lambda t: t.float()), f"{Q_PROJ}.qweight has the dtype torch.float32"),
    (GPTQ, _with(f"{Q_PROJ}.qweight", lambda t: t[:0]), f"{Q_PROJ}.qzeros has the shape"),
    (GPTQ, _with(f"{DOWN}.scales", lambda t: t[:, :3]), f"{DOWN}.scales has the shape"),
    (GPTQ, _with(f"{DOWN}.scales", lambda t: t.float()), f"{DOWN}.scales has the dtype torch.float32"),
    (GPTQ, _with(f"{DOWN}.g_idx", lambda t: t[:5]), f"{DOWN}.g_idx has the shape"),
    (AWQ, _with(f"{DOWN}.qzeros", lambda t: t.repeat(2, 1)), f"{DOWN}.qzeros has the shape"),
    (AWQ, _with(f"{Q_PROJ}.qweight", lambda t: t.T), "has the shape"),
    (GPTQ, _also(f"{Q_PROJ}.weight", torch.zeros(192, 192)), f"is present together with {Q_PROJ}.weight"),
    (GPTQ, _also("model.layers.0.mlp.gate_proj.bias", torch.zeros(7)), "gate_proj.bias has the shape"),
]


@pytest.mark.parametrize(("config", "change", "said"), SEEN_IN_HEADERS, ids=range(len(SEEN_IN_HEADERS)))
def test_parts_that_do_not_fit_are_named_before_anything_is_read(
    config: dict[str, Any],
    change: Callable[[dict[str, Tensor]], None],
    said: str,
    folders: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    damaged = _damaged(folders("grouped", config)[0], change, tmp_path)
    with Checkpoint(damaged) as checkpoint, pytest.raises((CheckpointError, CheckpointMismatch), match=said):
        check_checkpoint(checkpoint, ModelConfig.from_checkpoint(damaged))


def _out_of_range(groups: Tensor) -> Tensor:
    groups[70] = 2**31 - 1
    return groups


def _negative(groups: Tensor) -> Tensor:
    groups[3] = -5
    return groups


SEEN_WHILE_READING = [
    (ACT_ORDER, _with(f"{DOWN}.g_idx", _out_of_range), f"{DOWN}.g_idx names a group 2147483647, and there are 6"),
    (ACT_ORDER, _with(f"{DOWN}.g_idx", _negative), f"{DOWN}.g_idx names a group -5"),
    (GPTQ, _with(f"{DOWN}.g_idx", lambda t: t.flip(0)), f"{DOWN}.g_idx has groups out of order, and desc_act is false"),
    (GPTQ, _with(f"{Q_PROJ}.qzeros", lambda t: t + 1), f"{Q_PROJ}.qzeros has zeros that are not 8, and sym is true"),
    (GPTQ, _with(f"{DOWN}.bias", lambda t: t + 1), f"{DOWN}.bias is not zero"),
]


@pytest.mark.parametrize(("config", "change", "said"), SEEN_WHILE_READING, ids=range(len(SEEN_WHILE_READING)))
def test_numbers_that_contradict_config_json_are_named(
    config: dict[str, Any],
    change: Callable[[dict[str, Tensor]], None],
    said: str,
    folders: Callable[..., tuple[Path, Path]],
    tmp_path: Path,
) -> None:
    damaged = _damaged(folders("grouped", config)[0], change, tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        run_ranks(Topology(), read_report, damaged)
    assert caught.value.file.endswith(SINGLE_FILE)
    assert caught.value.tensor is not None


def test_a_quantization_config_without_a_quantised_matrix_is_refused(folders: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    _, plain = folders("grouped", GPTQ)
    raw = json.loads((plain / "config.json").read_text())
    write_checkpoint(tmp_path, load_file(plain / SINGLE_FILE), raw | {"quantization_config": GPTQ})
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="no tensor is quantised"):
        check_checkpoint(checkpoint, ModelConfig.from_checkpoint(tmp_path))


def test_quantised_matrices_without_a_quantization_config_are_refused(folders: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    stored, _ = folders("grouped", GPTQ)
    raw = json.loads((stored / "config.json").read_text())
    del raw["quantization_config"]
    write_checkpoint(tmp_path, load_file(stored / SINGLE_FILE), raw)
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointMismatch, match="qweight"):
        check_checkpoint(checkpoint, ModelConfig.from_checkpoint(tmp_path))


def _damaged(folder: Path, change: Callable[[dict[str, Tensor]], None], target: Path) -> Path:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, target / SINGLE_FILE)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target
