// nf4_linear_int8 for CPU tensors; schema in peft_kernels/ops/linear/schema.py.
#include "tensors.h"

namespace peft_kernels::bindings {
namespace {

Tensor nf4_linear_int8(const Tensor& x_, const Tensor& packed, const Tensor& absmax,
                       const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                       const OptionalTensor& nested_offset, int64_t nested_blocksize, int64_t blocksize,
                       int64_t out_features, const OptionalTensor& bias_) {
  const Tensor x = as_contiguous(x_);
  STD_TORCH_CHECK(x.dim() == 2, "x must be [M, K], got ", shape_of(x));
  const int64_t tokens = x.size(0), in_features = x.size(1);
  check_shape("x", x, {tokens, in_features});
  STD_TORCH_CHECK(in_features > 0 && out_features > 0, "weight must be [N, K] with N, K > 0, got [", out_features, ", ",
                  in_features, "]");
  const NF4Parts nf4(packed, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize,
                     checked_product("weight", out_features, in_features));
  const OptionalTensor bias = as_contiguous(bias_);
  if (bias) {
    check_shape("bias", *bias, {out_features});
    if (bias->scalar_type() != ScalarType::Float) check_dtype("bias", *bias, x.scalar_type());
  }

  cpu::NF4LinearInt8 problem;
  problem.tokens = tokens;
  problem.in_features = in_features;
  problem.out_features = out_features;
  problem.x = array("x", x);
  problem.nf4 = cpu_weight(nf4);
  problem.bias = array("bias", bias);
  Tensor y = empty(x, {tokens, out_features}, x.scalar_type());
  problem.y = output(y);
  cpu::kernels().nf4_linear_int8(problem, torch_threads());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("nf4_linear_int8", TORCH_BOX(&nf4_linear_int8)); }

}  // namespace peft_kernels::bindings
