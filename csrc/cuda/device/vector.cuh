// Eight neighbouring elements of a row, and the dropout mask for them.
#pragma once

#include "common/philox.h"
#include "cuda/api.h"
#include "cuda/device/types.cuh"

namespace peft_kernels::cuda {

// p[0] to p[7], at a multiple of 16 bytes.
PEFT_KERNELS_DEVICE void load_8(const float* p, float (&out)[8]) {
  const float4 low = __ldg(reinterpret_cast<const float4*>(p)), high = __ldg(reinterpret_cast<const float4*>(p) + 1);
  out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
  out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
}
template <class T>
PEFT_KERNELS_DEVICE void load_8(const T* p, float (&out)[8]) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(word[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}

// The same of an array whose dtype and alignment are known at run time only: for epilogues, not for loops.
PEFT_KERNELS_DEVICE void load_8(const Array& array, int64_t i, float (&out)[8]) {
  if (!aligned_to(array.data, 16)) {
    for (int j = 0; j < 8; ++j) out[j] = element(array, i + j);
  } else if (array.dtype == DType::kFloat32) {
    load_8(static_cast<const float*>(array.data) + i, out);
  } else if (array.dtype == DType::kBFloat16) {
    load_8(static_cast<const BFloat16*>(array.data) + i, out);
  } else {
    load_8(static_cast<const Float16*>(array.data) + i, out);
  }
}

// Which of the elements e to e + 7 dropout keeps: bits 0 to 7. A group of four elements has the words of one call of
// Philox; eight that begin inside a group have a part of three.
PEFT_KERNELS_DEVICE uint32_t kept_8(const Dropout& dropout, uint64_t seed, uint64_t e) {
  const int inside = static_cast<int>(e & 3);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i == 2 && inside == 0) break;
    const uint64_t group = (e >> 2) + i;
    const PhiloxWords words = philox4x32({{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0, 0}},
                                         static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
#pragma unroll
    for (int j = 0; j < 4; ++j) bits |= (words.word[j] >= dropout.threshold ? 1u : 0u) << (4 * i + j);
  }
  return bits >> inside & 0xFF;
}

// The same of up to four rows, `stride` elements apart, eight bits each. One call at a time: code is short.
template <int kCount>
PEFT_KERNELS_DEVICE uint32_t kept_rows(const Dropout& dropout, uint64_t seed, uint64_t e, uint64_t stride) {
  static_assert(kCount <= 4);
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) bits |= kept_8(dropout, seed, e + i * stride) << (8 * i);
  return bits;
}

}  // namespace peft_kernels::cuda
