// Philox4x32-10, a counter-based generator: word w of counter c under key k is a pure function of (c, k), so a dropout
// mask never has to be stored. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11,
// section 3.3.
//
// Dropout uses counter (lo32(e / 4), hi32(e / 4), 0, 0), key (lo32(seed), hi32(seed)) and word e % 4 for the element
// with row-major flat index e; the element is kept iff word >= threshold = floor(p * 2^32). The compare is on integers,
// so every backend keeps the same elements.
#pragma once

#include <cstdint>

namespace peft_kernels {

inline constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
inline constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // Weyl key increments
inline constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t word[4];
};

inline constexpr __attribute__((always_inline)) PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0,
                                                                       uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0, p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(p0);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace peft_kernels
