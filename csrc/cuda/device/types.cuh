// The two 16-bit types as tensor cores take them, and fp32, by one set of names.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/array.h"

namespace peft_kernels::cuda {

#define PEFT_KERNELS_DEVICE __device__ __forceinline__

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;  // of a warp

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

PEFT_KERNELS_DEVICE float to_float(float v) { return v; }
PEFT_KERNELS_DEVICE float to_float(BFloat16 v) { return __bfloat162float(v); }
PEFT_KERNELS_DEVICE float to_float(Float16 v) { return __half2float(v); }

template <class T>
PEFT_KERNELS_DEVICE T from_float(float v);
template <>
PEFT_KERNELS_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
PEFT_KERNELS_DEVICE BFloat16 from_float<BFloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
PEFT_KERNELS_DEVICE Float16 from_float<Float16>(float v) {
  return __float2half_rn(v);
}

// Two 16-bit values in a register, each rounded once: `low` in the lower half, where memory has the first.
template <class T>
PEFT_KERNELS_DEVICE uint32_t pack(float low, float high);
template <>
PEFT_KERNELS_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
PEFT_KERNELS_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// Such a register's two values.
template <class T>
PEFT_KERNELS_DEVICE float2 unpack(uint32_t pair);
template <>
PEFT_KERNELS_DEVICE float2 unpack<BFloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}
template <>
PEFT_KERNELS_DEVICE float2 unpack<Float16>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// `bytes` is a power of two.
PEFT_KERNELS_DEVICE bool aligned_to(const void* p, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0;
}

// One element of an array whose dtype is known at run time only: for epilogues, not for loops.
PEFT_KERNELS_DEVICE float element(const Array& array, int64_t i) {
  switch (array.dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(array.data)[i]);
    case DType::kFloat16:
      return to_float(static_cast<const Float16*>(array.data)[i]);
    default:
      return static_cast<const float*>(array.data)[i];
  }
}

}  // namespace peft_kernels::cuda
