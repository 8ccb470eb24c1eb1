// Eight lanes: AVX2, FMA, F16C, BMI2. The meaning of each operation is in portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../../common/float_convert.h"
#include "../../common/philox.h"

namespace peft_kernels::cpu::avx2 {

inline constexpr const char* kName = "avx2";
inline constexpr int kLanes = 8;
inline constexpr int kTileRows = 6;  // 6 x 2 accumulators of 16 registers
inline constexpr int kAccumulators = 8;
inline constexpr int64_t kGemvTokens = 12, kGemvGroup = 6;

using Bf16Pairs = void;  // no bf16 arithmetic
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float s) { return _mm256_set1_ps(s); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float reduce_add(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline Vec load_bf16(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline Vec load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_bf16(uint16_t* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}
inline void store_half(uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline void load_deinterleaved(const float* p, Vec& even, Vec& odd) {
  const Vec a = load(p), b = load(p + kLanes);
  const Vec lo = _mm256_permute2f128_ps(a, b, 0x20), hi = _mm256_permute2f128_ps(a, b, 0x31);
  even = _mm256_shuffle_ps(lo, hi, 0x88);
  odd = _mm256_shuffle_ps(lo, hi, 0xdd);
  // lo, hi hold 128-bit halves (a0 b0), (a1 b1); the shuffles leave the quarters a0 a1 | b0 b1 in order.
}

struct ByteTable {
  const float* entry;
};
inline ByteTable load_byte_table(const float* p) { return {p}; }
inline Vec look_up_bytes(const ByteTable& t, const uint8_t* byte) {
  const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(byte)));
  return _mm256_i32gather_ps(t.entry, index, sizeof(float));
}

struct Table {
  __m256 entry[2];  // levels 0-7 and 8-15
};
using Bytes = __m256i;
inline Table load_table(const float* p) { return {{load(p), load(p + 8)}}; }
inline Table scale(Table t, float s) { return {{mul(t.entry[0], broadcast(s)), mul(t.entry[1], broadcast(s))}}; }
inline Bytes load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
// vpermps reads the low three bits of `index`; the sign bit of `half` (the nibble's fourth bit) picks the half table.
inline Vec look_up(const Table& t, __m256i index, __m256i half) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.entry[0], index), _mm256_permutevar8x32_ps(t.entry[1], index),
                          _mm256_castsi256_ps(half));
}
inline Vec look_up_high(const Table& t, Bytes b) {
  return look_up(t, _mm256_srli_epi32(b, 4), _mm256_slli_epi32(b, 24));
}
inline Vec look_up_low(const Table& t, Bytes b) { return look_up(t, b, _mm256_slli_epi32(b, 28)); }
inline void store_interleaved(float* p, Vec high, Vec low) {
  const Vec a = _mm256_unpacklo_ps(high, low), b = _mm256_unpackhi_ps(high, low);
  store(p, _mm256_permute2f128_ps(a, b, 0x20));
  store(p + kLanes, _mm256_permute2f128_ps(a, b, 0x31));
}

struct Words {
  __m256i column[kLanes];
};
// An 8 x 8 transpose of 32-bit words: 24 shuffles for 512 weights.
inline Words load_transposed(const uint8_t* const (&row)[kLanes], int64_t offset, int64_t words) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i present = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(words)), lane);
  __m256i a[kLanes], b[kLanes];
  for (int i = 0; i < kLanes; ++i) a[i] = _mm256_maskload_epi32(reinterpret_cast<const int*>(row[i] + offset), present);
  for (int i = 0; i < kLanes; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {  // a[i + j]: word j of each 128-bit half, of rows i .. i + 3
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  Words w;
  for (int j = 0; j < 4; ++j) {
    w.column[j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
    w.column[4 + j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
  }
  return w;
}
inline Vec as_floats(__m256i words) { return _mm256_castsi256_ps(words); }
template <int kShift>
inline Vec look_up_shifted(const Table& t, __m256i words) {
  return look_up(t, _mm256_srli_epi32(words, kShift), _mm256_slli_epi32(words, 28 - kShift));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

inline void multiply(__m256i a, __m256i m, __m256i& low, __m256i& high) {
  const __m256i even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
// Eight counters from `group`; bit 4 g + w says whether word w of counter g is kept.
inline uint64_t philox_keep_eight(uint64_t group, uint64_t seed, uint32_t threshold) {
  alignas(32) uint32_t counter_low[kLanes], counter_high[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    counter_low[i] = static_cast<uint32_t>(group + static_cast<uint64_t>(i));
    counter_high[i] = static_cast<uint32_t>((group + static_cast<uint64_t>(i)) >> 32);
  }
  __m256i c0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(counter_low));
  __m256i c1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(counter_high));
  __m256i c2 = _mm256_setzero_si256(), c3 = c2;
  const __m256i m0 = _mm256_set1_epi32(static_cast<int>(kPhiloxM0)),
                m1 = _mm256_set1_epi32(static_cast<int>(kPhiloxM1));
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxW0, key1 += kPhiloxW1) {
    __m256i low0, high0, low1, high1;
    multiply(c0, m0, low0, high0);
    multiply(c2, m1, low1, high1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), _mm256_set1_epi32(static_cast<int>(key0)));
    c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), _mm256_set1_epi32(static_cast<int>(key1)));
    c1 = low1;
    c3 = low0;
  }
  // word >= threshold, unsigned: max(word, threshold) == word
  const __m256i t = _mm256_set1_epi32(static_cast<int>(threshold));
  constexpr uint64_t kEveryFourth = 0x11111111u;
  uint64_t keep = 0;
  const __m256i words[4] = {c0, c1, c2, c3};
  for (int w = 0; w < 4; ++w) {
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(words[w], t), words[w]);
    keep |= _pdep_u64(static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(kept))), kEveryFourth << w);
  }
  return keep;
}
inline uint64_t philox_keep(uint64_t group, uint64_t seed, uint32_t threshold) {
  return philox_keep_eight(group, seed, threshold) | philox_keep_eight(group + 8, seed, threshold) << 32;
}
inline Vec keep_scaled(uint64_t bits, Vec v, Vec s) {
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 0xff)), lane_bit);
  return _mm256_and_ps(mul(v, s), _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit)));
}

struct Int8Products {
  static constexpr int kTileRows = 4;  // 4 x 2 sums; levels and their magnitudes take four registers more
  static constexpr int kLevelOffset = 0;

  using Sums = int32_t __attribute__((vector_size(32)));  // GCC copies sums that are a __m256i between registers
  static Sums broadcast_sum(int32_t s) { return reinterpret_cast<Sums>(_mm256_set1_epi32(s)); }
  static Sums add(Sums a, Sums b) { return a + b; }
  static Vec to_float(Sums a) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(a)); }

  using LevelTable = __m256i;  // the sixteen levels in both halves
  static LevelTable load_table(const int8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  using Bytes = __m256i;
  static Bytes look_up_odd(LevelTable t, __m256i words) {
    return _mm256_shuffle_epi8(t, _mm256_and_si256(words, _mm256_set1_epi8(15)));
  }
  static Bytes look_up_even(LevelTable t, __m256i words) { return look_up_odd(t, _mm256_srli_epi32(words, 4)); }
  static void store_bytes(int8_t* p, Bytes levels) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), levels); }

  // vpmaddubsw takes one factor without a sign: it gets the level's magnitude, and the value the level's sign. Its
  // 16-bit sums of two products do not saturate: 2 * 127 * 127 < 2^15.
  struct Levels {
    __m256i level, magnitude;
  };
  static Levels levels(Bytes level) { return {level, _mm256_abs_epi8(level)}; }
  static Levels load_levels(const int8_t* p) { return levels(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  using Values = __m256i;
  static Values broadcast_values(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
  }
  static Sums multiply_add(const Levels& levels, Values values, Sums sums) {
    const __m256i pairs = _mm256_maddubs_epi16(levels.magnitude, _mm256_sign_epi8(values, levels.level));
    return sums + reinterpret_cast<Sums>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace peft_kernels::cpu::avx2
