"""What must be so before anything else is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are checked by Triton's interpreter; triton reads this when it is imported

os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's own 15 its processes stand still beside any other work of the machine
