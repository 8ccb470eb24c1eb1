// nf4_quantize and nf4_dequantize for CPU tensors; schemas in peft_kernels/ops/nf4/schema.py.
#include <tuple>
#include <vector>

#include "tensors.h"

namespace peft_kernels::bindings {
namespace {

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight_, int64_t blocksize) {
  const int log2 = blocksize_log2("blocksize", blocksize);
  const Tensor weight = as_contiguous(weight_);
  const int64_t count = weight.numel();
  Tensor packed = empty(weight, {(count + 1) / 2}, ScalarType::Byte);
  Tensor absmax = empty(weight, {(count + blocksize - 1) / blocksize}, ScalarType::Float);
  cpu::kernels().nf4_quantize(array("weight", weight), count, log2, static_cast<uint8_t*>(packed.mutable_data_ptr()),
                              static_cast<float*>(absmax.mutable_data_ptr()), torch_threads());
  return {packed, absmax};
}

Tensor nf4_dequantize(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
                      const OptionalTensor& nested_code, const OptionalTensor& nested_offset, int64_t nested_blocksize,
                      int64_t blocksize, const std::vector<int64_t>& shape, ScalarType dtype) {
  int64_t count = 1;
  for (const int64_t size : shape) count = checked_product("shape", count, size);
  const NF4Parts nf4(packed, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize, count);
  dtype_of("dtype", dtype);  // checked before memory is allocated
  Tensor out = empty(packed, shape, dtype);
  cpu::kernels().nf4_dequantize(cpu_weight(nf4), count, output(out), torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
}

}  // namespace peft_kernels::bindings
