"""By which methods products with an NF4 weight are computed, on whatever device it is: for `pk.explain`."""

import torch

from peft_kernels.core import plan
from peft_kernels.core.backend import backend_of
from peft_kernels.core.gpu import GPU, gpu, on_device
from peft_kernels.ops.linear import triton_plan

CUDA_METHODS = (None, "gemv", "matmul")  # as csrc/cuda/plan.h counts them
CUDA_METHOD_WORDS = {
    "gemv": "CUDA C++, decoded straight into the sums of a GEMV",
    "matmul": "CUDA C++, decoded straight into tensor cores",
}
TRITON_METHODS = {
    "decode": "Triton, decoded in registers, without tensor cores",
    "matmul": "Triton, decoded tile by tile into tensor cores",
    "panels": "dequantised panels and a vendor GEMM",
}


def plans(product: plan.Product) -> dict[str, plan.Plan]:
    """The methods for every number of tokens, by direction; none where the reference computes the product."""
    backend = backend_of("adapted_linear", product.device)
    if backend not in ("triton", "cuda"):
        return plan.plans(product)
    if product.dtype not in plan.NATIVE_DTYPES:
        return {}
    if product.input_scale:  # x l_in, and dl_in beside dx, are Triton's: python_bindings/cuda, cuda.py
        backend = "triton"
    # How many outputs there are decides on tiles and splits, not on the method, up to millions: take one.
    shapes = [
        triton_plan.Product(m, 1, product.in_features, product.blocksize, product.dtype)
        for m in range(1, plan.MOST_TOKENS + 1)
    ]
    with on_device(product.device):
        device = gpu()
        return {
            "forward": plan.plan_of([method(s, device, backend, backward=False) for s in shapes]),
            "input gradient": plan.plan_of([method(s, device, backend, backward=True) for s in shapes]),
        }


def method(product: triton_plan.Product, device: GPU, backend: str, *, backward: bool) -> str:
    """What computes a product on a GPU, in words."""
    if backend == "cuda" and (name := cuda_method(product, backward=backward)):
        return CUDA_METHOD_WORDS[name]
    triton = triton_plan.backward_plan if backward else triton_plan.forward_plan
    return TRITON_METHODS[triton(product, device).method]


def cuda_method(product: triton_plan.Product, *, backward: bool) -> str | None:
    """What of the CUDA C++ backend computes a product: its own chooser is asked, csrc/cuda/select.h."""
    number = torch.ops.peft_kernels_cuda.plan(
        backward, product.tokens, product.in_features, product.out_features, product.blocksize, product.dtype
    )
    return CUDA_METHODS[number]
