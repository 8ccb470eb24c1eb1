"""Run compiled GPU kernels on the CPU, and check them."""

from gpuless.cuda import cuda
from gpuless.driver import MODELS, device
from gpuless.launch import launch as launch_ptx
from gpuless.report import Report, Unsupported

__all__ = ["MODELS", "Report", "Unsupported", "cuda", "device", "launch_ptx"]
