// u = D(x) A^T in fp32, the low-rank product that comes before x W^T and adds to its latency: one launch. A CTA has a
// few tokens and ranks; its threads share the sum over K.
#include "cuda/device/vector.cuh"
#include "cuda/launch.h"

namespace peft_kernels::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTokens = 4, kRanks = 4;  // of a CTA, at most
constexpr unsigned kManyCtas = 64;      // with fewer, a CTA has one rank: more of them read at once

// Elements k to k + 7 of a row of `length`, at any address; zeros from its end on.
template <class T>
PEFT_KERNELS_DEVICE void load_any_8(const T* row, int64_t k, int64_t length, float (&out)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) out[j] = k + j < length ? to_float(row[k + j]) : 0.0f;
}

// This thread's part of the sums. Tokens and ranks outside are read from inside, and not stored.
template <class X, class A, int kCountTokens, int kCountRanks>
PEFT_KERNELS_DEVICE void add_products(const Projection& p, int64_t token0, int64_t rank0,
                                      float (&sum)[kCountTokens][kCountRanks]) {
  const bool vectors =
      p.in_features % 8 == 0 && p.x_stride % 8 == 0 && aligned_to(p.x.data, 16) && aligned_to(p.a.data, 16);
  const bool drops = p.dropout.seed != nullptr;
  const uint64_t seed = drops ? static_cast<uint64_t>(__ldg(p.dropout.seed)) : 0;
  const auto x_row = [&](int i) {
    return static_cast<const X*>(p.x.data) + min(token0 + i, p.tokens - 1) * p.x_stride;
  };
  const auto a_row = [&](int j) {
    return static_cast<const A*>(p.a.data) + min(rank0 + j, p.rank - 1) * p.in_features;
  };
  for (int64_t k = 8 * threadIdx.x; k < p.in_features; k += 8 * kThreads) {
    float x[kCountTokens][8], a[kCountRanks][8];
    if (vectors) {
#pragma unroll
      for (int i = 0; i < kCountTokens; ++i) load_8(x_row(i) + k, x[i]);
#pragma unroll
      for (int j = 0; j < kCountRanks; ++j) load_8(a_row(j) + k, a[j]);
    } else {
#pragma unroll
      for (int i = 0; i < kCountTokens; ++i) load_any_8(x_row(i), k, p.in_features, x[i]);
#pragma unroll
      for (int j = 0; j < kCountRanks; ++j) load_any_8(a_row(j), k, p.in_features, a[j]);
    }
    if (drops) {
      const uint32_t kept = kept_rows<kCountTokens>(p.dropout, seed, token0 * p.in_features + k, p.in_features);
#pragma unroll
      for (int i = 0; i < kCountTokens; ++i) {
#pragma unroll
        for (int e = 0; e < 8; ++e) x[i][e] = kept >> (8 * i + e) & 1 ? x[i][e] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kCountTokens; ++i) {
#pragma unroll
      for (int j = 0; j < kCountRanks; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[i][j] = fmaf(x[i][e], a[j][e], sum[i][j]);
      }
    }
  }
}

template <class X, class A, int kCountTokens, int kCountRanks>
__global__ void __launch_bounds__(kThreads) project_kernel(const __grid_constant__ Projection p) {
  constexpr int kCount = kCountTokens * kCountRanks;
  __shared__ float parts[kWarps][kCount];
  const int64_t rank0 = int64_t{blockIdx.x} * kCountRanks, token0 = int64_t{blockIdx.y} * kCountTokens;
  float sum[kCountTokens][kCountRanks] = {};
  add_products<X, A>(p, token0, rank0, sum);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float& s = sum[i / kCountRanks][i % kCountRanks];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) s += __shfl_xor_sync(kAllLanes, s, lanes);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][i] = s;
  }
  __syncthreads();
  if (threadIdx.x >= kCount) return;
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += parts[warp][threadIdx.x];
  const int64_t token = token0 + threadIdx.x / kCountRanks, rank = rank0 + threadIdx.x % kCountRanks;
  if (token < p.tokens && rank < p.rank) {
    p.u[token * p.rank + rank] = p.dropout.seed != nullptr ? total * p.dropout.scale : total;
  }
}

template <class X, class A>
const char* launch(const Projection& p, cudaStream_t stream) {
  const unsigned ranks = static_cast<unsigned>(p.rank), tiles = ceil_div(p.tokens, kTokens);
  if (p.tokens == 1) {
    project_kernel<X, A, 1, 1><<<ranks, kThreads, 0, stream>>>(p);
  } else if (ceil_div(ranks, kRanks) * tiles < kManyCtas) {
    project_kernel<X, A, kTokens, 1><<<dim3(ranks, tiles), kThreads, 0, stream>>>(p);
  } else {
    project_kernel<X, A, kTokens, kRanks><<<dim3(ceil_div(ranks, kRanks), tiles), kThreads, 0, stream>>>(p);
  }
  return launched();
}

template <class X>
const char* launch_for(const Projection& p, cudaStream_t stream) {
  return p.a.dtype == DType::kFloat32 ? launch<X, float>(p, stream) : launch<X, X>(p, stream);
}

}  // namespace

const char* project(const Projection& problem, Stream stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (problem.x.dtype) {
    case DType::kBFloat16:
      return launch_for<BFloat16>(problem, on);
    case DType::kFloat16:
      return launch_for<Float16>(problem, on);
    default:
      return launch<float, float>(problem, on);
  }
}

}  // namespace peft_kernels::cuda
