"""The package ``fastsae.kernels``: Triton kernels and their launch configs, one operator per file.

A file here holds ``@triton.jit`` code and a table of launch configs, each with what set it. It imports triton
and the standard library: no torch, no allocation, no environment reads. Checks, outputs and launches belong
to ``fastsae.backends.triton``.
"""
