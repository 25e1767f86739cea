"""Triton backend (launchers)."""
