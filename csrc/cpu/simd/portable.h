// Four lanes in plain C++: the meaning of every operation of the other headers, and the build for any processor.
// The loops have constant trip counts, so compilers map them to whatever vectors the target has.
#pragma once

#include <bit>
#include <cstdint>

#include "../../common/float_convert.h"
#include "../../common/philox.h"

namespace peft_kernels::cpu::portable {

inline constexpr const char* kName = "portable";
inline constexpr int kLanes = 4;            // fp32 values in a Vec
inline constexpr int kTileRows = 4;         // rows of the micro-kernel's tile; its columns are 2 * kLanes
inline constexpr int kAccumulators = 8;     // vectors that the look-up GEMV may hold
inline constexpr int64_t kGemvTokens = 20;  // tokens up to which it is used, forward
inline constexpr int64_t kGemvGroup = 6;    // tokens that it takes in one pass over a row

using Bf16Pairs = void;  // a set with bf16 arithmetic has a struct here: avx512_bf16.h
struct Vec {
  float lane[kLanes];
};

#define PK_EACH_LANE for (int i = 0; i < kLanes; ++i)
inline Vec zero() { return {}; }
inline Vec broadcast(float s) {
  Vec r;
  PK_EACH_LANE r.lane[i] = s;
  return r;
}
inline Vec load(const float* p) {
  Vec r;
  PK_EACH_LANE r.lane[i] = p[i];
  return r;
}
inline void store(float* p, Vec v) { PK_EACH_LANE p[i] = v.lane[i]; }
inline Vec add(Vec a, Vec b) {
  PK_EACH_LANE a.lane[i] += b.lane[i];
  return a;
}
inline Vec mul(Vec a, Vec b) {
  PK_EACH_LANE a.lane[i] *= b.lane[i];
  return a;
}
inline Vec fmadd(Vec a, Vec b, Vec c) {
#if defined(__FP_FAST_FMAF)  // Arm has it
  PK_EACH_LANE c.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
#else  // two roundings: without hardware an exact fma is a library call
  PK_EACH_LANE c.lane[i] += a.lane[i] * b.lane[i];
#endif
  return c;
}
inline float reduce_add(Vec v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }

inline Vec load_bf16(const uint16_t* p) {
  Vec r;
  PK_EACH_LANE r.lane[i] = bf16_to_float(p[i]);
  return r;
}
inline Vec load_half(const uint16_t* p) {
  Vec r;
  PK_EACH_LANE r.lane[i] = half_to_float(p[i]);
  return r;
}
inline void store_bf16(uint16_t* p, Vec v) { PK_EACH_LANE p[i] = float_to_bf16(v.lane[i]); }
inline void store_half(uint16_t* p, Vec v) { PK_EACH_LANE p[i] = float_to_half(v.lane[i]); }

// First kLanes of 2 * kLanes floats' even and odd members.
inline void load_deinterleaved(const float* p, Vec& even, Vec& odd) {
  PK_EACH_LANE {
    even.lane[i] = p[2 * i];
    odd.lane[i] = p[2 * i + 1];
  }
}

// Sixteen fp32 entries that are looked up by the high or the low nibble of kLanes bytes.
struct Table {
  float entry[16];
};
// 256 fp32 entries that are looked up by whole bytes.
struct ByteTable {
  const float* entry;
};
inline ByteTable load_byte_table(const float* p) { return {p}; }
inline Vec look_up_bytes(const ByteTable& t, const uint8_t* byte) {
  Vec r;
  PK_EACH_LANE r.lane[i] = t.entry[byte[i]];
  return r;
}
struct Bytes {
  uint8_t byte[kLanes];
};
inline Table load_table(const float* p) {
  Table t;
  for (int i = 0; i < 16; ++i) t.entry[i] = p[i];
  return t;
}
inline Table scale(Table t, float s) {
  for (int i = 0; i < 16; ++i) t.entry[i] *= s;
  return t;
}
inline Bytes load_bytes(const uint8_t* p) {
  Bytes b;
  PK_EACH_LANE b.byte[i] = p[i];
  return b;
}
inline Vec look_up_high(const Table& t, Bytes b) {
  Vec r;
  PK_EACH_LANE r.lane[i] = t.entry[b.byte[i] >> 4];
  return r;
}
inline Vec look_up_low(const Table& t, Bytes b) {
  Vec r;
  PK_EACH_LANE r.lane[i] = t.entry[b.byte[i] & 15];
  return r;
}
// Stores 2 * kLanes floats: high0, low0, high1, low1, ...
inline void store_interleaved(float* p, Vec high, Vec low) {
  PK_EACH_LANE {
    p[2 * i] = high.lane[i];
    p[2 * i + 1] = low.lane[i];
  }
}

// column[c] holds, of each of kLanes rows, the c-th of up to kLanes 32-bit words (eight weights) from a byte offset on.
struct Words {
  uint32_t column[kLanes][kLanes];
};
inline Words load_transposed(const uint8_t* const (&row)[kLanes], int64_t offset, int64_t words) {
  Words w;
  for (int64_t c = 0; c < words; ++c) {
    for (int i = 0; i < kLanes; ++i) {
      const uint8_t* p = row[i] + offset + 4 * c;
      w.column[c][i] = p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
    }
  }
  return w;
}
// Words that are fp32 values.
inline Vec as_floats(const uint32_t (&words)[kLanes]) {
  Vec r;
  PK_EACH_LANE r.lane[i] = std::bit_cast<float>(words[i]);
  return r;
}
// Looks up the nibble that starts at bit kShift of each word.
template <int kShift>
inline Vec look_up_shifted(const Table& t, const uint32_t (&words)[kLanes]) {
  Vec r;
  PK_EACH_LANE r.lane[i] = t.entry[words[i] >> kShift & 15];
  return r;
}

inline void prefetch(const void*) {}
inline void prefetch_far(const void*) {}  // into the second-level cache

// Bit j is set iff dropout keeps element 4 * group + j, for 64 elements (16 counters).
inline uint64_t philox_keep(uint64_t group, uint64_t seed, uint32_t threshold) {
  uint64_t keep = 0;
  for (int g = 0; g < 16; ++g) {
    const uint64_t c = group + static_cast<uint64_t>(g);
    const PhiloxWords out = philox4x32({{static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32), 0, 0}},
                                       static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    for (int w = 0; w < 4; ++w) keep |= static_cast<uint64_t>(out.word[w] >= threshold) << (4 * g + w);
  }
  return keep;
}
// Lanes whose bit is set times s, 0 elsewhere (also for NaN and inf).
inline Vec keep_scaled(uint64_t bits, Vec v, Vec s) {
  PK_EACH_LANE v.lane[i] = (bits >> i & 1) ? v.lane[i] * s.lane[i] : 0.0f;
  return v;
}

// The operands of int8 products: levels of a weight, and values of a token that were rounded to int8. Four products go
// into each lane's 32-bit sum, which is exact: every instruction set has the same ones.
struct Int8Products {
  static constexpr int kTileRows = 4;     // tokens of the micro-kernel's tile; its columns are 2 * kLanes
  static constexpr int kLevelOffset = 0;  // what levels are stored with, where they are multiplied as unsigned bytes

  struct Sums {
    int32_t lane[kLanes];
  };
  static Sums broadcast_sum(int32_t s) {
    Sums r;
    PK_EACH_LANE r.lane[i] = s;
    return r;
  }
  static Sums add(Sums a, Sums b) {
    PK_EACH_LANE a.lane[i] += b.lane[i];
    return a;
  }
  static Vec to_float(Sums a) {
    Vec r;
    PK_EACH_LANE r.lane[i] = static_cast<float>(a.lane[i]);
    return r;
  }

  // Sixteen levels, looked up by the nibbles of kLanes words: first the four high ones of each word (its even weights),
  // then the four low ones; kLanes * 4 bytes each.
  struct LevelTable {
    int8_t entry[16];
  };
  static LevelTable load_table(const int8_t* p) {
    LevelTable t;
    for (int i = 0; i < 16; ++i) t.entry[i] = p[i];
    return t;
  }
  struct Bytes {
    int8_t byte[kLanes][4];
  };
  static Bytes look_up_odd(const LevelTable& t, const uint32_t (&words)[kLanes]) {
    Bytes r;
    PK_EACH_LANE {
      for (int j = 0; j < 4; ++j) r.byte[i][j] = t.entry[words[i] >> (8 * j) & 15];
    }
    return r;
  }
  static Bytes look_up_even(const LevelTable& t, const uint32_t (&words)[kLanes]) {
    Bytes r;
    PK_EACH_LANE {
      for (int j = 0; j < 4; ++j) r.byte[i][j] = t.entry[words[i] >> (8 * j + 4) & 15];
    }
    return r;
  }
  static void store_bytes(int8_t* p, const Bytes& levels) {
    PK_EACH_LANE {
      for (int j = 0; j < 4; ++j) p[4 * i + j] = levels.byte[i][j];
    }
  }

  using Levels = Bytes;
  static Levels levels(const Bytes& levels) { return levels; }
  static Levels load_levels(const int8_t* p) {
    Levels r;
    PK_EACH_LANE {
      for (int j = 0; j < 4; ++j) r.byte[i][j] = p[4 * i + j];
    }
    return r;
  }
  struct Values {
    int8_t byte[4];
  };
  static Values broadcast_values(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Sums multiply_add(const Levels& levels, Values values, Sums sums) {
    PK_EACH_LANE {
      for (int j = 0; j < 4; ++j) sums.lane[i] += levels.byte[i][j] * values.byte[j];
    }
    return sums;
  }
};
#undef PK_EACH_LANE

}  // namespace peft_kernels::cpu::portable
