// || W[n] + scaling * B[n] A || by rows. The squares: rows of W + scaling * B A are formed in registers and summed by
// splits of K. The finish: sums of a row are added up in order and tested; a row that fails is made again in fp64.
// What the test is, and why it is enough: peft_kernels/ops/dora/README.md.
#pragma once

#include <type_traits>

#include "cuda/api.h"
#include "cuda/device/nf4.cuh"

namespace peft_kernels::cuda {

inline constexpr int kNormThreads = 128;
inline constexpr int kNormRows = 64, kNormColumns = 128;  // of a CTA's tile
inline constexpr int kNormRanks = 16;                     // of A in shared memory
inline constexpr int kNormResident = 64;                  // ranks up to which B stays in shared memory
inline constexpr unsigned kNormAllLanes = 0xFFFFFFFFu;

// scaling in two fp32 numbers: its rounding would be the same for all of a row's elements, and not average.
struct NormScaling {
  float high, low;
};

// One element of W, wherever it lies.
PEFT_KERNELS_DEVICE float norm_weight(const DoraNorm& p, int64_t n, int64_t k) {
  if (p.weight.packed == nullptr) return element(p.dense, n * p.dense_strides[0] + k * p.dense_strides[1]);
  const int64_t e = n * p.in_features + k;
  const int byte = __ldg(p.weight.packed + (e >> 1));
  return kCodes.value[e & 1 ? byte & 15 : byte >> 4] * load_absmax(p.weight, e >> p.weight.blocksize_log2);
}

PEFT_KERNELS_DEVICE float2 unpack_pair(uint32_t word, BFloat16) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
}
PEFT_KERNELS_DEVICE float2 unpack_pair(uint32_t word, Float16) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// Elements i to i + 3 of an array, zeros from the `count`th on; `whole` if they lie on a multiple of their size.
PEFT_KERNELS_DEVICE float4 load_four(const Array& array, int64_t i, int64_t count, bool whole) {
  if (whole && count >= 4) {
    if (array.dtype == DType::kFloat32) return __ldg(reinterpret_cast<const float4*>(array.data) + (i >> 2));
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(array.data) + (i >> 2));
    const bool bfloat = array.dtype == DType::kBFloat16;
    const float2 low = bfloat ? unpack_pair(words.x, BFloat16{}) : unpack_pair(words.x, Float16{});
    const float2 high = bfloat ? unpack_pair(words.y, BFloat16{}) : unpack_pair(words.y, Float16{});
    return make_float4(low.x, low.y, high.x, high.y);
  }
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (count > 0) v.x = element(array, i);
  if (count > 1) v.y = element(array, i + 1);
  if (count > 2) v.z = element(array, i + 2);
  if (count > 3) v.w = element(array, i + 3);
  return v;
}
PEFT_KERNELS_DEVICE bool fours_are_whole(const Array& array, int64_t columns) {
  const int size = array.dtype == DType::kFloat32 ? 16 : 8;
  return columns % 4 == 0 && reinterpret_cast<uintptr_t>(array.data) % size == 0;
}

// ---- Ways to read W: columns of a thread, and its eight in one row -------------------------------------------------

// NF4 rows of whole words: eight inputs share four bytes and an absmax, whatever the blocksize.
struct NormNF4 {
  static constexpr int kGroup = 8;  // adjacent columns of a thread
  static constexpr int kCtas = 4;   // wanted on a multiprocessor
  const NF4Weight& w;
  float code;  // of this lane's number modulo 16
  PEFT_KERNELS_DEVICE explicit NormNF4(const DoraNorm& p) : w(p.weight), code(kCodes.value[threadIdx.x & 15]) {}

  struct Row {
    uint32_t word = 0x77777777u;
    float absmax = 0.0f;
  };
  PEFT_KERNELS_DEVICE Row load(const DoraNorm& p, int64_t n, int64_t k) const {
    Row row;
    if (n < p.out_features && k < p.in_features) {
      const int64_t e = n * p.in_features + k;
      row.word = __ldg(reinterpret_cast<const uint32_t*>(w.packed) + (e >> 3));
      row.absmax = load_absmax(w, e >> w.blocksize_log2);
    }
    return row;
  }
  PEFT_KERNELS_DEVICE void decode(const Row& row, float (&out)[8]) const {
#pragma unroll
    for (int k = 0; k < 8; ++k) {  // a shuffle reads five bits of its index
      out[k] = __shfl_sync(kNormAllLanes, code, row.word >> (4 * (k ^ 1))) * row.absmax;
    }
  }
};

// Dense rows that 16-byte loads may read.
template <class T>
struct NormDense {
  static constexpr int kGroup = 16 / sizeof(T);
  static constexpr int kCtas = sizeof(T) == 4 ? 3 : 4;
  PEFT_KERNELS_DEVICE explicit NormDense(const DoraNorm&) {}

  struct Row {
    uint4 part[8 / kGroup];
  };
  PEFT_KERNELS_DEVICE Row load(const DoraNorm& p, int64_t n, int64_t k) const {
    Row row;
#pragma unroll
    for (int i = 0; i < 8 / kGroup; ++i) {
      const int64_t column = k + i * (kNormColumns / 2);
      row.part[i] = make_uint4(0, 0, 0, 0);
      if (n < p.out_features && column < p.in_features) {
        row.part[i] = load_stream(static_cast<const T*>(p.dense.data) + n * p.dense_strides[0] + column);
      }
    }
    return row;
  }
  PEFT_KERNELS_DEVICE void decode(const Row& row, float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < 8 / kGroup; ++i) {
      const uint32_t words[4] = {row.part[i].x, row.part[i].y, row.part[i].z, row.part[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          out[4 * i + j] = __uint_as_float(words[j]);
        } else {
          const float2 pair = unpack_pair(words[j], T{});
          out[2 * j] = pair.x;
          out[2 * j + 1] = pair.y;
        }
      }
    }
  }
};

// Anything else, element by element.
struct NormElements {
  static constexpr int kGroup = 8;
  static constexpr int kCtas = 3;
  PEFT_KERNELS_DEVICE explicit NormElements(const DoraNorm&) {}

  struct Row {
    float value[8];
  };
  PEFT_KERNELS_DEVICE Row load(const DoraNorm& p, int64_t n, int64_t k) const {
    Row row;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      row.value[i] = n < p.out_features && k + i < p.in_features ? norm_weight(p, n, k + i) : 0.0f;
    }
    return row;
  }
  PEFT_KERNELS_DEVICE void decode(const Row& row, float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = row.value[i];
  }
};

// ---- The squares ---------------------------------------------------------------------------------------------------

// most[i] = max|A_i|, by one CTA.
PEFT_KERNELS_DEVICE void store_largest(const DoraNorm& p, int64_t i, float (&of_warp)[kNormThreads / 32]) {
  float most = 0.0f;  // NaN is passed over: its rows fail the test by their sums
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < p.in_features; k += kNormThreads) {
    most = fmaxf(most, fabsf(element(p.a, i * p.in_features + k)));
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(kNormAllLanes, most, step));
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = most;
  __syncthreads();
  if (threadIdx.x == 0) p.most[i] = fmaxf(fmaxf(of_warp[0], of_warp[1]), fmaxf(of_warp[2], of_warp[3]));
}

// squares [splits, N] of rows; and, by the first `rank` CTAs, most [rank]. A thread has 8 rows x 8 columns of a tile:
// rows 8 g .. of group g of 8, columns in groups of Weight::kGroup. It adds the squares of its part of a row in fp32,
// a tile's eight in a chain and tiles with Kahan's correction; threads' sums are added in fp64.
template <class Weight>
__global__ void __launch_bounds__(kNormThreads, Weight::kCtas)
    row_squares_kernel(const __grid_constant__ DoraNorm p, int64_t split_columns, NormScaling scaling) {
  // A [kNormRanks, kNormColumns] in two halves of every row, each read by lanes side by side; they are 16 banks apart.
  constexpr int kHalf = kNormColumns / 2 + 16, kRow = 2 * kHalf - 16;
  __shared__ float4 a_tile[kNormRanks * kRow / 4];
  extern __shared__ float4 b_tile[];  // [ranks, kNormRows]: all of B's or, above kNormResident, kNormRanks
  __shared__ float of_warp[kNormThreads / 32];
  const int rank = static_cast<int>(p.rank);
  if (blockIdx.x < p.rank) return store_largest(p, blockIdx.x, of_warp);

  const unsigned row_blocks = static_cast<unsigned>((p.out_features + kNormRows - 1) / kNormRows);
  const unsigned tile = blockIdx.x - rank, split = tile / row_blocks;
  const int64_t n0 = int64_t{tile % row_blocks} * kNormRows;
  const int64_t begin = split * split_columns;
  const int64_t end = begin + split_columns < p.in_features ? begin + split_columns : p.in_features;
  const int thread = threadIdx.x, column_group = thread & 15, row_group = thread >> 4;
  const bool fours_of_a = fours_are_whole(p.a, p.in_features), fours_of_b = fours_are_whole(p.b, p.rank);
  const bool resident = rank <= kNormResident;
  const Weight weight(p);

  const auto load_b = [&](int first, int ranks) {  // transposed
    const int row = thread & (kNormRows - 1);
    for (int j = thread / kNormRows * 4; j < ranks; j += kNormThreads / kNormRows * 4) {
      const int64_t n = n0 + row;
      const float4 v = load_four(p.b, n * rank + first + j, n < p.out_features ? rank - first - j : 0, fours_of_b);
      float* to = reinterpret_cast<float*>(b_tile) + j * kNormRows + row;
      to[0] = v.x;
      to[kNormRows] = v.y;
      to[2 * kNormRows] = v.z;
      to[3 * kNormRows] = v.w;
    }
  };
  const auto load_a = [&](int first, int64_t k0) {
    const int four = thread & 31;  // of a row's 32; four elements
    const int position =
        Weight::kGroup == 8 ? (four >> 1) + (four & 1) * (kHalf / 4) : (four & 15) + (four >> 4) * (kHalf / 4);
#pragma unroll
    for (int j = thread >> 5; j < kNormRanks; j += kNormThreads / 32) {
      const int64_t k = k0 + 4 * four;
      const int64_t inside = first + j < rank ? p.in_features - k : 0;
      a_tile[j * (kRow / 4) + position] = load_four(p.a, (first + j) * p.in_features + k, inside, fours_of_a);
    }
  };

  if (resident) load_b(0, (rank + kNormRanks - 1) / kNormRanks * kNormRanks);
  float total[8] = {}, lost[8] = {};
  for (int64_t k0 = begin; k0 < end; k0 += kNormColumns) {
    float update[8][8] = {};  // B A
    for (int first = 0; first < rank; first += kNormRanks) {
      __syncthreads();
      load_a(first, k0);
      if (!resident) load_b(first, kNormRanks);
      __syncthreads();
      const float4* a = a_tile + column_group;
      const float4* b = b_tile + (resident ? first * (kNormRows / 4) : 0) + 2 * row_group;
      const int ranks = rank - first < kNormRanks ? rank - first : kNormRanks;
#pragma unroll 2
      for (int j = 0; j < ranks; ++j, a += kRow / 4, b += kNormRows / 4) {
        const float4 a0 = a[0], a1 = a[kHalf / 4], b0 = b[0], b1 = b[1];
        const float columns[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
        const float rows[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int c = 0; c < 8; ++c) update[i][c] = fmaf(rows[i], columns[c], update[i][c]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float w[8], square = 0.0f;
      weight.decode(weight.load(p, n0 + 8 * row_group + i, k0 + Weight::kGroup * column_group), w);
#pragma unroll
      for (int c = 0; c < 8; ++c) w[c] = fmaf(scaling.high, update[i][c], w[c]);
      if (scaling.low != 0.0f) {
#pragma unroll
        for (int c = 0; c < 8; ++c) w[c] = fmaf(scaling.low, update[i][c], w[c]);
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) square = fmaf(w[c], w[c], square);
      square -= lost[i];
      const float larger = total[i] + square;
      lost[i] = (larger - total[i]) - square;
      total[i] = larger;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    double sum = static_cast<double>(total[i]) - static_cast<double>(lost[i]);
#pragma unroll
    for (int step = 1; step < 16; step *= 2) sum += __shfl_xor_sync(kNormAllLanes, sum, step);
    const int64_t n = n0 + 8 * row_group + i;
    if (column_group == 0 && n < p.out_features) p.squares[split * p.out_features + n] = sum;
  }
}

// ---- The finish ----------------------------------------------------------------------------------------------------

inline constexpr int kFinishRows = 4;  // of a CTA, a warp each

PEFT_KERNELS_DEVICE double sum_of_lanes(double v) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) v += __shfl_xor_sync(kNormAllLanes, v, step);
  return v;
}

// A row's sum of squares, every step in fp64.
PEFT_KERNELS_DEVICE double squares_in_double(const DoraNorm& p, int64_t n) {
  double sum = 0.0;
  for (int64_t k = threadIdx.x & 31; k < p.in_features; k += 32) {
    double update = 0.0;
#pragma unroll 4
    for (int64_t i = 0; i < p.rank; ++i) {
      update +=
          static_cast<double>(element(p.b, n * p.rank + i)) * static_cast<double>(element(p.a, i * p.in_features + k));
    }
    const double v = static_cast<double>(norm_weight(p, n, k)) + p.scaling * update;
    sum += v * v;
  }
  return sum_of_lanes(sum);
}

// `rounding` bounds the error of an element of B A, relative to sum_i |B_i| max|A_i|.
static __global__ void __launch_bounds__(kFinishRows * 32)
    finish_norms_kernel(const __grid_constant__ DoraNorm p, int64_t splits, double rounding) {
  constexpr double kMostError = 4e-7, kLeastSquare = 1e-24, kMostSquare = 1e38;
  const int lane = threadIdx.x & 31;
  const int64_t n = int64_t{blockIdx.x} * kFinishRows + (threadIdx.x >> 5);
  if (n >= p.out_features) return;
  double sum = 0.0, reach = 0.0;
  for (int64_t split = 0; split < splits; ++split) sum += p.squares[split * p.out_features + n];
  for (int64_t i = lane; i < p.rank; i += 32) {
    reach += fabs(static_cast<double>(element(p.b, n * p.rank + i)) * static_cast<double>(p.most[i]));
  }
  const double d = rounding * fabs(p.scaling) * sum_of_lanes(reach);
  // d / norm + K / 2 (d / norm)^2 <= kMostError, without the division.
  const bool small = d * sqrt(sum) + 0.5 * d * d * static_cast<double>(p.in_features) <= kMostError * sum;
  if (!(small && sum > kLeastSquare && sum < kMostSquare)) sum = squares_in_double(p, n);
  if (lane == 0) p.norm[n] = static_cast<float>(sqrt(sum));
}

}  // namespace peft_kernels::cuda
