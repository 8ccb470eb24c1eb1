// dx = input_scale * t + D'(du A), rounded once.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/vector.cuh"

namespace peft_kernels::cuda {

// Columns k to k + 7 of tokens m, m + kApart, ...; `t` holds the product's. A thread that has several tokens
// reads A once for all of them.
template <class T, int kCount, int kApart>
PEFT_KERNELS_DEVICE void finish_input_gradient(const InputGradient& p, int64_t m, int64_t k, float (&t)[kCount][8]) {
  float scale[8];
  if (p.input_scale) load_8(p.input_scale, k, scale);
  float low[kCount][8] = {};
  for (int64_t r = 0; r < p.rank; ++r) {
    float a[8];
    load_8(p.lora_a, r * p.in_features + k, a);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float u = m + i * kApart < p.tokens ? __ldg(p.du + (m + i * kApart) * p.rank + r) : 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) low[i][j] = fmaf(u, a[j], low[i][j]);
    }
  }
  const bool drops = p.rank != 0 && p.dropout.seed != nullptr;
  uint32_t kept = 0xFFFFFFFFu;
  if (drops) {
    kept = kept_rows<kCount>(p.dropout, static_cast<uint64_t>(__ldg(p.dropout.seed)), m * p.in_features + k,
                             kApart * p.in_features);
  }
  const float drop_scale = drops ? p.dropout.scale : 1.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t token = m + i * kApart;
    if (token >= p.tokens) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) low[i][j] = kept >> (8 * i + j) & 1 ? low[i][j] * drop_scale : 0.0f;
    if (p.input_scale) {
#pragma unroll
      for (int j = 0; j < 8; ++j) t[i][j] *= scale[j];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) t[i][j] += low[i][j];
    uint4 out = {pack<T>(t[i][0], t[i][1]), pack<T>(t[i][2], t[i][3]), pack<T>(t[i][4], t[i][5]),
                 pack<T>(t[i][6], t[i][7])};
    *reinterpret_cast<uint4*>(static_cast<T*>(p.dx.data) + token * p.in_features + k) = out;
  }
}

// Adds up the parts of a split sum, in their order. A thread has eight columns of a token.
template <class T>
__global__ void __launch_bounds__(128)
    finish_input_gradient_kernel(const __grid_constant__ InputGradient p, int splits) {
  const int64_t count = p.tokens * p.in_features, e = 8 * (int64_t{blockIdx.x} * 128 + threadIdx.x);
  if (e >= count) return;
  float t[1][8] = {};
  for (int split = 0; split < splits; ++split) {
    float part[8];
    load_8(p.partials + split * count + e, part);
#pragma unroll
    for (int j = 0; j < 8; ++j) t[0][j] += part[j];
  }
  const int64_t m = e / p.in_features;
  finish_input_gradient<T, 1, 1>(p, m, e - m * p.in_features, t);
}

}  // namespace peft_kernels::cuda
