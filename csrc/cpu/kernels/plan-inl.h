// Which method computes a product with an NF4 weight: a function of the problem and the instruction set, nothing else.
// docs/cpu.md has the measurements behind the numbers.

// Limits of the look-up GEMV besides the set's own, kGemvTokens: where the other choice is bf16 panels; of M * K, as x
// in fp32 has to stay in the second-level cache; and for the input gradient.
inline constexpr int64_t kGemvTokensBesideBf16 = 8, kGemvElements = 262144, kGemvByInputTokens = 8;

// True where every row starts a block, so that a row is whole bytes and whole blocks: the fast paths.
inline bool rows_are_whole_blocks(int blocksize_log2, int64_t in_features) {
  return (in_features & ((int64_t{1} << blocksize_log2) - 1)) == 0;
}

Method plan(const NF4Product& p) {
  if (!rows_are_whole_blocks(p.blocksize_log2, p.in_features)) return Method::kFp32Panels;
  const bool bf16 = !std::is_void_v<Bf16Pairs> && p.dtype == DType::kBFloat16;
  const int64_t most = p.by_input ? kGemvByInputTokens : (bf16 ? kGemvTokensBesideBf16 : kGemvTokens);
  if (p.tokens == 1 || (p.tokens <= most && p.tokens * p.in_features <= kGemvElements)) return Method::kGemv;
  return bf16 ? Method::kBf16Panels : Method::kFp32Panels;
}
