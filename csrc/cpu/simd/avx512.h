// Sixteen lanes: AVX-512 F, BW, VL, DQ (and BMI2). The meaning of each operation is in portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

// GCC 12's own AVX-512 headers leave don't-care operands uninitialised and warn about it where they are inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "../../common/float_convert.h"
#include "../../common/philox.h"

namespace peft_kernels::cpu::avx512 {
namespace {  // internal: avx512_bf16.h has these words too, in an object of other flags

inline constexpr const char* kName = "avx512";
inline constexpr int kLanes = 16;
inline constexpr int kTileRows = 12;  // 12 x 2 accumulators of 32 registers
inline constexpr int kAccumulators = 24;
inline constexpr int64_t kGemvTokens = 20, kGemvGroup = 5;

using Bf16Pairs = void;  // avx512_bf16.h has them
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float s) { return _mm512_set1_ps(s); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }

inline Vec load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline Vec load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_bf16(uint16_t* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_srli_epi32(rounded, 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline void store_half(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline void load_deinterleaved(const float* p, Vec& even, Vec& odd) {
  const __m512i pick = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const Vec a = load(p), b = load(p + kLanes);
  even = _mm512_permutex2var_ps(a, pick, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(pick, _mm512_set1_epi32(1)), b);
}

// The table in registers, an eighth looked up at a time: a gather takes twice as long on some processors.
struct ByteTable {
  __m512 part[16];
};
inline ByteTable load_byte_table(const float* p) {
  ByteTable t;
  for (int i = 0; i < 16; ++i) t.part[i] = load(p + i * kLanes);
  return t;
}
inline Vec look_up_bytes(const ByteTable& t, const uint8_t* byte) {
  const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(byte)));
  const auto eighth = [&](int i) {  // by bits 0 to 4 of the index
    return _mm512_permutex2var_ps(t.part[2 * i], index, t.part[2 * i + 1]);
  };
  const auto choose = [&](int bit, Vec if_clear, Vec if_set) {
    return _mm512_mask_mov_ps(if_clear, _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit)), if_set);
  };
  const Vec low = choose(6, choose(5, eighth(0), eighth(1)), choose(5, eighth(2), eighth(3)));
  const Vec high = choose(6, choose(5, eighth(4), eighth(5)), choose(5, eighth(6), eighth(7)));
  return choose(7, low, high);
}

struct Table {
  __m512 entry;
};
using Bytes = __m512i;  // one byte, zero-extended, per lane; vpermps reads the low four bits only
inline Table load_table(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Table scale(Table t, float s) { return {_mm512_mul_ps(t.entry, _mm512_set1_ps(s))}; }
inline Bytes load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec look_up_high(const Table& t, Bytes b) { return _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), t.entry); }
inline Vec look_up_low(const Table& t, Bytes b) { return _mm512_permutexvar_ps(b, t.entry); }
inline void store_interleaved(float* p, Vec high, Vec low) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  store(p, _mm512_permutex2var_ps(high, first, low));
  store(p + kLanes, _mm512_permutex2var_ps(high, _mm512_add_epi32(first, _mm512_set1_epi32(8)), low));
}

struct Words {
  __m512i column[kLanes];
};
// A 16 x 16 transpose of 32-bit words: 64 shuffles for 2,048 weights.
inline Words load_transposed(const uint8_t* const (&row)[kLanes], int64_t offset, int64_t words) {
  const __mmask16 present = static_cast<__mmask16>((1u << words) - 1);
  __m512i a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; ++i) a[i] = _mm512_maskz_loadu_epi32(present, row[i] + offset);
  for (int i = 0; i < kLanes; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {  // a[i + j]: word j of each 128-bit quarter, of rows i .. i + 3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  Words w;
  for (int j = 0; j < 4; ++j) {  // a 4 x 4 transpose of quarters
    const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88),
                  high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    w.column[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    w.column[8 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    w.column[4 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    w.column[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  return w;
}
inline Vec as_floats(__m512i words) { return _mm512_castsi512_ps(words); }
template <int kShift>
inline Vec look_up_shifted(const Table& t, __m512i words) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(words, kShift), t.entry);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// Low and high halves of the 32 x 32 bit products, lane by lane.
inline void multiply(__m512i a, __m512i m, __m512i& low, __m512i& high) {
  const __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
  high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}
inline uint64_t philox_keep(uint64_t group, uint64_t seed, uint32_t threshold) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i base = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(group)));
  __m512i c0 = _mm512_add_epi32(base, lane), c2 = _mm512_setzero_si512(), c3 = c2;
  const __mmask16 carry = _mm512_cmplt_epu32_mask(c0, base);
  __m512i c1 = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(group >> 32)));
  c1 = _mm512_mask_add_epi32(c1, carry, c1, _mm512_set1_epi32(1));
  const __m512i m0 = _mm512_set1_epi32(static_cast<int>(kPhiloxM0)),
                m1 = _mm512_set1_epi32(static_cast<int>(kPhiloxM1));
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxW0, key1 += kPhiloxW1) {
    __m512i low0, high0, low1, high1;
    multiply(c0, m0, low0, high0);
    multiply(c2, m1, low1, high1);
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(static_cast<int>(key0)), 0x96);  // three-way xor
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(static_cast<int>(key1)), 0x96);
    c1 = low1;
    c3 = low0;
  }
  const __m512i t = _mm512_set1_epi32(static_cast<int>(threshold));
  constexpr uint64_t kEveryFourth = 0x1111111111111111u;
  return _pdep_u64(_mm512_cmpge_epu32_mask(c0, t), kEveryFourth) |
         _pdep_u64(_mm512_cmpge_epu32_mask(c1, t), kEveryFourth << 1) |
         _pdep_u64(_mm512_cmpge_epu32_mask(c2, t), kEveryFourth << 2) |
         _pdep_u64(_mm512_cmpge_epu32_mask(c3, t), kEveryFourth << 3);
}
inline Vec keep_scaled(uint64_t bits, Vec v, Vec s) { return _mm512_maskz_mul_ps(static_cast<__mmask16>(bits), v, s); }

struct Int8Products {
  static constexpr int kTileRows = 12;  // 12 x 2 sums of 32 registers
  static constexpr int kLevelOffset = 0;

  using Sums = int32_t __attribute__((vector_size(64)));  // GCC copies sums that are a __m512i between registers
  static Sums broadcast_sum(int32_t s) { return reinterpret_cast<Sums>(_mm512_set1_epi32(s)); }
  static Sums add(Sums a, Sums b) { return a + b; }
  static Vec to_float(Sums a) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(a)); }

  using LevelTable = __m512i;  // the sixteen levels in each quarter
  static LevelTable load_table(const int8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  using Bytes = __m512i;
  static Bytes look_up_odd(LevelTable t, __m512i words) {
    return _mm512_shuffle_epi8(t, _mm512_and_si512(words, _mm512_set1_epi8(15)));
  }
  static Bytes look_up_even(LevelTable t, __m512i words) { return look_up_odd(t, _mm512_srli_epi32(words, 4)); }
  static void store_bytes(int8_t* p, Bytes levels) { _mm512_storeu_si512(p, levels); }

  // As in avx2.h, but that a mask gives values the sign of levels.
  struct Levels {
    __m512i magnitude;
    __mmask64 negative;
  };
  static Levels levels(Bytes level) { return {_mm512_abs_epi8(level), _mm512_movepi8_mask(level)}; }
  static Levels load_levels(const int8_t* p) { return levels(_mm512_loadu_si512(p)); }
  using Values = __m512i;
  static Values broadcast_values(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static Sums multiply_add(const Levels& levels, Values values, Sums sums) {
    const __m512i with_sign = _mm512_mask_sub_epi8(values, levels.negative, _mm512_setzero_si512(), values);
    const __m512i pairs = _mm512_maddubs_epi16(levels.magnitude, with_sign);
    return sums + reinterpret_cast<Sums>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};

}  // namespace
}  // namespace peft_kernels::cpu::avx512
