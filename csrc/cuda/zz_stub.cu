#include "cuda/api.h"
#include "cuda/launch.h"
#include "cuda/device/types.cuh"
#include "common/philox.h"
namespace peft_kernels::cuda {
__device__ bool keep(const Dropout& d, int64_t e) {
  if (!d.seed) return true;
  uint32_t key0 = (uint32_t)*d.seed, key1 = (uint32_t)((uint64_t)*d.seed >> 32), c0 = (uint32_t)(e >> 2), c1 = (uint32_t)((uint64_t)e >> 34), c2 = 0, c3 = 0;
  for (int r = 0; r < 10; ++r) { uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2; c0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0; c1 = (uint32_t)p1; c2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1; c3 = (uint32_t)p0; key0 += 0x9E3779B9u; key1 += 0xBB67AE85u; }
  int w = e & 3; return (w == 0 ? c0 : w == 1 ? c1 : w == 2 ? c2 : c3) >= d.threshold;
}
__global__ void stub_project(const __grid_constant__ Projection p) {
  const int64_t i = blockIdx.x; const int64_t m = i / p.rank, r = i % p.rank;
  if (threadIdx.x != 0) return;
  float s = 0;
  for (int64_t k = 0; k < p.in_features; ++k) if (keep(p.dropout, m * p.in_features + k)) s = fmaf(element(p.x, m * p.x_stride + k), element(p.a, r * p.in_features + k), s);
  p.u[i] = p.dropout.seed ? s * p.dropout.scale : s;
}
const char* project(const Projection& p, Stream s) { stub_project<<<p.tokens * p.rank, 32, 0, (cudaStream_t)s>>>(p); return launched(); }
const char* input_gradient(const InputGradient&, const Plan&, Stream) { return "stub"; }
const char* dora_norm(const DoraNorm&, int64_t, Stream) { return "stub"; }
}
