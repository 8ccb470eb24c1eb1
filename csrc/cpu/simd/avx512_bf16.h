// AVX-512 with AVX512_BF16: avx512.h's words, VNNI's int8 products, and products of bf16 pairs (twice the fp32 rate).
#pragma once

#include "avx512_vnni.h"

namespace peft_kernels::cpu::avx512_bf16 {
using namespace avx512;
namespace {

using Int8Products = avx512_vnni::VnniProducts;

inline constexpr const char* kName = "avx512_bf16";

// The micro-kernel's operands as bf16 pairs (Fp32 in nf4-inl.h says what each member means). Subnormals count as zero.
struct Bf16Pairs {
  using Unit = uint32_t;  // the earlier element in the low half
  using Units = __m512i;
  static constexpr int kElements = 2;

  static Units load_units(const Unit* p) { return _mm512_loadu_si512(p); }
  static Units broadcast_unit(Unit u) { return _mm512_set1_epi32(static_cast<int>(u)); }
  static Vec multiply_add(Units a, Units b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  static __m512i round(Vec first, Vec second) {  // the sixteen of `first`, then those of `second`
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  }
  static void store_two(Unit* panel, Vec first, Vec second) {
    const __m512i alternate = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(panel, _mm512_permutexvar_epi16(alternate, round(first, second)));
  }
  static void store_two_interleaved(Unit* panel, Vec high0, Vec low0, Vec high1, Vec low1) {
    // Words of `high`: 0 .. 15 of row 0, 16 .. 31 of row 1; words of `low`: from 32 on, the same.
    const __m512i first = _mm512_set_epi16(55, 39, 23, 7, 54, 38, 22, 6, 53, 37, 21, 5, 52, 36, 20, 4, 51, 35, 19, 3,
                                           50, 34, 18, 2, 49, 33, 17, 1, 48, 32, 16, 0);
    const __m512i high = round(high0, high1), low = round(low0, low1);
    _mm512_storeu_si512(panel, _mm512_permutex2var_epi16(high, first, low));
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(8));
    _mm512_storeu_si512(panel + kLanes, _mm512_permutex2var_epi16(high, second, low));
  }
};

}  // namespace
}  // namespace peft_kernels::cpu::avx512_bf16
