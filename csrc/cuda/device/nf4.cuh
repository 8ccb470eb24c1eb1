// NF4 weights in a kernel: absmax of a block, and three ways to decode codes. All are exact: a weight is the fp32
// product code * absmax, rounded once to the type that is asked for. Ways and counts: docs/gpu.md.
//
// In a 32-bit word of packed codes (little endian) weight k, 0 to 7, is the nibble at bit 8 (k / 2) + (k even ? 4 : 0).
#pragma once

#include "common/nf4.h"
#include "cuda/api.h"
#include "cuda/device/ptx.cuh"

namespace peft_kernels::cuda {

struct Codes {
  float value[16];
};
constexpr Codes codes() {
  Codes copy{};
  for (int i = 0; i < 16; ++i) copy.value[i] = kNF4Code[i];
  return copy;
}
__device__ const Codes kCodes = codes();  // in memory, for an index that is known at run time only

// absmax of a block from its code; `Index` is uint32_t where that is enough. Rounded twice, never contracted. `offset`
// is what w.nested_offset points to.
template <class Index>
PEFT_KERNELS_DEVICE float decode_absmax(const NF4Weight& w, Index block, uint32_t code, float offset) {
  const float nested = __ldg(w.nested_absmax + (block >> w.nested_blocksize_log2));
  return __fadd_rn(__fmul_rn(__ldg(w.nested_code + code), nested), offset);
}

// absmax of a block.
PEFT_KERNELS_DEVICE float load_absmax(const NF4Weight& w, int64_t block) {
  if (w.absmax != nullptr) return __ldg(w.absmax + block);
  return decode_absmax(w, block, __ldg(w.absmax_codes + block), __ldg(w.nested_offset));
}

// Constants that must come as kernel arguments: written as literals, ptxas folds them, and moves the work back to the
// pipe that they keep free.
struct Opaque {
  uint32_t two16 = 65536;
};

// ---- The table of one block --------------------------------------------------------------------------------------
//
// Its 16 weights, already rounded, as byte planes in eight registers. 16 FMUL + 8 F2FP + 8 PRMT for a block, then 3.2
// instructions a weight, most on the ALU: for lanes that own whole blocks.
template <class T>
struct BlockTable {
  uint32_t low[4], high[4];  // low and high bytes of codes 0 to 3, 4 to 7, ...

  PEFT_KERNELS_DEVICE explicit BlockTable(float absmax) {
    constexpr Codes code = codes();
    uint32_t pair[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) pair[i] = pack<T>(code.value[2 * i] * absmax, code.value[2 * i + 1] * absmax);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low[i] = prmt(pair[2 * i], pair[2 * i + 1], 0x6420);
      high[i] = prmt(pair[2 * i], pair[2 * i + 1], 0x7531);
    }
  }

  // Weights 2 j, 2 j + 1 of a word in out[j]. Shifts by 16 are multiplications, which the FMA pipe does.
  PEFT_KERNELS_DEVICE void decode(uint32_t word, uint32_t (&out)[4], Opaque opaque) const {
    uint32_t index = word & 0x77777777u;  // without the top bit of each code
    const uint32_t shifted = word * (opaque.two16 >> 12);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t upper = prmt(word, shifted, half ? 0xBFAE : 0x9D8C);  // 0xFF where a code is 8 or more
      const uint32_t l = lop3<0xCA>(upper, prmt(low[2], low[3], index), prmt(low[0], low[1], index));
      const uint32_t h = lop3<0xCA>(upper, prmt(high[2], high[3], index), prmt(high[0], high[1], index));
      out[2 * half] = prmt(l, h, 0x4051);
      out[2 * half + 1] = prmt(l, h, 0x6273);
      if (half == 0) index = static_cast<uint32_t>(static_cast<uint64_t>(index) * opaque.two16 >> 32);
    }
  }
};

// ---- The table of pairs ------------------------------------------------------------------------------------------
//
// The two fp32 codes of every byte, in shared memory. One copy for each pair of banks (32 KiB): LDS.64 is served by
// half warps, whose lanes have a copy each, so nothing ever conflicts. 3.0 instructions a weight, half of them loads;
// any absmax, any lane, any type.
struct PairTable {
  static constexpr int kBytes = 256 * 16 * 8;
  float2 entry[256][16];

  // Fill by all threads of a CTA, a power of two up to 256; a barrier must follow.
  PEFT_KERNELS_DEVICE void fill(int thread, int threads) {
    for (int byte = thread; byte < 256; byte += threads) {
      const float2 pair = make_float2(kCodes.value[byte >> 4], kCodes.value[byte & 15]);
#pragma unroll
      for (int copy = 0; copy < 16; ++copy) entry[byte][(copy + byte) & 15] = pair;  // rotated: no conflicts
    }
  }

  // Shared address of this lane's copy.
  PEFT_KERNELS_DEVICE uint32_t copy_of(int lane) const { return shared_address(this) + (lane & 15) * 8; }
};

// The codes of byte `kByte` of a word: weights 2 kByte and 2 kByte + 1.
template <int kByte>
PEFT_KERNELS_DEVICE float2 look_up_pair(uint32_t copy, uint32_t word) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"  // PRMT on the ALU, IMAD on the FMA pipe
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(prmt(word, 0, 0x4440 + kByte) * 128 + copy));
  return pair;
}

// The same for an index that an unrolled loop makes constant.
PEFT_KERNELS_DEVICE float2 look_up_pair(uint32_t copy, uint32_t word, int byte) {
  if (byte == 0) return look_up_pair<0>(copy, word);
  if (byte == 1) return look_up_pair<1>(copy, word);
  return byte == 2 ? look_up_pair<2>(copy, word) : look_up_pair<3>(copy, word);
}

// Weights 2 j, 2 j + 1 of a word in out[j].
template <class T>
PEFT_KERNELS_DEVICE void decode_pairs(uint32_t copy, float absmax, uint32_t word, uint32_t (&out)[4]) {
  const auto put = [&](uint32_t& to, float2 pair) { to = pack<T>(pair.x * absmax, pair.y * absmax); };
  put(out[0], look_up_pair<0>(copy, word));
  put(out[1], look_up_pair<1>(copy, word));
  put(out[2], look_up_pair<2>(copy, word));
  put(out[3], look_up_pair<3>(copy, word));
}

}  // namespace peft_kernels::cuda
