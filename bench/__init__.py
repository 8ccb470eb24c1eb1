"""Micro-benchmarks of peft_kernels: `python -m peft_kernels.bench`, or `pytest bench` for the same cases.

What every number means and how it is measured: docs/benchmarks.md.
"""
