// The NF4 format: the one place in C++ that knows it.
//
// A weight [N, K] is stored row-major as 4-bit codes, two to a byte. Element e (flat, row-major) sits in byte e / 2:
// the HIGH nibble holds the even e, the low nibble the odd e. A last odd element leaves its low nibble unused.
// Every `blocksize` consecutive elements (a power of two, 32 .. 4096; a block may cross a row) share one scale, absmax:
//
//     weight[e] = kNF4Code[code(e)] * absmax[e / blocksize]          one fp32 product, rounded once
//
// Double quantisation stores absmax itself as 8-bit codes (QLoRA, section 3):
//
//     absmax[b] = nested_code[absmax_codes[b]] * nested_absmax[b / nested_blocksize] + nested_offset
//
// with the product and the sum each rounded to fp32 (never contracted into an FMA).
// Source: Dettmers et al., "QLoRA", arXiv 2305.14314, section 3 and appendix E (the 16 levels).
#pragma once

namespace peft_kernels {

inline constexpr float kNF4Code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

}  // namespace peft_kernels
