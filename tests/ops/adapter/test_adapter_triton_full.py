"""What the CPU's tests ask of the bottleneck adapter, asked of its Triton kernels on emulated GPUs."""

import pytest
from test_adapter_values import (  # noqa: F401
    test_dropout_is_that_of_philox_on_up,
    test_every_subset_of_the_optional_parts,
    test_gate_of_a_sequence,
    test_inputs_are_left_alone,
    test_layer_norms,
    test_no_tokens,
    test_random_problems,
    test_residual_that_is_hidden_itself,
    test_sizes_that_are_no_whole_blocks,
    test_strides_do_not_matter,
    test_what_is_not_finite_stays_in_its_row,
)

from gpuless.driver import EmulatedGPU

pytestmark = pytest.mark.gpuless_full


@pytest.fixture
def backend(gpu: EmulatedGPU) -> str:
    """In place of the reference and the native library."""
    return "triton"
