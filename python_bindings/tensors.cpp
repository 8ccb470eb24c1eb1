#include "tensors.h"

#include <atomic>
#include <bit>
#include <new>

namespace peft_kernels::bindings {

int blocksize_log2(const char* name, int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && std::has_single_bit(static_cast<uint64_t>(blocksize)), name,
                  " must be a power of two from 32 to 4096, got ", blocksize);
  return std::countr_zero(static_cast<uint64_t>(blocksize));
}

bool check_dropout(double p, const OptionalTensor& seed, Place place, const char* name) {
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, name, " must be in [0, 1), got ", p);
  if (seed) {
    check_shape("seed", *seed, {}, place);
    check_dtype("seed", *seed, ScalarType::Long);
    data_of("seed", *seed);
  }
  STD_TORCH_CHECK(p == 0.0 || seed, "seed must be given when ", name, " > 0; pass an int64 0-dim tensor");
  return p > 0.0;
}

cpu::Dropout make_dropout(double p, const OptionalTensor& seed, const char* name) {
  if (!check_dropout(p, seed, Place::kCpu, name)) return {};
  return {static_cast<uint64_t>(*data_of<int64_t>("seed", *seed)), dropout_threshold(p), dropout_scale(p)};
}

NF4Parts::NF4Parts(const Tensor& packed_, const Tensor& absmax_, const OptionalTensor& nested_absmax_,
                   const OptionalTensor& nested_code_, const OptionalTensor& nested_offset_, int64_t nested_blocksize,
                   int64_t blocksize, int64_t count, Place place)
    : packed(as_contiguous(packed_)),
      absmax(as_contiguous(absmax_)),
      nested_absmax(as_contiguous(nested_absmax_)),
      nested_code(as_contiguous(nested_code_)),
      nested_offset(nested_offset_),
      blocksize_log2(bindings::blocksize_log2("blocksize", blocksize)) {
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  check_shape("packed weight", packed, {(count + 1) / 2}, place);
  check_dtype("packed weight", packed, ScalarType::Byte);
  check_shape("absmax", absmax, {blocks}, place);
  const bool nested = nested_absmax.has_value();
  STD_TORCH_CHECK(nested_code.has_value() == nested && nested_offset.has_value() == nested,
                  "nested_absmax, nested_code and nested_offset must be given together or not at all");
  if (!nested) {
    check_dtype("absmax", absmax, ScalarType::Float);
    return;
  }
  nested_blocksize_log2 = bindings::blocksize_log2("nested_blocksize", nested_blocksize);
  check_dtype("absmax", absmax, ScalarType::Byte);
  check_shape("nested_absmax", *nested_absmax, {(blocks + nested_blocksize - 1) / nested_blocksize}, place);
  check_shape("nested_code", *nested_code, {256}, place);
  check_shape("nested_offset", *nested_offset, {}, place);
  check_dtype("nested_absmax", *nested_absmax, ScalarType::Float);
  check_dtype("nested_code", *nested_code, ScalarType::Float);
  check_dtype("nested_offset", *nested_offset, ScalarType::Float);
}

cpu::NF4Weight cpu_weight(const NF4Parts& parts) {
  cpu::NF4Weight weight;
  parts.fill(weight);
  if (parts.nested_offset) weight.nested_offset = *data_of<float>("nested_offset", *parts.nested_offset);
  return weight;
}

cpu::ThreadPool torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t tasks, void* context, void (*body)(void*, int64_t, int64_t)) {
            // An exception must not cross torch's C interface: it is thrown again when all threads are done.
            std::atomic<bool> out_of_memory = false;
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              try {
                body(context, begin, end);
              } catch (const std::bad_alloc&) {  // for scratch: all that a kernel can throw
                out_of_memory = true;
              }
            });
            if (out_of_memory) throw std::bad_alloc();
          }};
}

}  // namespace peft_kernels::bindings
