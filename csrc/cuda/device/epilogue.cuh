// What follows x W^T in the same kernel: the low-rank product, the sum of the warps' parts, scale and bias.
#pragma once

#include "cuda/api.h"
#include "cuda/device/ptx.cuh"

namespace peft_kernels::cuda {

// v = high + low, both in TF32, to 22 bits.
struct Split {
  uint32_t high, low;
  PEFT_KERNELS_DEVICE explicit Split(float v) : high(to_tf32(v)) {
    const float h = __uint_as_float(high);
    low = isinf(h) ? 0u : to_tf32(v - h);  // not inf - inf
  }
};

// Accumulators += scaling * u B^T, as exact as in fp32: three products of TF32, two where B has 16 bits and is one
// part. A warp's tile begins at `first_row` of B and `first_token`; of the steps of 8 ranks it takes `step`, `step` +
// `steps`, ...
template <int kRowTiles, int kTokenTiles>
PEFT_KERNELS_DEVICE void add_low_rank(float (&sum)[kRowTiles][kTokenTiles][4], const Linear& p, int64_t first_row,
                                      int64_t first_token, int step, int steps) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  for (int64_t r = 8 * step; r < p.rank; r += 8 * steps) {
    uint32_t b_high[kRowTiles][4], b_low[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t row = min(first_row + 16 * i + g + (e & 1) * 8, p.out_features - 1), j = r + t + (e >> 1) * 4;
        const Split b(j < p.rank ? element(p.lora_b, row * p.rank + j) : 0.0f);
        b_high[i][e] = b.high;
        b_low[i][e] = b.low;
      }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const float* row = p.u + min(first_token + 8 * j + g, p.tokens - 1) * p.rank + r;
      const Split u0(r + t < p.rank ? p.scaling * __ldg(row + t) : 0.0f);
      const Split u1(r + t + 4 < p.rank ? p.scaling * __ldg(row + t + 4) : 0.0f);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_tf32(sum[i][j], b_high[i], u0.high, u1.high);
        mma_tf32(sum[i][j], b_high[i], u0.low, u1.low);
      }
      if (p.lora_b.dtype == DType::kFloat32) {
        const auto finite = [](uint32_t v) { return isfinite(__uint_as_float(v)) ? v : 0u; };  // not 0 * inf
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) mma_tf32(sum[i][j], b_low[i], finite(u0.high), finite(u1.high));
      }
    }
  }
}

// Parts of a CTA's tile of z, in shared memory: [kParts, kTokens, kOutputs], rows padded so that fragments do not
// conflict.
template <int kTokens, int kOutputs, int kParts>
struct Parts {
  static constexpr int kStride = kOutputs + 4, kFloats = kParts * kTokens * kStride;

  // The accumulators of one warp and 16 rows, of which the first is output `first` of the tile.
  template <int kTokenTiles>
  PEFT_KERNELS_DEVICE static void put(float* shared, int part, int first, const float (&sum)[kTokenTiles][4]) {
    const int lane = threadIdx.x & 31;
    float* to = shared + (part * kTokens + 2 * (lane & 3)) * kStride + first + (lane >> 2);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) to[(8 * j + (e & 1)) * kStride + (e >> 1) * 8] = sum[j][e];
  }

  // Adds the parts up in order, and writes y and z. By kThreads threads, a multiple of kOutputs.
  template <class T, int kThreads>
  PEFT_KERNELS_DEVICE static void finish(const float* shared, const Linear& p, int64_t first_token,
                                         int64_t first_output) {
    static_assert(kThreads % kOutputs == 0);
    const int column = threadIdx.x % kOutputs;
    const int64_t output = first_output + column;
    if (output >= p.out_features) return;
    const float scale = p.column_scale ? element(p.column_scale, output) : 1.0f;
    const float bias = p.bias ? element(p.bias, output) : 0.0f;
    for (int m = threadIdx.x / kOutputs; m < kTokens && first_token + m < p.tokens; m += kThreads / kOutputs) {
      float z = shared[m * kStride + column];
#pragma unroll
      for (int part = 1; part < kParts; ++part) z += shared[(part * kTokens + m) * kStride + column];
      const int64_t at = (first_token + m) * p.out_features + output;
      if (p.z) static_cast<T*>(p.z.data)[at] = from_float<T>(z);
      static_cast<T*>(p.y.data)[at] = from_float<T>(fmaf(scale, z, bias));
    }
  }
};

}  // namespace peft_kernels::cuda
