// || W[n] + scaling * B[n] A || by rows. The squares: rows of W + scaling * B A are formed in registers and summed by
// splits of K. The finish: sums of a row are added up in order and tested; a row that fails is made again in fp64.
// What the test is, and why it is enough: peft_kernels/ops/dora/README.md.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/api.h"
#include "cuda/device/nf4.cuh"

namespace peft_kernels::cuda {

inline constexpr int kNormThreads = 128;
inline constexpr int kNormRows = 64, kNormColumns = 128;  // of a CTA's tile
inline constexpr int kNormRanks = 16;                     // of A in shared memory
inline constexpr int kNormResident = 64;                  // ranks up to which B stays in shared memory

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

// Elements i to i + 3 of an array, zeros from the `count`th on.
PEFT_KERNELS_DEVICE float4 load_four(const Array& array, int64_t i, int64_t count) {
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (count > 0) v.x = element(array, i);
  if (count > 1) v.y = element(array, i + 1);
  if (count > 2) v.z = element(array, i + 2);
  if (count > 3) v.w = element(array, i + 3);
  return v;
}
PEFT_KERNELS_DEVICE bool fours_are_whole(const Array& array, int64_t columns) {
  return columns % 4 == 0 && aligned_to(array.data, array.dtype == DType::kFloat32 ? 16 : 8);
}

PEFT_KERNELS_DEVICE float4 to_floats(float4 v, float) { return v; }
template <class T>
PEFT_KERNELS_DEVICE float4 to_floats(uint2 words, T) {
  const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

// ---- Ways to read W: a thread has eight columns of a row -----------------------------------------------------------
// kGroup of them are adjacent. `begin` starts to load a tile's rows, which the warp has for itself; `eight` has those
// of row i of this thread's eight.

// NF4 rows of whole groups of 32, one absmax each, whatever the blocksize: they wait in shared memory.
struct NormNF4 {
  static constexpr int kGroup = 8, kCtas = 4;  // CTAs that are wanted on a multiprocessor
  struct Shared {
    uint32_t words[kNormRows / 8][8 * kNormColumns / 8 + 16];  // rows by eights, which two half warps read: 16 banks
    float absmax[kNormRows][kNormColumns / 32];
  };
  const DoraNorm& p;
  Shared& shared;
  float code;  // of this lane's number modulo 16

  PEFT_KERNELS_DEVICE NormNF4(const DoraNorm& p, Shared& shared)
      : p(p), shared(shared), code(kCodes.value[threadIdx.x & 15]) {}

  // 16 rows of 64 bytes, and of four absmax: a lane has two of each.
  PEFT_KERNELS_DEVICE void begin(int n0, int k0) {
    __syncwarp();  // the last tile has been read
    const int in_features = static_cast<int>(p.in_features), group = threadIdx.x & 3, k = k0 + 32 * group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = threadIdx.x / 32 * 16 + i * 8 + (threadIdx.x & 31) / 4;
      const bool inside = n0 + row < p.out_features && k < in_features;
      const int64_t e = inside ? int64_t{n0 + row} * in_features + k : 0;  // any codes do outside: times zero
      copy_async_16(shared_address(&shared.words[row / 8][row % 8 * (kNormColumns / 8) + 4 * group]),
                    p.weight.packed + (e >> 1));
      shared.absmax[row][group] = inside ? load_absmax(p.weight, e >> p.weight.blocksize_log2) : 0.0f;
    }
    copy_async_commit();
  }
  PEFT_KERNELS_DEVICE void end() {
    copy_async_wait<0>();
    __syncwarp();
  }
  PEFT_KERNELS_DEVICE void eight(int, int, int i, float (&out)[8]) {
    const int column_group = threadIdx.x & 15, row_group = threadIdx.x / 16;
    const uint32_t word = shared.words[row_group][i * (kNormColumns / 8) + column_group];
    const float absmax = shared.absmax[8 * row_group + i][column_group / 4];
#pragma unroll
    for (int k = 0; k < 8; ++k) {  // a shuffle reads five bits of its index
      out[k] = __shfl_sync(kAllLanes, code, word >> (4 * (k ^ 1))) * absmax;
    }
  }
};

// Dense rows that 16-byte loads may read; four at a time.
template <class T>
struct NormDense {
  static constexpr int kGroup = 16 / sizeof(T), kCtas = 3, kBatch = 4;
  struct Shared {};
  const DoraNorm& p;
  uint4 part[kBatch][8 / kGroup];

  PEFT_KERNELS_DEVICE NormDense(const DoraNorm& p, Shared&) : p(p) {}
  PEFT_KERNELS_DEVICE void begin(int, int) {}
  PEFT_KERNELS_DEVICE void end() {}
  PEFT_KERNELS_DEVICE void eight(int n0, int k0, int i, float (&out)[8]) {
    if (i % kBatch == 0) {
      const int k = k0 + kGroup * (threadIdx.x & 15);
#pragma unroll
      for (int j = 0; j < kBatch * 8 / kGroup; ++j) {
        const int64_t n = n0 + static_cast<int>(threadIdx.x) / 16 * 8 + i + j / (8 / kGroup);
        const int column = k + j % (8 / kGroup) * (kNormColumns / 2);
        uint4& to = part[j / (8 / kGroup)][j % (8 / kGroup)];
        to = make_uint4(0, 0, 0, 0);
        if (n < p.out_features && column < p.in_features) {
          const T* from = static_cast<const T*>(p.dense.data) + n * p.dense_strides[0] + column;
          to = __ldg(reinterpret_cast<const uint4*>(from));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 8 / kGroup; ++j) {
      const uint4& v = part[i % kBatch][j];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if constexpr (sizeof(T) == 4) {
          out[4 * j + c] = __uint_as_float(words[c]);
        } else {
          const float2 pair = unpack<T>(words[c]);
          out[2 * c] = pair.x;
          out[2 * c + 1] = pair.y;
        }
      }
    }
  }
};

// Anything else, element by element.
struct NormElements {
  static constexpr int kGroup = 8, kCtas = 3;
  struct Shared {};
  const DoraNorm& p;

  PEFT_KERNELS_DEVICE NormElements(const DoraNorm& p, Shared&) : p(p) {}
  PEFT_KERNELS_DEVICE void begin(int, int) {}
  PEFT_KERNELS_DEVICE void end() {}
  PEFT_KERNELS_DEVICE void eight(int n0, int k0, int i, float (&out)[8]) {
    const int64_t n = n0 + static_cast<int>(threadIdx.x) / 16 * 8 + i;
    const int k = k0 + kGroup * (threadIdx.x & 15);
#pragma unroll
    for (int c = 0; c < 8; ++c) out[c] = n < p.out_features && k + c < p.in_features ? norm_weight(p, n, k + c) : 0.0f;
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
  for (int step = 1; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = most;
  __syncthreads();
  if (threadIdx.x == 0) p.most[i] = fmaxf(fmaxf(of_warp[0], of_warp[1]), fmaxf(of_warp[2], of_warp[3]));
}

// A [kNormRanks, kNormColumns] in two halves of every row, each read by lanes side by side; they are 16 banks apart.
inline constexpr int kNormHalf = kNormColumns / 2 + 16, kNormStride = 2 * kNormHalf - 16;

// Ranks first .. of the columns from k0 on to shared memory, zeros outside. `kGroup` as a weight's.
template <int kGroup, class T>
PEFT_KERNELS_DEVICE void store_a(const DoraNorm& p, int first, int k0, float4* to) {
  using Four = std::conditional_t<sizeof(T) == 4, float4, uint2>;
  const int four = threadIdx.x & 31, k = k0 + 4 * four, j = threadIdx.x >> 5;
  to += j * (kNormStride / 4) +
        (kGroup == 8 ? (four >> 1) + (four & 1) * (kNormHalf / 4) : (four & 15) + (four >> 4) * (kNormHalf / 4));
  constexpr int kTurns = kNormRanks / (kNormThreads / 32), kApart = kNormThreads / 32;
  const int in_features = static_cast<int>(p.in_features),
            left = k < in_features ? static_cast<int>(p.rank) - first - j : 0;
  const Four* from = static_cast<const Four*>(p.a.data) + ((int64_t{first + j} * in_features + k) >> 2);
  Four v[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    v[i] = Four{};
    if (i * kApart < left) v[i] = __ldg(from);
    from += kApart * (in_features >> 2);
  }
#pragma unroll
  for (int i = 0; i < kTurns; ++i) to[i * kApart * (kNormStride / 4)] = to_floats(v[i], T{});
}
template <int kGroup>
PEFT_KERNELS_DEVICE void store_a_elements(const DoraNorm& p, int first, int k0, float* to) {
  const int column = threadIdx.x, four = column >> 2;
  to += 4 * (kGroup == 8 ? (four >> 1) + (four & 1) * (kNormHalf / 4) : (four & 15) + (four >> 4) * (kNormHalf / 4)) +
        (column & 3);
#pragma unroll 4
  for (int j = 0; j < kNormRanks; ++j) {
    const bool inside = first + j < p.rank && k0 + column < p.in_features;
    to[j * kNormStride] = inside ? element(p.a, (first + j) * p.in_features + k0 + column) : 0.0f;
  }
}

// Ranks first .. first + ranks of B's rows from n0 on to shared memory, transposed: [ranks, kNormRows].
PEFT_KERNELS_DEVICE void store_b(const DoraNorm& p, int first, int ranks, int n0, float* to) {
  const int row = threadIdx.x & (kNormRows - 1);
  const bool inside = n0 + row < p.out_features, fours = fours_are_whole(p.b, p.rank);
  to += row;
#pragma unroll 2
  for (int j = threadIdx.x / kNormRows * 4; j < ranks; j += kNormThreads / kNormRows * 4) {
    const int64_t at = int64_t{n0 + row} * p.rank + first + j, count = inside ? p.rank - first - j : 0;
    float4 v;
    if (!fours || count <= 0) {
      v = load_four(p.b, at, count);
    } else if (p.b.dtype == DType::kFloat32) {
      v = __ldg(static_cast<const float4*>(p.b.data) + (at >> 2));
    } else {
      const uint2 words = __ldg(static_cast<const uint2*>(p.b.data) + (at >> 2));
      v = p.b.dtype == DType::kBFloat16 ? to_floats(words, BFloat16{}) : to_floats(words, Float16{});
    }
    to[j * kNormRows] = v.x;
    to[(j + 1) * kNormRows] = v.y;
    to[(j + 2) * kNormRows] = v.z;
    to[(j + 3) * kNormRows] = v.w;
  }
}

// squares [splits, N] of rows; and, by the first `rank` CTAs, most [rank]. A thread has 8 rows x 8 columns of a tile:
// rows 8 g .. of group g of 8, columns in groups of Weight::kGroup. It adds the squares of its part of a row in fp32,
// a tile's eight in a chain and tiles with Kahan's correction; threads' sums are added in fp64.
template <class Weight>
__global__ void __launch_bounds__(kNormThreads, Weight::kCtas)
    row_squares_kernel(const __grid_constant__ DoraNorm p, int split_columns, NormScaling scaling) {
  __shared__ float4 a_tile[kNormRanks * kNormStride / 4];
  extern __shared__ float4 b_tile[];  // [ranks, kNormRows]: all of B's or, above kNormResident, kNormRanks
  __shared__ typename Weight::Shared weights;
  __shared__ float of_warp[kNormThreads / 32];
  const int rank = static_cast<int>(p.rank), in_features = static_cast<int>(p.in_features);
  if (blockIdx.x < p.rank) return store_largest(p, blockIdx.x, of_warp);

  const unsigned row_blocks = static_cast<unsigned>((p.out_features + kNormRows - 1) / kNormRows);
  const unsigned tile = blockIdx.x - rank, split = tile / row_blocks;
  const int n0 = static_cast<int>(tile % row_blocks) * kNormRows;
  const int begin = static_cast<int>(split) * split_columns;
  const int end = in_features - begin < split_columns ? in_features : begin + split_columns;
  const int column_group = threadIdx.x & 15, first_row = threadIdx.x / 16 * 8;
  const bool fours_of_a = fours_are_whole(p.a, p.in_features);
  const bool resident = rank <= kNormResident;
  Weight weight(p, weights);

  if (resident) store_b(p, 0, rank, n0, reinterpret_cast<float*>(b_tile));
  float total[8] = {}, lost[8] = {};
  for (int k0 = begin; k0 < end; k0 += kNormColumns) {
    weight.begin(n0, k0);
    float update[8][8] = {};  // B A
    for (int first = 0; first < rank; first += kNormRanks) {
      __syncthreads();
      if (!fours_of_a) {
        store_a_elements<Weight::kGroup>(p, first, k0, reinterpret_cast<float*>(a_tile));
      } else if (p.a.dtype == DType::kFloat32) {
        store_a<Weight::kGroup, float>(p, first, k0, a_tile);
      } else if (p.a.dtype == DType::kBFloat16) {
        store_a<Weight::kGroup, BFloat16>(p, first, k0, a_tile);
      } else {
        store_a<Weight::kGroup, Float16>(p, first, k0, a_tile);
      }
      const int ranks = rank - first < kNormRanks ? rank - first : kNormRanks;
      if (!resident) store_b(p, first, ranks, n0, reinterpret_cast<float*>(b_tile));
      __syncthreads();
      const float4* a = a_tile + column_group;
      const float4* b = b_tile + ((resident ? first * kNormRows : 0) + first_row) / 4;
#pragma unroll 2
      for (int j = 0; j < ranks; ++j, a += kNormStride / 4, b += kNormRows / 4) {
        const float4 a0 = a[0], a1 = a[kNormHalf / 4], b0 = b[0], b1 = b[1];
        const float of_a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
        const float of_b[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int c = 0; c < 8; ++c) update[i][c] = fmaf(of_b[i], of_a[c], update[i][c]);
        }
      }
    }
    weight.end();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float w[8], square = 0.0f;
      weight.eight(n0, k0, i, w);
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
    for (int step = 1; step < 16; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    const int n = n0 + first_row + i;
    if (column_group == 0 && n < p.out_features) p.squares[int64_t{split} * p.out_features + n] = sum;
  }
}

// ---- The finish ----------------------------------------------------------------------------------------------------

inline constexpr int kFinishRows = 4;  // of a CTA, a warp each

PEFT_KERNELS_DEVICE double sum_of_lanes(double v) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) v += __shfl_xor_sync(kAllLanes, v, step);
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
