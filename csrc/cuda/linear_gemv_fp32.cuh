// y of up to four fp32 tokens, W unrounded: no tensor cores. A CTA of four warps has 16 outputs, a warp 4 of them, so
// that an x in registers serves 4 weights. A lane has 32 of a chunk's 1024 inputs, half a block, and adds in fp32.
#pragma once

#include "cuda/device/epilogue.cuh"
#include "cuda/linear_tile.cuh"

namespace peft_kernels::cuda {

struct GemvFp32 {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 4, kOutputs = kRows * kWarps;
  static constexpr int kInputs = 32, kChunk = 32 * kInputs;  // of a lane, of a warp
  static constexpr int kStages = 3;                          // of the ring of x: a quarter of a chunk each
};

template <int kTokens, bool kNested>
__global__ void __launch_bounds__(GemvFp32::kThreads, 3) linear_gemv_fp32_kernel(const __grid_constant__ Linear p) {
  constexpr int kRows = GemvFp32::kRows, kStageBytes = kTokens * 1024;
  constexpr int kRingBytes = GemvFp32::kStages * kStageBytes;
  using Sums = Parts<kTokens, GemvFp32::kOutputs, 1>;
  static_assert(sizeof(float) * Sums::kFloats <= kRingBytes);
  __shared__ __align__(128) unsigned char shared[kRingBytes + PairTable::kBytes];
  PairTable& pairs = *reinterpret_cast<PairTable*>(shared + kRingBytes);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * GemvFp32::kOutputs;
  const int inputs = static_cast<int>(p.in_features), pieces = inputs / GemvFp32::kInputs, chunks = (pieces + 31) / 32;

  // ---- x: 8 inputs of every lane at a time, [token][lane][half ^ (lane / 4 & 1)][4]: nothing conflicts. A thread
  // copies 16 bytes of every second token.
  const int to_lane = (threadIdx.x >> 1) & 31, to_half = threadIdx.x & 1, to_token = threadIdx.x >> 6;
  constexpr int kCopies = (kTokens + 1) / 2;
  const float* x[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i)
    x[i] = static_cast<const float*>(p.x.data) + min(int64_t{to_token + 2 * i}, p.tokens - 1) * p.x_stride;
  const uint32_t copy_to =
      shared_address(shared) + to_token * 1024 + to_lane * 32 + (to_half ^ (to_lane >> 2 & 1)) * 16;
  const auto stage = [&](int quarter, int slot) {
    const int first = (quarter >> 2) * GemvFp32::kChunk + to_lane * GemvFp32::kInputs;
    if (to_token < kTokens) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        copy_async_16(copy_to + slot * kStageBytes + i * 2048, x[i] + first + (quarter & 3) * 8 + to_half * 4,
                      first < inputs);  // zeros beyond K
    }
    copy_async_commit();
  };
  const auto after = [](int slot) { return slot + 1 == GemvFp32::kStages ? 0 : slot + 1; };

  // ---- W: a chunk ahead
  int64_t rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = min(first_output + warp * kRows + r, p.out_features - 1);
  const Scales<kRows, kNested> scales(p.weight, rows, p.in_features);
  const uint4* codes[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    codes[r] = reinterpret_cast<const uint4*>(p.weight.packed + rows[r] * (p.in_features / 2));
  uint4 words[kRows], next_words[kRows];
  typename Scales<kRows, kNested>::Stored next_absmax[kRows];
  const auto load = [&](uint4(&to)[kRows], int chunk) {
    const int piece = min(chunk * 32 + lane, pieces - 1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) to[r] = load_stream(codes[r] + piece);
    scales.load(next_absmax, piece >> 1);
  };

  stage(0, 0);
  stage(1, 1);
  load(words, 0);
  pairs.fill(threadIdx.x, GemvFp32::kThreads);
  const uint32_t copy = pairs.copy_of(lane);
  float sum[kRows][kTokens] = {};
  int read = 0, write = 2;
  const uint32_t read_from = shared_address(shared) + lane * 32 + (lane >> 2 & 1) * 16;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int piece = chunk * 32 + lane;
    float absmax[kRows];
    scales.decode(absmax, next_absmax, min(piece, pieces - 1) >> 1, piece < pieces);
    load(next_words, chunk + 1);
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      copy_async_wait<1>();
      __syncthreads();  // this quarter has come for all, and all are done with the one before
      stage(4 * chunk + quarter + 2, write);
      const uint32_t from = read_from + read * kStageBytes;
      read = after(read);
      write = after(write);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kTokens][4];
#pragma unroll
        for (int m = 0; m < kTokens; ++m) {
          const uint4 v = load_shared_16((from ^ (half * 16)) + m * 1024);
#pragma unroll
          for (int i = 0; i < 4; ++i) x[m][i] = __uint_as_float(component(v, i));
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const uint32_t word = component(words[r], quarter);
          const float2 a = half == 0 ? look_up_pair<0>(copy, word) : look_up_pair<2>(copy, word);
          const float2 b = half == 0 ? look_up_pair<1>(copy, word) : look_up_pair<3>(copy, word);
          const float w[4] = {a.x * absmax[r], a.y * absmax[r], b.x * absmax[r], b.y * absmax[r]};
#pragma unroll
          for (int m = 0; m < kTokens; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[r][m] = fmaf(w[i], x[m][i], sum[r][m]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) words[r] = next_words[r];
  }

  for (int64_t j = lane; j < p.rank; j += 32) {
    float u[kTokens];
#pragma unroll
    for (int m = 0; m < kTokens; ++m) u[m] = p.scaling * __ldg(p.u + min(int64_t{m}, p.tokens - 1) * p.rank + j);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float b = element(p.lora_b, rows[r] * p.rank + j);
#pragma unroll
      for (int m = 0; m < kTokens; ++m) sum[r][m] = fmaf(u[m], b, sum[r][m]);
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // the sums lie where x was
  float* parts = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
#pragma unroll
      for (int step = 16; step > 0; step >>= 1) sum[r][m] += __shfl_xor_sync(0xFFFFFFFFu, sum[r][m], step);
      if (lane == 0) parts[m * Sums::kStride + warp * kRows + r] = sum[r][m];
    }
  __syncthreads();
  Sums::template finish<float, GemvFp32::kThreads>(parts, p, 0, first_output);
}

}  // namespace peft_kernels::cuda
