"""Triton kernels with their launchers below them. Never imports fastkd."""
