"""Experts for OpenVINO. Its GGUF reader does not support them: it reads a dense model whose MLP is the shared expert, and the routed
experts are added to the graph.

They have the form that the CPU plugin recognises (``ConvertTiledMoeBlockTo3GatherMatmuls``; optimum-intel exports such models in it), so
that each token is computed by its own experts only. N tokens, D model width, E experts, A of them per token, I their inner width.
"""

from pathlib import Path

import gguf
import numpy as np
import openvino
from openvino import Node, opset13
from openvino.utils.node_factory import NodeFactory

SHARED = {f"ffn_{part}_shexp": f"ffn_{part}" for part in ("gate", "up", "down")}
"""Tensor names of a GGUF file with experts to those of a dense file."""


def dense_field(name: str) -> str | None:
    """Name of a metadata field in a dense file; None if it has no such field."""
    return None if "expert" in name else name.replace("qwen2moe.", "qwen2.")


def dense_tensor(name: str) -> str | None:
    """Name of a tensor in a dense file; None if it has no such tensor."""
    if "_exps." in name or "ffn_gate_inp" in name or name == "output.weight":  # output.weight repeats the embedding
        return None
    for before, after in SHARED.items():
        name = name.replace(f".{before}.", f".{after}.")
    return name


def with_experts(dense: Path, source: Path, target: Path) -> None:
    """Write the ``dense`` model with the experts of ``source`` added to ``target``. Dense and target are .xml files, source is GGUF."""
    reader = gguf.GGUFReader(source)
    fields = {name.partition(".")[2]: field for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    per_token = int(fields["expert_used_count"].contents())
    model = openvino.Core().read_model(dense)
    for layer in range(int(fields["block_count"].contents())):
        found = {part: tensors[f"blk.{layer}.{part}.weight"] for part in (*_PARTS, "ffn_gate_inp", "ffn_gate_inp_shexp")}
        _add(model, layer, found, per_token)
    model.validate_nodes_and_infer_types()
    openvino.save_model(model, target, compress_to_fp16=True)


_PARTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def _add(model: openvino.Model, layer: int, tensors: dict[str, gguf.ReaderTensor], per_token: int) -> None:
    middle = next(node for node in model.get_ops() if node.get_friendly_name() == f"model.layers.self_attn.mlp.mul.layer{layer}")
    (down,) = (user.get_node() for user in middle.output(0).get_target_inputs())
    swish = next(each.get_node() for each in middle.input_values() if each.get_node().get_type_name() == "Swish")
    x = swish.input_value(0).get_node().input_value(0)  # the input of gate and up: (batch, tokens, D)
    users = list(down.output(0).get_target_inputs())

    width = int(tensors["ffn_gate_inp"].shape[0])
    x_ND = opset13.reshape(x, _numbers([-1, width]), special_zero=False)
    share = opset13.sigmoid(opset13.matmul(x, _matrix(tensors["ffn_gate_inp_shexp"], (1, width)), False, True))
    routed = opset13.reshape(_routed(x_ND, tensors, per_token), opset13.shape_of(x), special_zero=False)
    both = opset13.add(routed, opset13.multiply(down.output(0), share))
    for user in users:
        user.replace_source_output(both.output(0))


def _routed(x_ND: Node, tensors: dict[str, gguf.ReaderTensor], per_token: int) -> Node:
    """(1, N, D): every token passes all experts, most of them with weight 0."""
    width, num_experts = (int(size) for size in tensors["ffn_gate_inp"].shape)
    probabilities_NE = opset13.softmax(opset13.matmul(x_ND, _matrix(tensors["ffn_gate_inp"], (num_experts, width)), False, True), -1)
    best = opset13.topk(probabilities_NE, opset13.constant(per_token, openvino.Type.i64), -1, "max", "value", openvino.Type.i64)
    nothing_NE = opset13.broadcast(opset13.constant(0.0, openvino.Type.f32), opset13.shape_of(probabilities_NE))
    weights_NE = opset13.scatter_elements_update(nothing_NE, best.output(1), best.output(0), opset13.constant(1, openvino.Type.i64))
    weights_E1N = opset13.reshape(opset13.transpose(weights_NE, _numbers([1, 0])), _numbers([num_experts, 1, -1]), special_zero=False)
    weights_E1N1 = opset13.unsqueeze(weights_E1N, opset13.constant(-1, openvino.Type.i64))

    gate, up, down = (_matrix(tensors[part], tuple(int(size) for size in reversed(tensors[part].shape))) for part in _PARTS)
    tiled_END = opset13.reshape(opset13.tile(x_ND, _numbers([num_experts, 1])), _numbers([num_experts, -1, width]), special_zero=False)
    activated_ENI = NodeFactory("opset4").create(
        "Swish", [opset13.matmul(tiled_END, gate, False, True).output(0)]
    )  # without a beta: so it looks for one
    gated_ENI = opset13.multiply(activated_ENI, opset13.matmul(tiled_END, up, False, True))
    out_E1ND = opset13.reshape(opset13.matmul(gated_ENI, down, False, True), _numbers([num_experts, 1, -1, width]), special_zero=False)
    return opset13.reduce_sum(opset13.multiply(out_E1ND, weights_E1N1), opset13.constant(0, openvino.Type.i64), keep_dims=False)


def _matrix(tensor: gguf.ReaderTensor, shape: tuple[int, ...]) -> Node:
    """A matrix in Q8_0 as values with scales, as the reader represents other matrices; any other type as float32, stored as float16."""
    if tensor.tensor_type != gguf.GGMLQuantizationType.Q8_0:
        return opset13.constant(gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32))
    blocks = np.ascontiguousarray(tensor.data).reshape(*shape[:-1], shape[-1] // 32, 34)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)
    numbers = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    unsigned = opset13.constant((numbers.astype(np.int16) + 128).astype(np.uint8))
    zero = opset13.constant(np.full(scales.shape, 128, np.uint8))
    half = openvino.Type.f16
    scaled = opset13.multiply(opset13.subtract(opset13.convert(unsigned, half), opset13.convert(zero, half)), opset13.constant(scales))
    return opset13.convert(opset13.reshape(scaled, _numbers(list(shape)), special_zero=False), openvino.Type.f32)


def _numbers(values: list[int]) -> Node:
    return opset13.constant(np.array(values, np.int64))
