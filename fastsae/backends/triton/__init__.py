"""Launchers of the Triton kernels: they allocate, choose configs and launch; checks are the callers'.

Runs on CUDA tensors in fp32, bf16 and fp16 (in Triton's interpreter on CPU tensors, for tests). Only
``encode`` under the rule "threshold" makes the host wait, so that a TopK or BatchTopK step can be captured in
a CUDA graph.
"""

from fastsae.backends.torch import transpose
from fastsae.backends.triton.decode import code_grad, decode, decode_error
from fastsae.backends.triton.encode import encode, encode_dead
from fastsae.backends.triton.rows import row_grads, row_step, row_update

__all__ = [
    "code_grad",
    "decode",
    "decode_error",
    "encode",
    "encode_dead",
    "row_grads",
    "row_step",
    "row_update",
    "transpose",
]
