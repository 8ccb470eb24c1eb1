// From torch tensors to what the kernels take: checks with messages, then pointers. The only file that knows both
// sides' types. Everything goes through torch's stable ABI, so one binary serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/api.h"

namespace peft_kernels::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// torch 2.10's stable ABI says that a call failed, not why; later releases can be asked (weak: absent in earlier ones).
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// call(), with torch's own words where torch throws.
template <class Call>
auto explained(const char* what, const Call& call) {
  try {
    return call();
  } catch (const std::runtime_error& error) {
    const bool known = torch_exception_get_what_without_backtrace != nullptr;
    throw std::runtime_error(std::string(what) + ": " +
                             (known ? torch_exception_get_what_without_backtrace() : error.what()));
  }
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + "]";
}

// `t` must be on the CPU and have exactly this shape.
inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU like the op's other arguments; move it with .cpu()");
  bool equal = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  std::string wanted;
  for (const int64_t size : shape) {
    equal = equal && t.size(d) == size;
    wanted += (d++ ? ", " : "") + std::to_string(size);
  }
  STD_TORCH_CHECK(equal, name, " must be [", wanted, "], got ", shape_of(t));
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline cpu::DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return cpu::DType::kFloat32;
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    case ScalarType::Half:
      return cpu::DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  }
}

// The tensor's memory. Where it was freed, as FSDP does between uses, an error: absence is what a null pointer means.
inline const void* data_of(const char* name, const Tensor& t) {
  const void* data = t.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || t.numel() == 0, name,
                  " must have memory, got a tensor whose storage was freed; gather the sharded parameter first");
  return data;
}
template <class T>
const T* data_of(const char* name, const Tensor& t) {
  return static_cast<const T*>(data_of(name, t));
}

// A contiguous tensor: the caller's own, or a copy where it has other strides. Keep it alive while its pointer is used.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t
                           : explained("no memory for a contiguous copy", [&] { return torch::stable::contiguous(t); });
}
inline OptionalTensor as_contiguous(const OptionalTensor& t) { return t ? OptionalTensor(as_contiguous(*t)) : t; }

inline cpu::Array array(const char* name, const Tensor& t) {
  return {data_of(name, t), dtype_of(name, t.scalar_type())};
}
inline cpu::Array array(const char* name, const OptionalTensor& t) { return t ? array(name, *t) : cpu::Array{}; }
inline cpu::MutableArray output(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of("output", t.scalar_type())}; }

inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  return explained("no memory for a result", [&] { return torch::stable::new_empty(like, shape, dtype); });
}

// a * b, refused where it does not fit: sizes come from the caller.
inline int64_t checked_product(int64_t a, int64_t b) {
  int64_t product = 0;
  STD_TORCH_CHECK(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product),
                  "weight must have at most 2^63 elements, got ", a, " x ", b);
  return product;
}

// Philox dropout with probability p; inactive for p = 0.
cpu::Dropout make_dropout(double p, const OptionalTensor& seed);

// Contiguous tensors of an NF4 weight with `count` elements, checked, and the kernels' view of them.
struct NF4Tensors {
  Tensor packed, absmax;
  OptionalTensor nested_absmax, nested_code;
  cpu::NF4Weight weight;

  NF4Tensors(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
             const OptionalTensor& nested_code, const OptionalTensor& nested_offset, int64_t nested_blocksize,
             int64_t blocksize, int64_t count);
};

int blocksize_log2(const char* name, int64_t blocksize);

// torch's own threads.
cpu::ThreadPool torch_threads();

}  // namespace peft_kernels::bindings
