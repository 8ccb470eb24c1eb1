// t = dz W on tensor cores, W from its 4-bit codes. W^T is the A operand of mma.m16n8k16, its rows the inputs k, the
// sum over n; eight tokens are a B operand.
//
// The rows and the terms of an mma may be numbered at will, if dz and the results are numbered alike. Lane 4 g + t
// owns eight neighbouring rows n of a step of 32, and kBytes neighbouring bytes of each. Byte i of four rows is its
// share of the A operand of an mma whose rows g and g + 8 are the inputs 2 kBytes g + 2 i, + 1:
//
//     a0 = (even half of row 0, of row 1)    a2 = (even half of row 2, of row 3)     a1, a3: the odd halves
//
// so W is transposed by packing: cvt.rn.bf16x2 takes any two floats. The B operand is then eight neighbouring n of a
// token, and a lane's results are neighbouring inputs of a token.
//
// Warps share the sum over n among them; parts are added up in an order that the shape fixes.
#pragma once

#include "cuda/device/nf4.cuh"
#include "cuda/input_gradient_epilogue.cuh"
#include "cuda/select_input_gradient.h"

namespace peft_kernels::cuda {

// Sizes of a kernel for kTokens tokens. Up to 32 tokens a warp spans the columns of its CTA and shares nothing. For
// 64 its accumulators suffice for half of the columns: two warps share dz, through shared memory.
template <int kTokens_>
struct InputGradientShape {
  static constexpr int kTokens = kTokens_, kTokenTiles = kTokens / 8;
  static constexpr bool kShared = kTokens == 64;
  static constexpr int kBytes = kShared ? 4 : 8;                        // of a row that a lane owns
  static constexpr int kWarpColumns = 16 * kBytes;                      // of 8 lanes
  static constexpr int kAcross = kInputGradientColumns / kWarpColumns;  // warps side by side
  static constexpr int kDown = kInputGradientWarps / kAcross;           // warps that share the sum
  static constexpr int kScaleBlocks = kWarpColumns / 64;                // most blocks in the columns of a warp
  static constexpr int kSharers = 32 * (kShared ? kAcross : 1);         // threads that share a copy of dz

  static constexpr int kThreads = 32 * kInputGradientWarps;
  static constexpr int kScaleBytes = kScaleBlocks * kInputGradientStep * 4;   // of a step of a warp
  static constexpr int kWeightBytes = kInputGradientStep * kWarpColumns / 2;  // of a step of a warp
  static constexpr int kGradBytes = kTokens * kInputGradientStep * 2;         // of a step
  static constexpr int kGradStages = kShared ? 2 : 1;
  // Places in shared memory.
  static constexpr int kScales = PairTable::kBytes;
  static constexpr int kWeights = kScales + kInputGradientWarps * 2 * kScaleBytes;
  static constexpr int kGrads = kWeights + kInputGradientWarps * 2 * kWeightBytes;
  static constexpr int kRing = kGrads + kDown * kGradStages * kGradBytes;
  // What takes their place after the loop: accumulators of half of the warps, then sums.
  static constexpr int kAccumulators = kBytes * kTokenTiles * 4;
  static constexpr int kSumStride = kInputGradientColumns + 4;  // floats
  static constexpr int kReduction = kInputGradientWarps / 2 * kAccumulators * 32 * 4;
  static constexpr int kSums = kTokens * kSumStride * 4;
  static constexpr int kSharedBytes = std::max(kRing, std::max(kReduction, kSums));
};

// absmax of a block as it is in memory: fp32, or kNested its code.
template <bool kNested>
PEFT_KERNELS_DEVICE uint32_t load_scale(const NF4Weight& w, uint32_t block) {
  return kNested ? __ldg(w.absmax_codes + block) : __float_as_uint(__ldg(w.absmax + block));
}
template <bool kNested>
PEFT_KERNELS_DEVICE float scale_of(const NF4Weight& w, uint32_t block, uint32_t raw) {
  return kNested ? decode_absmax(w, block, raw, __ldg(w.nested_offset)) : __uint_as_float(raw);
}

// Adds the rows of W from `row` on, fewer than a step, to the sums of columns k to k + 7 of tokens m, m + kApart, ...
template <class T, int kCount, int kApart>
PEFT_KERNELS_DEVICE void add_last_rows(const InputGradient& p, int64_t row, int64_t m, int64_t k,
                                       float (&sum)[kCount][8]) {
  for (int64_t n = row; n < p.out_features; ++n) {
    const int64_t e = n * p.in_features + k;
    float scale = load_absmax(p.weight, e >> p.weight.blocksize_log2);
    if (p.column_scale) scale *= element(p.column_scale, n);
    const uint32_t codes = __ldg(reinterpret_cast<const uint32_t*>(p.weight.packed + e / 2));
    float weight[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float code = kCodes.value[codes >> (8 * (j / 2) + (j % 2 == 0 ? 4 : 0)) & 15];
      weight[j] = to_float(from_float<T>(code * scale));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t token = m + i * kApart;
      if (token >= p.tokens) continue;
      const float g = to_float(static_cast<const T*>(p.grad.data)[token * p.grad_stride + n]);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(g, weight[j], sum[i][j]);
    }
  }
}

// This thread, asked of the hardware again, so that nothing that follows from it occupies registers before.
PEFT_KERNELS_DEVICE int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Adds the sums of the warps, the second half of them to the first, until one is left; then the rest of dx, or where
// the sum is split its part.
template <class T, class S>
PEFT_KERNELS_DEVICE void store_sums(const InputGradient& p, int splits, float (&acc)[S::kBytes][S::kTokenTiles][4],
                                    uint8_t* memory) {
  const int thread = thread_again(), lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int across = warp % S::kAcross, down = warp / S::kAcross;
  const int64_t token0 = int64_t{blockIdx.z} * S::kTokens;
  float4* const exchange = reinterpret_cast<float4*>(memory);
#pragma unroll
  for (int half = S::kDown / 2; half > 0; half /= 2) {
    const int slot = ((down % half) * S::kAcross + across) * (S::kAccumulators / 4);
    if (down >= half && down < 2 * half) {
#pragma unroll
      for (int i = 0; i < S::kBytes * S::kTokenTiles; ++i) {
        const float (&d)[4] = acc[i / S::kTokenTiles][i % S::kTokenTiles];
        exchange[(slot + i) * 32 + lane] = make_float4(d[0], d[1], d[2], d[3]);
      }
    }
    __syncthreads();
    if (down < half) {
#pragma unroll
      for (int i = 0; i < S::kBytes * S::kTokenTiles; ++i) {
        float (&d)[4] = acc[i / S::kTokenTiles][i % S::kTokenTiles];
        const float4 other = exchange[(slot + i) * 32 + lane];
        d[0] += other.x, d[1] += other.y, d[2] += other.z, d[3] += other.w;
      }
    }
    __syncthreads();
  }
  float* const sums = reinterpret_cast<float*>(memory);  // [kTokens, kSumStride]
  if (down == 0) {
#pragma unroll
    for (int i = 0; i < S::kBytes; ++i) {
#pragma unroll
      for (int j = 0; j < S::kTokenTiles; ++j) {
        float* const at = sums + (8 * j + 2 * t) * S::kSumStride + across * S::kWarpColumns + 2 * S::kBytes * g + 2 * i;
        *reinterpret_cast<float2*>(at) = make_float2(acc[i][j][0], acc[i][j][2]);
        *reinterpret_cast<float2*>(at + S::kSumStride) = make_float2(acc[i][j][1], acc[i][j][3]);
      }
    }
  }
  __syncthreads();

  // A thread has eight columns of every 16th token.
  constexpr int kApart = S::kThreads / 16, kCount = (S::kTokens + kApart - 1) / kApart;
  const int m = thread / 16, k = thread % 16 * 8;
  const int64_t column = int64_t{blockIdx.x} * kInputGradientColumns + k;
  if (m >= S::kTokens || column >= p.in_features) return;
  float sum[kCount][8];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float4* const at = reinterpret_cast<const float4*>(sums + (m + i * kApart) * S::kSumStride + k);
    const float4 low = at[0], high = at[1];
    sum[i][0] = low.x, sum[i][1] = low.y, sum[i][2] = low.z, sum[i][3] = low.w;
    sum[i][4] = high.x, sum[i][5] = high.y, sum[i][6] = high.z, sum[i][7] = high.w;
  }
  if (static_cast<int>(blockIdx.y) == splits - 1) {
    add_last_rows<T, kCount, kApart>(p, p.out_features / kInputGradientStep * kInputGradientStep, token0 + m, column,
                                     sum);
  }
  if (splits == 1) {
    finish_input_gradient<T, kCount, kApart>(p, token0 + m, column, sum);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t token = token0 + m + i * kApart;
    if (token >= p.tokens) continue;
    float4* const to = reinterpret_cast<float4*>(p.partials + (blockIdx.y * p.tokens + token) * p.in_features + column);
    to[0] = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    to[1] = make_float4(sum[i][4], sum[i][5], sum[i][6], sum[i][7]);
  }
}

// An element of an array of T or fp32.
template <class T>
PEFT_KERNELS_DEVICE float either(const Array& array, int i) {
  return array.dtype == DType::kFloat32 ? __ldg(static_cast<const float*>(array.data) + i)
                                        : to_float(static_cast<const T*>(array.data)[i]);
}

// Address of a piece of 16 bytes, by one instruction.
PEFT_KERNELS_DEVICE const void* piece_of(const void* p, uint32_t number) {
  const void* q;
  asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(q) : "r"(number), "l"(p));
  return q;
}

// CTAs of a multiprocessor, of eight warps each. Shared memory of 100 KiB holds one; accumulators of 128 registers
// leave room for one.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
constexpr int kInputGradientMostCtas = 1;
#else
constexpr int kInputGradientMostCtas = 2;
#endif

template <class T, int kTokens, bool kNested>
__global__ void __launch_bounds__(InputGradientShape<kTokens>::kThreads, kTokens <= 16 ? kInputGradientMostCtas : 1)
    input_gradient_kernel(const __grid_constant__ InputGradient p, int splits) {
  using S = InputGradientShape<kTokens>;
  constexpr int kBytes = S::kBytes, kTokenTiles = S::kTokenTiles, kStep = kInputGradientStep;
  extern __shared__ __align__(128) uint8_t memory[];
  PairTable& table = *reinterpret_cast<PairTable*>(memory);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int across = warp % S::kAcross, down = warp / S::kAcross;
  const int64_t token0 = int64_t{blockIdx.z} * kTokens;
  const int column0 = blockIdx.x * kInputGradientColumns + across * S::kWarpColumns;
  const uint32_t shared = shared_address(memory);

  // The loop takes whole steps of rows of W; those of this warp are first + down, first + down + kDown, ... Nothing in
  // it is masked: what is outside of dz or W (tokens, columns) is read from inside, for results that are not stored.
  const int steps = static_cast<int>(p.out_features / kStep), part = (steps + splits - 1) / splits;
  const int first = blockIdx.y * part, last = min(first + part, steps);
  const int64_t row = int64_t{first + down} * kStep;

  // ---- Codes, to shared memory by cp.async. A lane copies 16 bytes of kBytes / 2 rows. Rows 8 t + j, j fixed, stand
  // side by side in a line of 128 bytes, half a row in a line where kBytes is 8: neither copies nor reads conflict.
  constexpr int kChunks = kBytes / 2, kRowsApart = 8 / kChunks;  // of 16 bytes in a row; j of a lane's copies
  const uint32_t weights = shared + S::kWeights + warp * (2 * S::kWeightBytes);
  const int chunk = lane % kChunks, copy_t = lane / kChunks & 3, copy_j = lane / kChunks / 4;
  const uint32_t copy_to =
      keep(weights + copy_j * 32 * kBytes + (chunk >> 1) * 128 + ((copy_t ^ (chunk >> 1) * 2) * 32) + (chunk & 1) * 16);
  const uint32_t row_pieces = static_cast<uint32_t>(p.in_features / 32);  // of 16 bytes
  uint32_t packed = static_cast<uint32_t>(row + 8 * copy_t + copy_j) * row_pieces +
                    min(static_cast<uint32_t>(column0 / 32 + chunk), row_pieces - 1);
  const uint32_t read_from =
      weights + (kBytes == 8 ? (g >> 2) * 128 + ((t ^ (g >> 2) * 2) * 32) + (g & 3) * 8 : t * 32 + g * 4);

  // ---- dz, by cp.async too. A thread copies 16 bytes, eight rows, of tokens that are kGradsApart apart.
  const int sharer = across * 32 + lane;
  const int grad_token = sharer / 4, grad_row = sharer % 4 * 8;
  constexpr int kGradsApart = S::kSharers / 4, kGradCopies = kTokens / kGradsApart;
  uint32_t grad[kGradCopies];  // pieces of 16 bytes to the rows of each token
#pragma unroll
  for (int i = 0; i < kGradCopies; ++i) {
    const int64_t token = min(token0 + grad_token + i * kGradsApart, p.tokens - 1);
    grad[i] = keep(static_cast<uint32_t>(token * (p.grad_stride / 8) + (row + grad_row) / 8));
  }
  const uint32_t grads = shared + S::kGrads + down * (S::kGradStages * S::kGradBytes);
  const uint32_t grad_to = grads + sharer * 16;
  const uint32_t grad_from = S::kShared ? keep(grads + lane * 16) : grad_to;

  // ---- Scales: absmax times column_scale. A lane fetches those of row `lane`, all read them from shared memory.
  const int log2 = p.weight.blocksize_log2, row_blocks = static_cast<int>(p.in_features >> log2);
  const int block0 = min(column0 >> log2, row_blocks - 1);
  const bool two_blocks = S::kScaleBlocks == 2 && log2 == 6 && block0 + 1 < row_blocks;
  float* const scales = reinterpret_cast<float*>(memory + S::kScales + warp * (2 * S::kScaleBytes));
  const float4* const my_scales = reinterpret_cast<const float4*>(scales + (two_blocks ? g / 4 : 0) * kStep + 8 * t);
  uint32_t raw[2] = {0, 0};
  float column_scale = 1.0f;

  uint32_t block = static_cast<uint32_t>(row - S::kDown * kStep + lane) * row_blocks + block0;  // fetched last

  const auto fetch = [&](int step, unsigned stage) {  // steps in their order
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      copy_async_16(copy_to + stage * S::kWeightBytes + i * kRowsApart * 32 * kBytes,
                    piece_of(p.weight.packed, packed + i * kRowsApart * row_pieces));
    }
#pragma unroll
    for (int i = 0; i < kGradCopies; ++i) {
      copy_async_16(grad_to + stage % S::kGradStages * S::kGradBytes + i * S::kSharers * 16,
                    piece_of(p.grad.data, grad[i]));
      grad[i] += S::kDown * kStep / 8;
    }
    copy_async_commit();
    block += S::kDown * kStep * row_blocks;
    raw[0] = load_scale<kNested>(p.weight, block);
    if (two_blocks) raw[1] = load_scale<kNested>(p.weight, block + 1);
    if (p.column_scale) column_scale = either<T>(p.column_scale, step * kStep + lane);
    packed += S::kDown * kStep * row_pieces;
  };

  float acc[kBytes][kTokenTiles][4] = {};
  if (first + down < last) fetch(first + down, 0);
  table.fill(threadIdx.x, S::kThreads);
  if constexpr (!S::kShared) __syncthreads();
  const uint32_t copy = table.copy_of(lane);
  unsigned stage = 0;
#pragma unroll(kTokens == 16 ? 1 : 2)
  for (int step = first + down; step < last + (S::kShared ? down : 0); step += S::kDown, stage ^= 1) {
    if (step < last) {
      float* const at = scales + stage * (S::kScaleBytes / 4);
      at[lane] = scale_of<kNested>(p.weight, block, raw[0]) * column_scale;
      if (two_blocks) {
        at[kStep + lane] = scale_of<kNested>(p.weight, block + 1, raw[1]) * column_scale;
      }
    }
    copy_async_wait<0>();
    if constexpr (S::kShared) {
      __syncthreads();  // of all warps, in every turn
      if (step >= last) break;
    } else {
      __syncwarp();  // a lane's dz is its own, and needs none: codes and scales do
    }
    uint4 dz[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      dz[j] = load_shared_16(grad_from + stage % S::kGradStages * S::kGradBytes + j * 512);
    }
    if (step + S::kDown < last) fetch(step + S::kDown, stage ^ 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows 8 t to 8 t + 3, then to 8 t + 7
      const float4 scale = my_scales[stage * (S::kScaleBytes / 16) + half];
      uint32_t word[4][kBytes / 4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        load_shared(word[j], read_from + stage * S::kWeightBytes + (4 * half + j) * 32 * kBytes);
      }
#pragma unroll
      for (int i = 0; i < kBytes; ++i) {
        float2 pair[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) pair[j] = look_up_pair(copy, word[j][i / 4], i % 4);
        const uint32_t a0 = pack<T>(pair[0].x * scale.x, pair[1].x * scale.y);
        const uint32_t a1 = pack<T>(pair[0].y * scale.x, pair[1].y * scale.y);
        const uint32_t a2 = pack<T>(pair[2].x * scale.z, pair[3].x * scale.w);
        const uint32_t a3 = pack<T>(pair[2].y * scale.z, pair[3].y * scale.w);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          mma<T>(acc[i][j], a0, a1, a2, a3, half == 0 ? dz[j].x : dz[j].z, half == 0 ? dz[j].y : dz[j].w);
        }
      }
    }
  }
  __syncthreads();
  store_sums<T, S>(p, splits, acc, memory);
}

}  // namespace peft_kernels::cuda
