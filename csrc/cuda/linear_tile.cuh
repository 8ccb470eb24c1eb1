// What gemv and matmul share: an NF4 weight as the A operand of mma m16n8k16, x as the B operand of 8 tokens.
//
// A chunk is 256 inputs, four blocks of 64. Lane 4 g + t decodes block t of row g, and of row g + 8, of a tile of 16
// rows. The slots of the contraction that the instruction gives to that lane thus stand for other inputs than their
// numbers say, which changes no sum of products: x is read alike. So a lane has its own absmax, words of codes become
// operands in registers, and nothing of W goes through shared memory.
#pragma once

#include <type_traits>

#include "cuda/device/nf4.cuh"

namespace peft_kernels::cuda {

constexpr int kBlock = 64;       // weights that a lane decodes with one table
constexpr int kChunkBlocks = 4;  // of a row
constexpr int kTileRows = 16;

// absmax of lanes' blocks in kRows rows: loaded early, as memory has them, and decoded when needed.
template <int kRows, bool kNested>
class Scales {
 public:
  using Stored = float;

  PEFT_KERNELS_DEVICE Scales(const NF4Weight& weight, const int64_t (&row)[kRows], int64_t in_features)
      : shift_(weight.blocksize_log2 - 6) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) row_[r] = keep(weight.absmax + row[r] * (in_features >> weight.blocksize_log2));
  }

  // Of the 64 inputs number `block64`, which are inside the row.
  PEFT_KERNELS_DEVICE void load(Stored (&stored)[kRows], int block64) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) stored[r] = __ldg(row_[r] + (block64 >> shift_));
  }

  // absmax, or with `inside` false 0: with x zero there too, it adds nothing.
  PEFT_KERNELS_DEVICE void decode(float (&absmax)[kRows], const Stored (&stored)[kRows], int, bool inside) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) absmax[r] = inside ? stored[r] : 0.0f;
  }

 private:
  int shift_;
  const float* row_[kRows];
};

template <int kRows>
class Scales<kRows, true> {
 public:
  using Stored = uint8_t;

  PEFT_KERNELS_DEVICE Scales(const NF4Weight& weight, const int64_t (&row)[kRows], int64_t in_features)
      : weight_(weight), shift_(weight.blocksize_log2 - 6), offset_(__ldg(weight.nested_offset)) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) row_[r] = static_cast<uint32_t>(row[r] * (in_features >> weight.blocksize_log2));
  }

  PEFT_KERNELS_DEVICE void load(Stored (&stored)[kRows], int block64) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) stored[r] = __ldg(weight_.absmax_codes + (row_[r] + (block64 >> shift_)));
  }

  PEFT_KERNELS_DEVICE void decode(float (&absmax)[kRows], const Stored (&stored)[kRows], int block64,
                                  bool inside) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float value = decode_absmax(weight_, row_[r] + (block64 >> shift_), stored[r], offset_);
      absmax[r] = inside ? value : 0.0f;
    }
  }

 private:
  const NF4Weight& weight_;
  int shift_;
  float offset_;
  uint32_t row_[kRows];  // its first block: select_linear() leaves to others what has 2^32
};

template <class T>
struct PairDecoder {
  uint32_t copy;
  float absmax;
  PEFT_KERNELS_DEVICE void decode(uint32_t word, uint32_t (&out)[4], Opaque) const {
    decode_pairs<T>(copy, absmax, word, out);
  }
};

// One block of row g and one of row g + 8. With kTable the latter is decoded by the table of pairs, of which `copy` is
// the lane's: so the ALU, which tables of blocks keep busy, and the load/store unit have half of the work each.
template <class T, bool kTable>
struct TileDecoder {
  BlockTable<T> top;
  std::conditional_t<kTable, PairDecoder<T>, BlockTable<T>> bottom;

  PEFT_KERNELS_DEVICE TileDecoder(float absmax_top, float absmax_bottom, uint32_t copy)
      : top(absmax_top), bottom(make_bottom(absmax_bottom, copy)) {}

  // The A operands of 8 weights of each row: a of the first instruction in a[0], of the second in a[1].
  PEFT_KERNELS_DEVICE void decode(uint32_t word_top, uint32_t word_bottom, uint32_t (&a)[2][4], Opaque opaque) const {
    uint32_t upper[4], lower[4];
    top.decode(word_top, upper, opaque);
    bottom.decode(word_bottom, lower, opaque);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      a[half][0] = upper[2 * half];
      a[half][1] = lower[2 * half];
      a[half][2] = upper[2 * half + 1];
      a[half][3] = lower[2 * half + 1];
    }
  }

 private:
  PEFT_KERNELS_DEVICE static auto make_bottom(float absmax, uint32_t copy) {
    if constexpr (kTable) {
      return PairDecoder<T>{copy, absmax};
    } else {
      return BlockTable<T>(absmax);
    }
  }
};

// d += 16 rows times 8 inputs of 8 tokens.
template <class T>
PEFT_KERNELS_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[2][4], uint4 x) {
  mma<T>(d, a[0][0], a[0][1], a[0][2], a[0][3], x.x, x.y);
  mma<T>(d, a[1][0], a[1][1], a[1][2], a[1][3], x.z, x.w);
}

PEFT_KERNELS_DEVICE uint32_t component(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

}  // namespace peft_kernels::cuda
