// Eight neighbouring elements of a row, and the dropout mask for them.
#pragma once

#include "common/philox.h"
#include "cuda/api.h"
#include "cuda/device/types.cuh"

namespace peft_kernels::cuda {

PEFT_KERNELS_DEVICE bool aligned_16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

PEFT_KERNELS_DEVICE void unpack(const uint4& v, const BFloat16*, float (&out)[8]) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(word[i] << 16);
    out[2 * i + 1] = __uint_as_float(word[i] & 0xFFFF0000u);
  }
}
PEFT_KERNELS_DEVICE void unpack(const uint4& v, const Float16*, float (&out)[8]) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = *reinterpret_cast<const __half2*>(&word[i]);
    out[2 * i] = __low2float(pair);
    out[2 * i + 1] = __high2float(pair);
  }
}

// p[0] to p[7], at a multiple of 16 bytes.
PEFT_KERNELS_DEVICE void load_8(const float* p, float (&out)[8]) {
  const float4 low = __ldg(reinterpret_cast<const float4*>(p)), high = __ldg(reinterpret_cast<const float4*>(p) + 1);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}
template <class T>
PEFT_KERNELS_DEVICE void load_8(const T* p, float (&out)[8]) {
  unpack(__ldg(reinterpret_cast<const uint4*>(p)), p, out);
}

// The same of an array whose dtype and alignment are known at run time only: for epilogues, not for loops.
PEFT_KERNELS_DEVICE void load_8(const Array& array, int64_t i, float (&out)[8]) {
  if (!aligned_16(array.data)) {
    for (int j = 0; j < 8; ++j) out[j] = element(array, i + j);
  } else if (array.dtype == DType::kFloat32) {
    load_8(static_cast<const float*>(array.data) + i, out);
  } else if (array.dtype == DType::kBFloat16) {
    load_8(static_cast<const BFloat16*>(array.data) + i, out);
  } else {
    load_8(static_cast<const Float16*>(array.data) + i, out);
  }
}

PEFT_KERNELS_DEVICE PhiloxWords dropout_words(uint64_t seed, uint64_t group) {
  return philox4x32({{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0, 0}},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Zeros in place of the elements e to e + 7 that dropout drops; without its scale.
PEFT_KERNELS_DEVICE void drop_8(const Dropout& dropout, uint64_t seed, uint64_t e, float (&values)[8]) {
  if ((e & 3) == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const PhiloxWords words = dropout_words(seed, (e >> 2) + half);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[4 * half + j] = words.word[j] >= dropout.threshold ? values[4 * half + j] : 0;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const PhiloxWords words = dropout_words(seed, (e + j) >> 2);
      const int w = static_cast<int>((e + j) & 3);
      const uint32_t word = w < 2 ? (w == 0 ? words.word[0] : words.word[1]) : (w == 2 ? words.word[2] : words.word[3]);
      if (word < dropout.threshold) values[j] = 0;
    }
  }
}

}  // namespace peft_kernels::cuda
