// Arrays as every backend takes them. Row-major, of one of three dtypes.
#pragma once

#include <cstdint>

namespace peft_kernels {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// `data` is null where an optional input is absent.
struct Array {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  constexpr explicit operator bool() const { return data != nullptr; }
};
struct MutableArray {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  constexpr explicit operator bool() const { return data != nullptr; }
};

}  // namespace peft_kernels
