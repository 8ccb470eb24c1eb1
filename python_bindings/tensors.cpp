#include "tensors.h"

#include <bit>

namespace peft_kernels::bindings {

int blocksize_log2(const char* name, int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && std::has_single_bit(static_cast<uint64_t>(blocksize)), name,
                  " must be a power of two from 32 to 4096, got ", blocksize);
  return std::countr_zero(static_cast<uint64_t>(blocksize));
}

cpu::Dropout make_dropout(double p, const OptionalTensor& seed) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout probability must be in [0, 1), got ", p);
  if (p == 0.0) return {};
  STD_TORCH_CHECK(seed.has_value(), "dropout with p = ", p, " needs a seed: an int64 tensor with one value");
  check_shape("seed", *seed, {});
  check_dtype("seed", *seed, ScalarType::Long);
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())),
          static_cast<uint32_t>(p * 0x1p32), static_cast<float>(1.0 / (1.0 - p))};
}

NF4Tensors::NF4Tensors(const Tensor& packed_, const Tensor& absmax_, const OptionalTensor& nested_absmax_,
                       const OptionalTensor& nested_code_, const OptionalTensor& nested_offset,
                       int64_t nested_blocksize, int64_t blocksize, int64_t count)
    : packed(as_contiguous(packed_)),
      absmax(as_contiguous(absmax_)),
      nested_absmax(as_contiguous(nested_absmax_)),
      nested_code(as_contiguous(nested_code_)) {
  weight.blocksize_log2 = blocksize_log2("blocksize", blocksize);
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  check_shape("packed weight", packed, {(count + 1) / 2});
  check_dtype("packed weight", packed, ScalarType::Byte);
  check_shape("absmax", absmax, {blocks});
  weight.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  const bool nested = nested_absmax.has_value();
  STD_TORCH_CHECK(nested_code.has_value() == nested && nested_offset.has_value() == nested,
                  "nested_absmax, nested_code and nested_offset must be given together or not at all");
  if (!nested) {
    check_dtype("absmax", absmax, ScalarType::Float);
    weight.absmax = static_cast<const float*>(absmax.const_data_ptr());
    return;
  }
  weight.nested_blocksize_log2 = blocksize_log2("nested_blocksize", nested_blocksize);
  check_dtype("absmax", absmax, ScalarType::Byte);
  check_shape("nested_absmax", *nested_absmax, {(blocks + nested_blocksize - 1) / nested_blocksize});
  check_shape("nested_code", *nested_code, {256});
  check_shape("nested_offset", *nested_offset, {});
  check_dtype("nested_absmax", *nested_absmax, ScalarType::Float);
  check_dtype("nested_code", *nested_code, ScalarType::Float);
  check_dtype("nested_offset", *nested_offset, ScalarType::Float);
  weight.absmax_codes = static_cast<const uint8_t*>(absmax.const_data_ptr());
  weight.nested_absmax = static_cast<const float*>(nested_absmax->const_data_ptr());
  weight.nested_code = static_cast<const float*>(nested_code->const_data_ptr());
  weight.nested_offset = *static_cast<const float*>(nested_offset->const_data_ptr());
}

cpu::ThreadPool torch_threads() {
  return {[](int64_t tasks, void* context, void (*body)(void*, int64_t, int64_t)) {
    torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
  }};
}

}  // namespace peft_kernels::bindings
