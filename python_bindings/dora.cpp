// dora_norm for CPU tensors; schema in peft_kernels/ops/dora/schema.py.
#include <cmath>

#include "tensors.h"

namespace peft_kernels::bindings {
namespace {

Tensor dora_norm(const Tensor& weight_, const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
                 const OptionalTensor& nested_code, const OptionalTensor& nested_offset, int64_t nested_blocksize,
                 int64_t blocksize, int64_t out_features, const Tensor& lora_a_, const Tensor& lora_b_,
                 double scaling) {
  const Tensor lora_a = as_contiguous(lora_a_), lora_b = as_contiguous(lora_b_);
  STD_TORCH_CHECK(lora_a.dim() == 2 && lora_a.size(0) > 0, "lora_a must be [r, K] with r > 0, got ", shape_of(lora_a));
  cpu::DoraNorm problem;
  problem.rank = lora_a.size(0);
  problem.in_features = lora_a.size(1);
  problem.out_features = out_features;
  STD_TORCH_CHECK(problem.in_features > 0 && out_features > 0, "weight must be [N, K] with N, K > 0, got [",
                  out_features, ", ", problem.in_features, "]");
  check_shape("lora_a", lora_a, {problem.rank, problem.in_features});
  check_shape("lora_b", lora_b, {out_features, problem.rank});
  check_dtype("lora_b", lora_b, lora_a.scalar_type());
  problem.a = array("lora_a", lora_a);
  problem.b = array("lora_b", lora_b);
  STD_TORCH_CHECK(std::isfinite(scaling), "scaling must be finite, got ", scaling);
  problem.scaling = scaling;

  const Tensor weight = absmax ? weight_ : as_contiguous(weight_);
  std::optional<NF4Parts> nf4;
  if (absmax) {
    nf4.emplace(weight, *absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize,
                checked_product("weight", out_features, problem.in_features));
    problem.nf4 = cpu_weight(*nf4);
  } else {
    check_shape("weight", weight, {out_features, problem.in_features});
    problem.dense = array("weight", weight);
  }
  Tensor norm = empty(lora_a, {out_features}, ScalarType::Float);
  problem.norm = static_cast<float*>(norm.mutable_data_ptr());
  cpu::kernels().dora_norm(problem, torch_threads());
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("dora_norm", TORCH_BOX(&dora_norm)); }

}  // namespace peft_kernels::bindings
