// From torch tensors to what the kernels take: checks with messages, then pointers. The only file that knows both
// sides' types. Everything goes through torch's stable ABI, so one binary serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>
#include <limits>
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

// A tensor that is there: the dispatcher lets None pass for one.
inline const Tensor& defined(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.defined(), name, " must be a tensor, got None");
  return t;
}

// Whether a tensor is on a GPU. A test build of the CUDA bindings runs them in an emulator, on the CPU's tensors.
inline bool on_gpu(const Tensor& t) {
#ifdef PEFT_KERNELS_EMULATED_CUDA
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

// Where the tensors of a call are: on the CPU, or on the GPU of one of them.
class Place {
 public:
  static const Place kCpu;

  static Place of(const char* name, const Tensor& t) {
    STD_TORCH_CHECK(on_gpu(t), name, " must be on a GPU; move it with .cuda()");
    return Place(true, t.get_device_index());
  }

  void check(const char* name, const Tensor& t) const {
    defined(name, t);
    if (!gpu_) {
      STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU like the op's other arguments; move it with .cpu()");
      return;
    }
    STD_TORCH_CHECK(on_gpu(t), name, " must be on the GPU like the op's other arguments; move it with .cuda()");
    STD_TORCH_CHECK(t.get_device_index() == device_, name, " must be on GPU ", device_,
                    " like the op's other arguments, got one on GPU ", t.get_device_index(), "; move it with .to()");
  }

 private:
  constexpr Place(bool gpu, int32_t device) : gpu_(gpu), device_(device) {}

  bool gpu_;
  int32_t device_;  // where that is a GPU
};
inline constexpr Place Place::kCpu{false, 0};

// `t` must be there and have exactly this shape.
inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                        Place place = Place::kCpu) {
  place.check(name, t);
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

inline DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
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

inline Array array(const char* name, const Tensor& t) { return {data_of(name, t), dtype_of(name, t.scalar_type())}; }
inline Array array(const char* name, const OptionalTensor& t) { return t ? array(name, *t) : Array{}; }
inline MutableArray output(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of("output", t.scalar_type())}; }

inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) {
  return explained("no memory for a result", [&] { return torch::stable::new_empty(like, shape, dtype); });
}

// a * b, refused where counts of bytes or blocks, a little more, might not fit: sizes come from the caller.
inline int64_t checked_product(const char* name, int64_t a, int64_t b) {
  int64_t product = 0;
  STD_TORCH_CHECK(
      a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product) && product < std::numeric_limits<int64_t>::max() / 2,
      name, " must have sizes of 0 and more and fewer than 2^62 elements, got ", a, " x ", b);
  return product;
}

// Philox dropout with probability p needs a seed. Whether it is active: not for p = 0.
bool check_dropout(double p, const OptionalTensor& seed, Place place = Place::kCpu, const char* name = "dropout_p");

// The integer below which a random word drops its element, and what the others are multiplied by.
inline uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 0x1p32); }
inline float dropout_scale(double p) { return static_cast<float>(1.0 / (1.0 - p)); }

cpu::Dropout make_dropout(double p, const OptionalTensor& seed, const char* name = "dropout_p");

// Contiguous tensors of an NF4 weight with `count` elements, checked.
struct NF4Parts {
  Tensor packed, absmax;
  OptionalTensor nested_absmax, nested_code, nested_offset;
  int blocksize_log2, nested_blocksize_log2 = 0;

  NF4Parts(const Tensor& packed, const Tensor& absmax, const OptionalTensor& nested_absmax,
           const OptionalTensor& nested_code, const OptionalTensor& nested_offset, int64_t nested_blocksize,
           int64_t blocksize, int64_t count, Place place = Place::kCpu);

  // Writes what the weight of every backend has.
  template <class Weight>
  void fill(Weight& weight) const {
    weight.blocksize_log2 = blocksize_log2;
    weight.nested_blocksize_log2 = nested_blocksize_log2;
    weight.packed = data_of<uint8_t>("packed weight", packed);
    if (!nested_absmax) {
      weight.absmax = data_of<float>("absmax", absmax);
      return;
    }
    weight.absmax_codes = data_of<uint8_t>("absmax", absmax);
    weight.nested_absmax = data_of<float>("nested_absmax", *nested_absmax);
    weight.nested_code = data_of<float>("nested_code", *nested_code);
  }
};

// The CPU kernels' view of them.
cpu::NF4Weight cpu_weight(const NF4Parts& parts);

int blocksize_log2(const char* name, int64_t blocksize);

// torch's own threads.
cpu::ThreadPool torch_threads();

}  // namespace peft_kernels::bindings
