// AVX-512 with VNNI: avx512.h's words, and four int8 products and their sum in one instruction.
#pragma once

#include "avx512.h"

namespace peft_kernels::cpu::avx512_vnni {
using namespace avx512;
namespace {

inline constexpr const char* kName = "avx512_vnni";

struct VnniProducts : avx512::Int8Products {
  static constexpr int kLevelOffset = 128;  // vpdpbusd takes one factor without a sign

  using Levels = __m512i;
  static Levels levels(Bytes level) { return level; }
  static Levels load_levels(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Sums multiply_add(Levels levels, Values values, Sums sums) {
    return reinterpret_cast<Sums>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), levels, values));
  }
};
using Int8Products = VnniProducts;

}  // namespace
}  // namespace peft_kernels::cpu::avx512_vnni
