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
#include <string>

#include "cpu/api.h"

namespace peft_kernels::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

inline cpu::DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return cpu::DType::kFloat32;
    case ScalarType::BFloat16:
      return cpu::DType::kBFloat16;
    case ScalarType::Half:
      return cpu::DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(t.scalar_type()),
                      "; the reference takes float64: use peft_kernels.functional");
  }
}

// A contiguous tensor: the caller's own, or a copy where it has other strides. Keep it alive while its pointer is used.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline OptionalTensor as_contiguous(const OptionalTensor& t) { return t ? OptionalTensor(as_contiguous(*t)) : t; }

inline cpu::Array array(const char* name, const Tensor& t) { return {t.const_data_ptr(), dtype_of(name, t)}; }
inline cpu::Array array(const char* name, const OptionalTensor& t) { return t ? array(name, *t) : cpu::Array{}; }
inline cpu::MutableArray output(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of("output", t)}; }

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
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
