// What the AVX2 and AVX-512 headers share.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace peft_kernels::cpu {

// Byte j of each of 16 rows, for 16 bytes a row.
struct ByteColumns {
  __m128i column[16];
};

// Transposes 16 rows of 16 bytes. Each round interleaves rows i and i + 8; after four the row index has moved from the
// register's number into the byte's. 64 instructions for 512 weights.
inline __attribute__((always_inline)) ByteColumns load_transposed(const uint8_t* const (&row)[16], int64_t offset) {
  ByteColumns a, b;
  for (int i = 0; i < 16; ++i) a.column[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[i] + offset));
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 8; ++i) {
      b.column[2 * i] = _mm_unpacklo_epi8(a.column[i], a.column[i + 8]);
      b.column[2 * i + 1] = _mm_unpackhi_epi8(a.column[i], a.column[i + 8]);
    }
    a = b;
  }
  return a;
}

}  // namespace peft_kernels::cpu
