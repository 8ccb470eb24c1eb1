// nf4_quantize and nf4_dequantize for tensors on GPUs; schemas in peft_kernels/ops/nf4/schema.py.
#include <vector>

#include "gpu.h"

namespace peft_kernels::bindings {
namespace {

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight_, int64_t blocksize) {
  const int log2 = blocksize_log2("blocksize", blocksize);
  Place::of("weight", weight_);
  const Tensor weight = as_contiguous(weight_);
  const int64_t count = weight.numel();
  const OnGpu gpu(weight);
  if (!gpu.has_kernels()) return by_triton<Tensor, Tensor>("peft_kernels::nf4_quantize", weight, blocksize);
  Tensor packed = empty(weight, {(count + 1) / 2}, ScalarType::Byte);
  Tensor absmax = empty(weight, {(count + blocksize - 1) / blocksize}, ScalarType::Float);
  const Array from = array("weight", weight);
  if (count == 0) return {packed, absmax};
  OnGpu::succeeded("nf4_quantize",
                   cuda::nf4_quantize(from, count, log2, static_cast<uint8_t*>(packed.mutable_data_ptr()),
                                      static_cast<float*>(absmax.mutable_data_ptr()), gpu.stream));
  return {packed, absmax};
}

Tensor nf4_dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                      const OptionalTensor& nested_code, const OptionalTensor& nested_offset, int64_t nested_blocksize,
                      int64_t blocksize, const std::vector<int64_t>& shape, ScalarType dtype) {
  int64_t count = 1;
  for (const int64_t size : shape) count = checked_product("shape", count, size);
  const NF4Parts nf4(packed, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize, count,
                     Place::of("packed weight", packed));
  dtype_of("dtype", dtype);  // checked before memory is allocated
  const OnGpu gpu(nf4.packed);
  if (!gpu.has_kernels()) {
    return std::get<0>(by_triton<Tensor>("peft_kernels::nf4_dequantize", packed, absmax, nested_absmax, nested_code,
                                         nested_offset, nested_blocksize, blocksize, shape, dtype));
  }
  Tensor out = empty(nf4.packed, shape, dtype);
  if (count == 0) return out;
  OnGpu::succeeded("nf4_dequantize", cuda::nf4_dequantize(gpu_weight(nf4), count, output(out), gpu.stream));
  return out;
}

}  // namespace

PEFT_KERNELS_CUDA_OP(nf4_quantize)
PEFT_KERNELS_CUDA_OP(nf4_dequantize)

}  // namespace peft_kernels::bindings
