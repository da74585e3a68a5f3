"""OpenVINO: GenAI's reader converts a GGUF file, and the runtime generates with all sequences of a workload in one batch.

Without TOKENS_OUT it only converts the checkpoint.

GenAI's own pipelines are not used: in 2026.4.1 they fail to compile a model read from GGUF ("Node ReadValue contains dead weak ptr"). The
graph, its compressed weights and its fused stateful attention are the same; a shared prefix is computed for every sequence. The reader
does not support experts; they are added to the graph (`openvino_experts`).
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from benchmarks.peers.llama_cpp import converted as gguf_of
from benchmarks.workloads import measure, workloads

FILE_TYPES = {"bf16": 1, "int8": 7, "int4": 2}
"""`general.file_type`: mostly F16 (its reader does not support bfloat16), Q8_0, Q4_0."""
VOCAB_SIZE = 151_936


def converted(checkpoint: Path, form: str) -> Path:
    """Folder with the model converted for OpenVINO; created once."""
    target = checkpoint / f"openvino-{form}"
    if (target / "openvino_model.xml").exists():
        return target
    import openvino_genai

    scratch = checkpoint / f"openvino-{form}.part"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    source = scratch / "model.gguf"
    _with_vocabulary(gguf_of(checkpoint, form), source, FILE_TYPES[form])
    try:
        openvino_genai.LLMPipeline(str(source), "CPU", enable_save_ov_model=True)
    except RuntimeError as error:
        if "dead weak ptr" not in str(error):  # it has been saved before it is compiled
            raise
    source.unlink()
    model = scratch / "openvino_model.xml"
    if "num_experts" in json.loads((checkpoint / "config.json").read_text()):
        from benchmarks.peers.openvino_experts import with_experts

        dense = model.rename(scratch / "dense.xml")
        weights = model.with_suffix(".bin").rename(dense.with_suffix(".bin"))
        with_experts(dense, gguf_of(checkpoint, form), model)
        dense.unlink()
        weights.unlink()
    scratch.rename(target)
    return target


def _with_vocabulary(source: Path, target: Path, file_type: int) -> None:
    """Copy the file with a vocabulary, which the reader requires, and float16 instead of bfloat16; experts are left out."""
    import gguf

    from benchmarks.peers.openvino_experts import dense_field, dense_tensor

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "qwen2")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "tokenizer.", "general.architecture")) and (name := dense_field(field.name)):
            writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{number}" for number in range(VOCAB_SIZE)])
    writer.add_token_types([1] * VOCAB_SIZE)
    writer.add_token_merges(["t1 t2"])
    for add in (writer.add_eos_token_id, writer.add_bos_token_id, writer.add_pad_token_id):
        add(0)
    writer.add_chat_template("{{ messages }}")
    for tensor in reader.tensors:
        if (name := dense_tensor(tensor.name)) is None:
            continue
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            writer.add_tensor(name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float16))
        else:
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class OpenVino:
    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(folder / "openvino_model.xml")
        _keep_last_logits(model)
        self.request = core.compile_model(
            model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        ).create_infer_request()

    def generate(self, prompts: list[list[int]], tokens_out: int) -> None:
        self.request.reset_state()
        ids = np.array(prompts, np.int64)
        length, num_sequences = 0, len(prompts)
        for _ in range(tokens_out):
            positions = np.arange(length, length + ids.shape[1], dtype=np.int64)
            length += ids.shape[1]
            inputs = {
                "input_ids": ids,
                "attention_mask": np.ones((num_sequences, length), np.int64),
                "position_ids": np.tile(positions, (num_sequences, 1)),
                "beam_idx": np.arange(num_sequences, dtype=np.int32),
            }
            (logits,) = self.request.infer(inputs, share_inputs=True, share_outputs=True).values()
            ids = logits[:, -1:].argmax(-1)


def _keep_last_logits(model: "openvino.Model") -> None:  # type: ignore[name-defined]  # noqa: F821
    """Compute logits for the last position only, as OpenVINO GenAI does."""
    import openvino
    from openvino import opset13

    node = model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    hidden = node.input_value(0)
    last = opset13.gather(hidden, opset13.constant(np.array([-1]), openvino.Type.i64), opset13.constant(1, openvino.Type.i64))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def main() -> None:
    checkpoint, form, *rest = sys.argv[1:]
    place = converted(Path(checkpoint), form)
    if not rest:
        return
    tokens_out, *only = rest
    engine = OpenVino(place, threads=2)
    measure(engine.generate, workloads(int(tokens_out), only))


if __name__ == "__main__":
    main()
