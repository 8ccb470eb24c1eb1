"""Run compiled GPU kernels on the CPU, and check them."""

from gpuless.driver import MODELS, device
from gpuless.launch import launch as launch_ptx
from gpuless.report import Report, Unsupported

__all__ = ["MODELS", "Report", "Unsupported", "device", "launch_ptx"]
