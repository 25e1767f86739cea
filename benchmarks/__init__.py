"""Benchmarks: ``python -m fastsae.benchmarks``. Each figure beside the bare encoder GEMM of the same run."""
