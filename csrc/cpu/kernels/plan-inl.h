// Which method computes a product with an NF4 weight: a function of the problem and the instruction set, nothing else.
// docs/cpu.md has the measurements behind the numbers.

inline constexpr int64_t kGemvTokens = 8;         // the look-up GEMV's limit, forward
inline constexpr int64_t kGemvByInputTokens = 4;  // the same for the input gradient

// True where every row starts a block, so that a row is whole bytes and whole blocks: the fast paths.
inline bool rows_are_whole_blocks(int blocksize_log2, int64_t in_features) {
  return (in_features & ((int64_t{1} << blocksize_log2) - 1)) == 0;
}

Method plan(const NF4Product& p) {
  if (!rows_are_whole_blocks(p.blocksize_log2, p.in_features)) return Method::kFp32Panels;
  if (p.tokens <= (p.by_input ? kGemvByInputTokens : kGemvTokens)) return Method::kGemv;
  const bool bf16 = !std::is_void_v<Bf16Pairs> && p.dtype == DType::kBFloat16 && !p.scaled;
  return bf16 ? Method::kBf16Panels : Method::kFp32Panels;
}
