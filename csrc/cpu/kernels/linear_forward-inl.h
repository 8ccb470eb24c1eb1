// The adapted linear, forward. Three pieces: u = D(x) A^T; then either the look-up GEMV (few tokens: each weight is
// looked up straight into the accumulation) or blocked products on decoded panels (more tokens: a panel is decoded once
// and used by a block of tokens). The order in which one output element is summed depends on shapes only, never on the
// number of threads.

inline constexpr int64_t kBlockTokens = 192;       // tokens that share a decoded panel; a multiple of every kTileRows
inline constexpr int64_t kMostBlockColumns = 128;  // output features that a task owns, at most

// x[m, k0 .. k0 + count) in fp32 with dropout applied, for the low-rank branch.
void load_dropped(const LowRank& lowrank, Array x, int64_t in_features, int64_t m, int64_t k0, int64_t count,
                  float* dst) {
  load_row(x, m * in_features + k0, count, dst);
  if (lowrank.dropout.threshold != 0) apply_dropout(dst, count, m * in_features + k0, lowrank.dropout);
}

// src[offset .. offset + count) in fp32, times `factor` where there is one.
void load_scaled(Array src, int64_t offset, int64_t count, const float* factor, float* dst) {
  load_row(src, offset, count, dst);
  if (factor != nullptr) multiply_row(dst, factor, count);
}

// A row of x or of the gradient as units of P, as it is: scales are in the panels.
template <class P>
void load_units(Array src, int64_t offset, int64_t count, typename P::Unit* dst) {
  if constexpr (P::kElements == 2) {
    copy_bf16_row(src, offset, count, dst);
  } else {
    load_row(src, offset, count, dst);
  }
}

// sums[t][j] += x[t] . a[j] over `count` elements, for kTokens x kRanks rows; lanes run along k.
template <int kTokens, int kRanks>
void multiply_dots(const float* x, int64_t ldx, const float* const (&a)[4], int64_t count, float* sums, int64_t lds) {
  Vec acc[kTokens][kRanks];
  for (int t = 0; t < kTokens; ++t) {
    for (int j = 0; j < kRanks; ++j) acc[t][j] = zero();
  }
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    Vec row[kRanks];
    for (int j = 0; j < kRanks; ++j) row[j] = load(a[j] + k);
    for (int t = 0; t < kTokens; ++t) {
      const Vec v = load(x + t * ldx + k);
      for (int j = 0; j < kRanks; ++j) acc[t][j] = fmadd(v, row[j], acc[t][j]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int j = 0; j < kRanks; ++j) {
      float sum = reduce_add(acc[t][j]);
      for (int64_t i = k; i < count; ++i) sum += x[t * ldx + i] * a[j][i];
      sums[t * lds + j] += sum;
    }
  }
}

// u[M, rank] = D(x) A^T, in tasks of four tokens.
void lowrank_down(const AdaptedLinear& p, ThreadPool pool) {
  constexpr int64_t kTokens = 4, kChunk = 2048;
  const int64_t rank = p.lowrank.rank;
  parallel(pool, ceil_div(p.tokens, kTokens), [&](int64_t task) {
    const int64_t m0 = task * kTokens, tokens = lesser(kTokens, p.tokens - m0);
    float* x = task_scratch(static_cast<size_t>(2 * kTokens * kChunk));
    float* a_buffer = x + kTokens * kChunk;
    float* u = p.u + m0 * rank;
    fill_zero(u, tokens * rank);
    for (int64_t k0 = 0; k0 < p.in_features; k0 += kChunk) {
      const int64_t count = lesser(kChunk, p.in_features - k0);
      for (int64_t t = 0; t < tokens; ++t)
        load_dropped(p.lowrank, p.x, p.in_features, m0 + t, k0, count, x + t * kChunk);
      for (int64_t j = 0; j < rank; j += 4) {
        const int64_t ranks = lesser(4, rank - j);
        const float* a[4];
        for (int64_t i = 0; i < ranks; ++i) {
          a[i] = as_float(p.lowrank.a, (j + i) * p.in_features + k0, count, a_buffer + i * kChunk);
        }
        if (ranks == 4 && tokens == kTokens) {
          multiply_dots<kTokens, 4>(x, kChunk, a, count, u + j, rank);
        } else if (ranks == 4) {
          for (int64_t t = 0; t < tokens; ++t)
            multiply_dots<1, 4>(x + t * kChunk, kChunk, a, count, u + t * rank + j, rank);
        } else {
          for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t i = 0; i < ranks; ++i) {
              const float* one[4] = {a[i]};
              multiply_dots<1, 1>(x + t * kChunk, kChunk, one, count, u + t * rank + j + i, rank);
            }
          }
        }
      }
    }
  });
}

// Takes the sums of output features n0 .. n0 + count of token m (the product with W and the low-rank part) to y and z.
// column_scale and bias are those features' values, or null.
void finish_outputs(const AdaptedLinear& p, int64_t m, int64_t n0, int64_t count, const float* column_scale,
                    const float* bias, float* sums) {
  const int64_t at = m * p.out_features + n0;
  if (p.z) store_row(sums, count, p.z, at);
  if (column_scale != nullptr) multiply_row(sums, column_scale, count);
  if (bias != nullptr) {
    for (int64_t i = 0; i < count; ++i) sums[i] += bias[i];
  }
  store_row(sums, count, p.y, at);
}

const float* optional_as_float(Array src, int64_t offset, int64_t count, float* buffer) {
  return src ? as_float(src, offset, count, buffer) : nullptr;
}

// --- few tokens: look-up GEMV -------------------------------------------------------------------------------------

// sums[t * lds + r] = x[t] . W[n0 + r] for kRows rows and kTokens tokens. x is in fp32 with each group of 2 * kLanes
// split into its even then its odd members, as the nibbles come: high nibbles first. The rows' scales are at
// scales[r * blocks]. Where `first`, this thread's next rows are fetched from memory on the way.
template <int kTokens, int kRows>
void gemv_rows(const NF4Weight& w, int64_t in_features, const float* x, int64_t n0, const float* scales, bool first,
               float* sums, int64_t lds) {
  // Two accumulators where few would leave the FMA units waiting for each other.
  constexpr int kChains = kTokens <= 2 && kTokens * kRows * 2 <= kAccumulators ? 2 : 1;
  const int64_t blocksize = int64_t{1} << w.blocksize_log2, blocks = in_features >> w.blocksize_log2;
  const int64_t ahead = first ? kRows * (in_features >> 1) : 0;  // bytes
  const Table code = load_table(kNF4Code);
  const uint8_t* row[kRows];
  Vec acc[kRows][kTokens][kChains];
  for (int r = 0; r < kRows; ++r) {
    row[r] = w.packed + (((n0 + r) * in_features) >> 1);
    for (int t = 0; t < kTokens; ++t) {
      for (int c = 0; c < kChains; ++c) acc[r][t][c] = zero();
    }
  }
  for (int64_t block = 0; block < blocks; ++block) {
    Table table[kRows];
    for (int r = 0; r < kRows; ++r) {
      table[r] = scale(code, scales[r * blocks + block]);
      prefetch(row[r] + block * blocksize / 2 + ahead);  // all there is up to blocksize 128; a loop costs more
    }
    for (int64_t k = block * blocksize; k < (block + 1) * blocksize; k += 2 * kLanes) {
      for (int r = 0; r < kRows; ++r) {
        const Bytes b = load_bytes(row[r] + k / 2);
        const Vec high = look_up_high(table[r], b), low = look_up_low(table[r], b);
        for (int t = 0; t < kTokens; ++t) {
          const float* xt = x + t * in_features + k;
          acc[r][t][0] = fmadd(high, load(xt), acc[r][t][0]);
          acc[r][t][kChains - 1] = fmadd(low, load(xt + kLanes), acc[r][t][kChains - 1]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t) {
      sums[t * lds + r] = reduce_add(kChains == 2 ? add(acc[r][t][0], acc[r][t][1]) : acc[r][t][0]);
    }
  }
}

template <int kTokens>
void gemv_dispatch(int64_t tokens, const NF4Weight& w, int64_t in_features, const float* x, int64_t n0, int64_t rows,
                   const float* scales, bool first, float* sums, int64_t lds) {
  if constexpr (kTokens > 0) {
    if (tokens != kTokens) {
      return gemv_dispatch<kTokens - 1>(tokens, w, in_features, x, n0, rows, scales, first, sums, lds);
    }
    constexpr int kRows = kAccumulators / kTokens >= 4 ? 4 : (kAccumulators / kTokens >= 2 ? 2 : 1);
    const int64_t blocks = in_features >> w.blocksize_log2;
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      gemv_rows<kTokens, kRows>(w, in_features, x, n0 + r, scales + r * blocks, first, sums + r, lds);
    }
    for (; r < rows; ++r) {
      gemv_rows<kTokens, 1>(w, in_features, x, n0 + r, scales + r * blocks, first, sums + r, lds);
    }
  }
}

// sums[m * lds + r] for rows n0 + r and all tokens, in groups of at most kGemvGroup of nearly equal size.
void gemv_groups(const AdaptedLinear& p, const float* x, int64_t n0, int64_t rows, float* scales, float* sums,
                 int64_t lds) {
  const int64_t blocks = p.in_features >> p.nf4.blocksize_log2, groups = ceil_div(p.tokens, kGemvGroup);
  load_scales(p.nf4, n0 * blocks, rows * blocks, scales);
  const int64_t scales_a_line = kCacheLine / (p.nf4.absmax != nullptr ? 4 : 1);
  for (int64_t i = 0; i < rows * blocks; i += scales_a_line) prefetch_scales(p.nf4, (n0 + rows) * blocks + i);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t m0 = p.tokens * group / groups, tokens = p.tokens * (group + 1) / groups - m0;
    gemv_dispatch<kGemvGroup>(tokens, p.nf4, p.in_features, x + m0 * p.in_features, n0, rows, scales, group == 0,
                              sums + m0 * lds, lds);
  }
}

void forward_gemv(const AdaptedLinear& p, ThreadPool pool) {
  constexpr int64_t kColumns = 16, kRows = 4;  // output features of a task, and of a pass over x
  const int64_t tokens = p.tokens, in_features = p.in_features, rank = p.lowrank.rank;
  Slice caller{caller_scratch(static_cast<size_t>(slice_size(tokens * in_features) + 2 * slice_size(in_features)))};
  float* x = caller.take(tokens * in_features);
  float* row = caller.take(in_features);
  const float* input_scale = optional_as_float(p.input_scale, 0, in_features, caller.take(in_features));
  for (int64_t m = 0; m < tokens; ++m) {
    load_scaled(p.x, m * in_features, in_features, input_scale, row);
    for (int64_t k = 0; k < in_features; k += 2 * kLanes) {
      Vec even, odd;
      load_deinterleaved(row + k, even, odd);
      store(x + m * in_features + k, even);
      store(x + m * in_features + k + kLanes, odd);
    }
  }

  const int64_t blocks = in_features >> p.nf4.blocksize_log2;
  parallel(pool, ceil_div(p.out_features, kColumns), [&](int64_t task) {
    const int64_t n0 = task * kColumns, columns = lesser(kColumns, p.out_features - n0);
    Slice scratch{task_scratch(static_cast<size_t>(slice_size(kRows * blocks) + slice_size(rank)))};
    float* scales = scratch.take(kRows * blocks);
    float* b_buffer = scratch.take(rank);
    float sums[kGemvTokens * kColumns], scale_buffer[kColumns], bias_buffer[kColumns];
    if (rank != 0) prefetch_row(p.lowrank.b, n0 * rank, columns * rank);  // or it would be waited for, after W
    for (int64_t n = 0; n < columns; n += kRows) {
      gemv_groups(p, x, n0 + n, lesser(kRows, columns - n), scales, sums + n, kColumns);
    }
    if (rank != 0) {
      for (int64_t i = 0; i < columns; ++i) {
        const float* b = as_float(p.lowrank.b, (n0 + i) * rank, rank, b_buffer);
        for (int64_t m = 0; m < tokens; ++m) {
          float dot = 0.0f;
          const float* one[4] = {b};
          multiply_dots<1, 1>(p.u + m * rank, rank, one, rank, &dot, 1);
          sums[m * kColumns + i] += p.lowrank.scaling * dot;
        }
      }
    }
    const float* column_scale = optional_as_float(p.column_scale, n0, columns, scale_buffer);
    const float* bias = optional_as_float(p.bias, n0, columns, bias_buffer);
    for (int64_t m = 0; m < tokens; ++m) finish_outputs(p, m, n0, columns, column_scale, bias, sums + m * kColumns);
  });
}

// --- more tokens: products on decoded panels ------------------------------------------------------------------------

// The features that one task owns, in whole panels: four tasks a thread, but no more features than `most`. Any choice
// gives the same bits.
inline int64_t block_columns(int64_t features, int64_t most, ThreadPool pool) {
  const int64_t share = ceil_div(ceil_div(features, 4 * pool.threads), kPanelColumns) * kPanelColumns;
  return lesser(share, most);
}

template <class P>
void forward_blocked(const AdaptedLinear& p, ThreadPool pool) {
  using Unit = typename P::Unit;
  static_assert(sizeof(Unit) == sizeof(float));
  const int64_t in_features = p.in_features, out_features = p.out_features, rank = p.lowrank.rank;
  const int64_t block = block_columns(out_features, kMostBlockColumns, pool),
                column_blocks = ceil_div(out_features, block);
  const int64_t token_blocks = ceil_div(p.tokens, kBlockTokens);  // of nearly equal height: tasks of equal work
  parallel(pool, token_blocks * column_blocks, [&](int64_t task) {
    const int64_t token_block = task / column_blocks, m0 = p.tokens * token_block / token_blocks;
    const int64_t tokens = p.tokens * (token_block + 1) / token_blocks - m0;
    const int64_t n0 = task % column_blocks * block, columns = lesser(block, out_features - n0);
    const int64_t width = ceil_div(columns, kPanelColumns) * kPanelColumns;
    Slice scratch{task_scratch(static_cast<size_t>(slice_size(tokens * kBlockDepth) + slice_size(kBlockDepth * block) +
                                                   slice_size(tokens * block) + slice_size(block * kScaleBlocks)))};
    float* a = scratch.take(tokens * kBlockDepth);       // [tokens, depth]
    float* panels = scratch.take(kBlockDepth * block);   // [width / P, depth, P]
    float* sums = scratch.take(tokens * block);          // [tokens, width]
    float* scales = scratch.take(block * kScaleBlocks);  // [columns, kScaleBlocks]

    if (p.base) {
      load_block(p.base, out_features, m0, tokens, n0, columns, width, sums);
    } else {
      fill_zero(sums, tokens * width);
      Unit* units = reinterpret_cast<Unit*>(a);
      Unit* panel = reinterpret_cast<Unit*>(panels);
      const bool whole_blocks = rows_are_whole_blocks(p.nf4, in_features);
      int64_t loaded = -1;  // which kScaleBlocks of each row `scales` has
      for (int64_t k0 = 0; k0 < in_features; k0 += kBlockElements<P>) {
        const int64_t depth = lesser(kBlockElements<P>, in_features - k0);
        if (const int64_t due = (k0 >> p.nf4.blocksize_log2) / kScaleBlocks; whole_blocks && due != loaded) {
          loaded = due;
          load_scales_of_rows(p.nf4, in_features, n0, columns, due * kScaleBlocks, block, scales);
        }
        float scale_buffer[kBlockElements<P>];
        const float* input_scale = optional_as_float(p.input_scale, k0, depth, scale_buffer);
        for (int64_t t = 0; t < tokens; ++t) {
          load_units<P>(p.x, (m0 + t) * in_features + k0, depth, units + t * kBlockDepth);
        }
        const int64_t ahead = k0 + depth < in_features ? depth : block * in_features - k0;
        for (int64_t j = 0; j < width; j += kPanelColumns) {  // a panel is used while it is in the first-level cache
          decode_panel_by_output<P>(p.nf4, in_features, n0 + j, lesser(kPanelColumns, columns - j), k0, depth, ahead,
                                    scales + j * kScaleBlocks, input_scale, panel);
          multiply_panel<P>(units, kBlockDepth, tokens, panel, ceil_div(depth, P::kElements), sums + j, width);
        }
      }
    }

    for (int64_t j0 = 0; j0 < rank; j0 += kBlockDepth) {  // the low-rank product, into the same sums
      const int64_t depth = lesser(kBlockDepth, rank - j0);
      fill_zero(panels, depth * width);
      for (int64_t i = 0; i < columns; ++i) {  // B^T
        float row[kBlockDepth];
        load_row(p.lowrank.b, (n0 + i) * rank + j0, depth, row);
        float* panel = panels + i / kPanelColumns * depth * kPanelColumns + i % kPanelColumns;
        for (int64_t j = 0; j < depth; ++j) panel[j * kPanelColumns] = row[j];
      }
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < depth; ++j) a[t * kBlockDepth + j] = p.lowrank.scaling * p.u[(m0 + t) * rank + j0 + j];
      }
      multiply_panels(a, kBlockDepth, tokens, panels, depth, width, sums);
    }

    float scale_buffer[kMostBlockColumns], bias_buffer[kMostBlockColumns];
    const float* column_scale = optional_as_float(p.column_scale, n0, columns, scale_buffer);
    const float* bias = optional_as_float(p.bias, n0, columns, bias_buffer);
    for (int64_t t = 0; t < tokens; ++t) finish_outputs(p, m0 + t, n0, columns, column_scale, bias, sums + t * width);
  });
}

// P is void in a set without bf16 arithmetic, which plans no such product.
template <class P>
void forward_bf16(const AdaptedLinear& p, ThreadPool pool) {
  if constexpr (!std::is_void_v<P>) forward_blocked<P>(p, pool);
}

void adapted_linear(const AdaptedLinear& p, ThreadPool pool) {
  if (p.tokens == 0) return;
  if (p.lowrank.rank != 0) lowrank_down(p, pool);
  if (p.base) return forward_blocked<Fp32>(p, pool);
  switch (plan({false, p.tokens, p.in_features, p.nf4.blocksize_log2, p.x.dtype})) {
    case Method::kGemv:
      return forward_gemv(p, pool);
    case Method::kFp32Panels:
      return forward_blocked<Fp32>(p, pool);
    case Method::kBf16Panels:
      return forward_bf16<Bf16Pairs>(p, pool);
  }
}
