"""By which methods products with an NF4 weight are computed, on whatever device it is: for `pk.explain`."""

from peft_kernels.core import plan
from peft_kernels.core.backend import backend_of
from peft_kernels.core.gpu import gpu
from peft_kernels.ops.linear import triton_plan

GPU_METHODS = {
    "decode": "decoded in registers, without tensor cores",
    "matmul": "decoded tile by tile into tensor cores",
    "panels": "dequantised panels and a vendor GEMM",
}


def plans(product: plan.Product) -> dict[str, plan.Plan]:
    """The methods for every number of tokens, by direction; none where the reference computes the product."""
    if backend_of("adapted_linear", product.device) != "triton":
        return plan.plans(product)
    device, tokens = gpu(), range(1, plan.MOST_TOKENS + 1)
    # How many outputs there are decides on splits, not on the method: take one.
    shapes = [
        triton_plan.Product(m, 1, product.in_features, product.blocksize, product.dtype) for m in tokens
    ]
    return {
        "forward": plan.plan_of([GPU_METHODS[triton_plan.forward_plan(s, device).method] for s in shapes]),
        "input gradient": plan.plan_of(
            [GPU_METHODS[triton_plan.backward_plan(s, device).method] for s in shapes]
        ),
    }
