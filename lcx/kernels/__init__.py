"""Fused GPU kernels, in Triton. Each computes what a readable PyTorch function of `lcx.methods` defines, only faster.

Triton is optional: it is imported when a kernel is first asked for, and without it the PyTorch function is used.
"""
