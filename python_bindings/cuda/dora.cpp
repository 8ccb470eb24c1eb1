// dora_norm for tensors on GPUs; schema in peft_kernels/ops/dora/schema.py.
#include <cmath>
#include <limits>
#include <optional>

#include "cuda/select.h"
#include "gpu.h"

namespace peft_kernels::bindings {
namespace {

Tensor dora_norm(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
                 const OptionalTensor& nested_code, const OptionalTensor& nested_offset, int64_t nested_blocksize,
                 int64_t blocksize, int64_t out_features, const Tensor& lora_a_, const Tensor& lora_b_,
                 double scaling) {
  const Tensor lora_a = as_contiguous(lora_a_), lora_b = as_contiguous(lora_b_);
  STD_TORCH_CHECK(lora_a.dim() == 2 && lora_a.size(0) > 0, "lora_a must be [r, K] with r > 0, got ", shape_of(lora_a));
  cuda::DoraNorm problem;
  problem.rank = lora_a.size(0);
  problem.in_features = lora_a.size(1);
  problem.out_features = out_features;
  STD_TORCH_CHECK(problem.in_features > 0 && out_features > 0, "weight must be [N, K] with N, K > 0, got [",
                  out_features, ", ", problem.in_features, "]");
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 256;  // kernels count rows and columns in 32 bits
  STD_TORCH_CHECK(problem.in_features <= kMost && out_features <= kMost,
                  "weight must be [N, K] with N, K < 2^31 - 256");
  const Place place = Place::of("lora_a", lora_a);
  check_shape("lora_b", lora_b, {out_features, problem.rank}, place);
  check_dtype("lora_b", lora_b, lora_a.scalar_type());
  problem.a = array("lora_a", lora_a);
  problem.b = array("lora_b", lora_b);
  STD_TORCH_CHECK(std::isfinite(scaling), "scaling must be finite, got ", scaling);
  problem.scaling = scaling;

  std::optional<NF4Parts> nf4;
  if (absmax) {
    nf4.emplace(weight, *absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize,
                checked_product("weight", out_features, problem.in_features), place);
    problem.weight = gpu_weight(*nf4);
  } else {
    check_shape("weight", weight, {out_features, problem.in_features}, place);
    problem.dense = array("weight", weight);
    problem.dense_strides[0] = weight.stride(0);
    problem.dense_strides[1] = weight.stride(1);
  }
  const OnGpu gpu(lora_a);
  if (!gpu.has_kernels()) {
    return std::get<0>(by_triton<Tensor>("peft_kernels::dora_norm", weight, absmax, nested_absmax, nested_code,
                                         nested_offset, nested_blocksize, blocksize, out_features, lora_a_, lora_b_,
                                         scaling));
  }
  const int64_t splits = cuda::norm_splits(problem.in_features, out_features, gpu.device);
  const Tensor squares = empty(lora_a, {splits, out_features}, ScalarType::Double);
  const Tensor most = empty(lora_a, {problem.rank}, ScalarType::Float);
  const Tensor norm = empty(lora_a, {out_features}, ScalarType::Float);
  problem.squares = static_cast<double*>(squares.mutable_data_ptr());
  problem.most = static_cast<float*>(most.mutable_data_ptr());
  problem.norm = static_cast<float*>(norm.mutable_data_ptr());
  OnGpu::succeeded("dora_norm", cuda::dora_norm(problem, splits, gpu.stream));
  return norm;
}

}  // namespace

PEFT_KERNELS_CUDA_OP(dora_norm)

}  // namespace peft_kernels::bindings
