"""Run compiled GPU kernels on the CPU, and check them."""

from gpuless.driver import MODELS, device
from gpuless.launch import Report

__all__ = ["MODELS", "Report", "device"]
