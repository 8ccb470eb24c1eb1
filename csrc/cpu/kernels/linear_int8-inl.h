// NF4 linear, forward, on activations that are rounded to int8; peft_kernels/ops/linear/README.md says what is
// computed.
//
// The reduction is cut into segments, in which a token has one scale and a row of W one absmax: groups of 64 inputs, or
// halves of them where blocks of W are that small. The products of a segment are summed in int32, exactly; segments are
// added in order, in fp32 and without FMA. So the bits depend neither on the instruction set, nor on the other tokens,
// nor on the number of threads.
//
// Where blocks of W begin inside of segments ("ragged"), a segment is a whole group, and there are several of each: one
// for every block that a row can have in a group, with the levels of that block and zeros in the place of the others.

inline constexpr int64_t kGroup = 64;            // inputs of a token that share a scale
inline constexpr int64_t kChunkBytes = 1 << 19;  // of rounded activations at a time: half of a second-level cache
inline constexpr int64_t kFewTokens = 4;         // levels are not stored for these

inline constexpr float kMostValue = 127.0f;   // a token's largest magnitude in a group
inline constexpr float kLevelScale = 124.0f;  // the integer up to 127 whose rounding errs least on normal weights
// rint(kLevelScale * kNF4Code)
inline constexpr int8_t kInt8Levels[16] = {-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124};
inline constexpr int64_t kWordLevels = 8;  // nibbles of a 32-bit word
inline constexpr int64_t kMostParts = 3;   // blocks of W, of 32 or more, that can meet a group

// values[i] = rint(x[i] * 127 / largest magnitude). Returns what turns a sum of values times levels into one of inputs
// times codes: NaN where an input is not finite.
float round_group(const float* x, int64_t count, int8_t* values) {
  constexpr float kLeast = 0x1p-120f;      // groups below it count as zeros: 127 / magnitude could overflow
  constexpr float kToInteger = 0x1.8p23f;  // v + kToInteger holds rint(v) in its low bits
  int32_t bits = 0;  // of the largest magnitude: as integers, magnitudes keep their order, and NaN comes last
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = __builtin_bit_cast(int32_t, x[i]) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  const float largest = __builtin_bit_cast(float, bits);
  const float factor = largest >= kLeast ? kMostValue / largest : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = x[i] * factor + kToInteger;
    values[i] = static_cast<int8_t>(__builtin_bit_cast(int32_t, shifted) - __builtin_bit_cast(int32_t, kToInteger));
  }
  return bits < 0x7f800000 ? largest / (kMostValue * kLevelScale) : __builtin_nanf("");
}

// A chunk of tokens, rounded; in blocks of kBlockDepth inputs, so that what a panel meets is contiguous.
struct RoundedTokens {
  int64_t tokens;
  int64_t segment;  // inputs
  int64_t parts;    // segments that share their inputs; 1 where W is not ragged
  int8_t* values;   // [block][token][kBlockDepth]; where W is not ragged, of every eight the even ones first
  float* scales;    // [block][token][segment]
  int32_t* starts;  // [block][token][segment]: where a sum starts, to make up for kLevelOffset

  bool ragged() const { return parts > 1; }
  int64_t stride() const { return kBlockDepth / segment; }  // of scales and starts, from token to token
};

// Token m of x, as token t of the chunk.
void round_token(Array x, int64_t in_features, int64_t m, int64_t t, const RoundedTokens& out) {
  for (int64_t k0 = 0, block = 0; k0 < in_features; k0 += kBlockDepth, ++block) {
    const int64_t depth = lesser(kBlockDepth, in_features - k0), row = block * out.tokens + t;
    float inputs[kBlockDepth];
    load_row(x, m * in_features + k0, depth, inputs);
    for (int64_t k = 0; k < depth; k += kGroup) {
      const int64_t count = lesser(kGroup, depth - k);
      int8_t values[kGroup] = {};
      const float scale = round_group(inputs + k, count, values);
      int8_t* to = out.values + row * kBlockDepth + k;
      if (out.ragged()) {
        std::memcpy(to, values, kGroup);
      } else {
        for (int64_t i = 0; i < count; i += 8) {
          for (int64_t j = 0; j < 4; ++j) {
            to[i + j] = values[i + 2 * j];
            to[i + 4 + j] = values[i + 2 * j + 1];
          }
        }
      }
      for (int64_t i = 0; i < count; i += out.segment) {
        int32_t sum = 0;
        for (int64_t j = i; j < i + out.segment; ++j) sum += values[j];
        const int64_t at = row * out.stride() + (k + i) / out.segment;
        out.scales[at] = scale;
        out.starts[at] = -Int8Products::kLevelOffset * sum;
      }
    }
  }
}

// kPanelColumns rows of W from n0 on, of which `columns` exist; the last one stands in for the others, whose results
// are never stored.
struct PanelRows {
  const NF4Weight& w;
  int64_t in_features, n0, columns;

  int64_t element(int64_t i, int64_t k) const { return (n0 + lesser(i, columns - 1)) * in_features + k; }
  void point(int64_t first, int64_t k, const uint8_t* (&row)[kLanes]) const {
    for (int64_t i = 0; i < kLanes; ++i) row[i] = w.packed + (element(first + i, k) >> 1);
  }
  // What follows the panel in memory, and is due next, as far as the panel is read up to its input k.
  const uint8_t* next(int64_t k) const {
    return w.packed + (((n0 + kPanelColumns) * in_features + kPanelColumns * k) >> 1);
  }
};

// to[c][i] = the c-th 32-bit word of from[i], for the kPanelColumns rows of `row_bytes` at `from`.
void transpose_words(const void* from, int64_t row_bytes, int64_t words, void* to) {
  for (int64_t i = 0; i < kPanelColumns; i += kLanes) {
    const uint8_t* row[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) row[j] = static_cast<const uint8_t*>(from) + (i + j) * row_bytes;
    for (int64_t word = 0; word < words; word += kLanes) {
      const int64_t count = lesser(kLanes, words - word);
      const Words w32 = load_transposed(row, word * 4, count);
      for (int64_t c = 0; c < count; ++c) {
        std::memcpy(static_cast<uint32_t*>(to) + (word + c) * kPanelColumns + i, &w32.column[c], 4 * kLanes);
      }
    }
  }
}

// scales[s][i] = absmax of segment s of the panel's row i. `buffer` has the same size.
void load_segment_scales(const PanelRows& panel, int64_t segment, float* buffer, float* scales) {
  const NF4Weight& w = panel.w;
  const int64_t segments = panel.in_features / segment;
  for (int64_t i = 0; i < kPanelColumns; ++i) {
    const int64_t first = panel.element(i, 0), block = first >> w.blocksize_log2;
    const int64_t blocks = (panel.element(i, panel.in_features - 1) >> w.blocksize_log2) - block + 1;
    float* row = buffer + i * segments;
    load_scales(w, block, blocks, row);
    if (segment < int64_t{1} << w.blocksize_log2) {  // blocks of several segments: spread their absmax, the last first
      for (int64_t s = segments - 1; s >= 0; --s) row[s] = row[((first + s * segment) >> w.blocksize_log2) - block];
    }
    const int64_t next = block + (kPanelColumns * panel.in_features >> w.blocksize_log2);
    for (int64_t b = 0; b < blocks; b += kCacheLine / 4) prefetch_scales(w, next + b);
  }
  transpose_words(buffer, segments * 4, segments, scales);
}

inline Int8Products::LevelTable level_table() {
  int8_t stored[16];
  for (int i = 0; i < 16; ++i) stored[i] = static_cast<int8_t>(kInt8Levels[i] + Int8Products::kLevelOffset);
  return Int8Products::load_table(stored);
}

// --- few tokens: levels go from the look-up straight into the sums ---------------------------------------------------

// sums[t][i] = token t times the panel's row i. Segments are whole groups.
template <int kTokens>
void multiply_few(const PanelRows& panel, const RoundedTokens& x, const float* panel_scales, float* sums) {
  using P = Int8Products;
  constexpr int64_t kSegmentWords = kGroup / kWordLevels;
  const P::LevelTable table = level_table();
  const int64_t stride = x.stride();
  const uint8_t* next = panel.next(0);
  for (int64_t first = 0; first < kPanelColumns; first += kLanes) {
    const uint8_t* row[kLanes];
    panel.point(first, 0, row);
    const float* panel_scale = panel_scales + first;
    Vec total[kTokens];
    for (int t = 0; t < kTokens; ++t) total[t] = zero();
    for (int64_t k0 = 0; k0 < panel.in_features; k0 += kBlockDepth) {
      const int64_t depth = lesser(kBlockDepth, panel.in_features - k0), block = k0 / kBlockDepth * kTokens;
      const int8_t* values = x.values + block * kBlockDepth;
      const float* scales = x.scales + block * stride;
      const int32_t* starts = x.starts + block * stride;
      typename P::Sums even[kTokens], odd[kTokens];
      for (int64_t word = 0; word < depth / kWordLevels; word += kLanes) {
        const int64_t words = lesser(kLanes, depth / kWordLevels - word);
        const Words w32 = load_transposed(row, k0 / 2 + word * 4, words);
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c, values += kWordLevels, next += 4 * kLanes) {
          if (c >= words) break;
          prefetch_far(next);
          const int64_t done = (kLanes % kSegmentWords == 0 ? 0 : word) + c;  // words; known where segments are whole
          for (int t = 0; t < kTokens && done % kSegmentWords == 0; ++t) {
            even[t] = P::broadcast_sum(starts[t * stride]);
            odd[t] = P::broadcast_sum(0);
          }
          const auto b0 = P::levels(P::look_up_even(table, w32.column[c]));
          const auto b1 = P::levels(P::look_up_odd(table, w32.column[c]));
          for (int t = 0; t < kTokens; ++t) {
            even[t] = P::multiply_add(b0, P::broadcast_values(values + t * kBlockDepth), even[t]);
            odd[t] = P::multiply_add(b1, P::broadcast_values(values + t * kBlockDepth + 4), odd[t]);
          }
          if ((done + 1) % kSegmentWords != 0) continue;
          const Vec scale = load(panel_scale);
          for (int t = 0; t < kTokens; ++t) {
            const Vec sum = P::to_float(P::add(even[t], odd[t]));
            total[t] = add(total[t], mul(mul(sum, broadcast(scales[t * stride])), scale));
          }
          panel_scale += kPanelColumns;
          ++scales;
          ++starts;
        }
      }
    }
    for (int t = 0; t < kTokens; ++t) store(sums + t * kPanelColumns + first, total[t]);
  }
}

template <int kTokens>
void dispatch_few(const PanelRows& panel, const RoundedTokens& x, const float* panel_scales, float* sums) {
  if constexpr (kTokens > 0) {
    if (x.tokens == kTokens) return multiply_few<kTokens>(panel, x, panel_scales, sums);
    dispatch_few<kTokens - 1>(panel, x, panel_scales, sums);
  }
}

// --- more tokens, or a ragged W: products with decoded panels --------------------------------------------------------

// levels[k / 4][i][k % 4] = level of the panel's row i at input k0 + k, with k in the order of a token's values.
void decode_levels(const PanelRows& panel, int64_t k0, int64_t depth, int8_t* levels) {
  constexpr int64_t kQuadBytes = 4 * kPanelColumns;
  const Int8Products::LevelTable table = level_table();
  const uint8_t* next = panel.next(k0);
  for (int64_t first = 0; first < kPanelColumns; first += kLanes) {
    const uint8_t* row[kLanes];
    panel.point(first, k0, row);
    int8_t* out = levels + 4 * first;
    for (int64_t word = 0; word < depth / kWordLevels; word += kLanes) {
      const int64_t words = lesser(kLanes, depth / kWordLevels - word);
      const Words w32 = load_transposed(row, word * 4, words);
      for (int64_t c = 0; c < words; ++c, out += 2 * kQuadBytes, next += 4 * kLanes) {
        prefetch_far(next);
        Int8Products::store_bytes(out, Int8Products::look_up_even(table, w32.column[c]));
        Int8Products::store_bytes(out + kQuadBytes, Int8Products::look_up_odd(table, w32.column[c]));
      }
    }
  }
}

// The same for a ragged W: levels[group][part][k / 4][i][k % 4], and scales[group][part][i], the absmax of the part.
void decode_ragged(const PanelRows& panel, int64_t k0, int64_t depth, int64_t parts, int8_t* levels, float* scales) {
  constexpr int8_t kZero = static_cast<int8_t>(Int8Products::kLevelOffset);
  const int64_t groups = ceil_div(depth, kGroup), row_size = groups * parts * kGroup;
  int8_t rows[kPanelColumns][kBlockDepth * kMostParts];  // [group][part][kGroup]
  for (int64_t i = 0; i < kPanelColumns; ++i) {
    for (int64_t j = 0; j < row_size; ++j) rows[i][j] = kZero;
    for (int64_t j = 0; j < groups * parts; ++j) scales[j * kPanelColumns + i] = 0.0f;
    for (int64_t k = 0; k < depth;) {
      const int64_t group = k / kGroup, element = panel.element(i, k0 + k), log2 = panel.w.blocksize_log2;
      const int64_t block = element >> log2, part = block - (panel.element(i, k0 + group * kGroup) >> log2);
      const int64_t end = lesser(lesser((group + 1) * kGroup, depth), k + ((block + 1) << log2) - element);
      const int64_t segment = group * parts + part;
      load_scales(panel.w, block, 1, scales + segment * kPanelColumns + i);
      for (int64_t e = element; k < end; ++k, ++e) {
        const uint8_t byte = panel.w.packed[e >> 1];
        rows[i][segment * kGroup + k % kGroup] =
            static_cast<int8_t>(kInt8Levels[e & 1 ? byte & 15 : byte >> 4] + Int8Products::kLevelOffset);
      }
    }
  }
  transpose_words(&rows[0][0], sizeof rows[0], row_size / 4, levels);
}

// Some tokens, a panel, and their segments of one block.
struct Int8Tile {
  const int8_t* values;       // [token][kBlockDepth]
  const float* scales;        // [token][stride]
  const int32_t* starts;      // [token][stride]
  int64_t stride;             // segments
  int64_t quads;              // in a segment
  const int8_t* levels;       // [quad][column][4]
  const float* panel_scales;  // [segment][column]
  float* sums;                // [token][column]
};

// sums[i][j] += (products of the first segment of token i and column j) * scales[i] * panel_scales[j]. Not inlined: GCC
// would keep `sums` in registers from segment to segment, and spill.
template <int kRows>
__attribute__((noinline)) void multiply_segment(const Int8Tile& tile) {
  using P = Int8Products;
  typename P::Sums left[kRows], right[kRows];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) left[i] = right[i] = P::broadcast_sum(tile.starts[i * tile.stride]);
  const int8_t *values = tile.values, *levels = tile.levels;
  for (int64_t quad = 0; quad < tile.quads; ++quad, values += 4, levels += 4 * kPanelColumns) {
    const auto b0 = P::load_levels(levels), b1 = P::load_levels(levels + 4 * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const auto a = P::broadcast_values(values + i * kBlockDepth);
      left[i] = P::multiply_add(b0, a, left[i]);
      right[i] = P::multiply_add(b1, a, right[i]);
    }
  }
  const Vec scale0 = load(tile.panel_scales), scale1 = load(tile.panel_scales + kLanes);
  float* sums = tile.sums;
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i, sums += kPanelColumns) {
    const Vec scale = broadcast(tile.scales[i * tile.stride]);
    store(sums, add(load(sums), mul(mul(P::to_float(left[i]), scale), scale0)));
    store(sums + kLanes, add(load(sums + kLanes), mul(mul(P::to_float(right[i]), scale), scale1)));
  }
}

template <int kRows>
void multiply_segments(int64_t rows, int64_t segments, int64_t parts, Int8Tile tile) {
  if constexpr (kRows > 0) {
    if (rows != kRows) return multiply_segments<kRows - 1>(rows, segments, parts, tile);
    for (int64_t s = 1; s <= segments * parts; ++s) {
      multiply_segment<kRows>(tile);
      tile.levels += 4 * tile.quads * kPanelColumns;
      tile.panel_scales += kPanelColumns;
      if (s % parts != 0) continue;
      tile.values += 4 * tile.quads;
      ++tile.scales;
      ++tile.starts;
    }
  }
}

// sums[t][i] = token t times the panel's row i. `panel_scales` is not used where W is ragged.
void multiply_many(const PanelRows& panel, const RoundedTokens& x, const float* panel_scales, float* sums) {
  const int64_t tiles = ceil_div(x.tokens, Int8Products::kTileRows);  // of nearly equal height, as in tile-inl.h
  fill_zero(sums, x.tokens * kPanelColumns);
  for (int64_t k0 = 0; k0 < panel.in_features; k0 += kBlockDepth) {
    alignas(64) int8_t levels[kMostParts * kBlockDepth * kPanelColumns];
    float ragged_scales[kMostParts * kBlockDepth / kGroup * kPanelColumns];
    const int64_t depth = lesser(kBlockDepth, panel.in_features - k0), segments = ceil_div(depth, x.segment);
    if (x.ragged()) {
      decode_ragged(panel, k0, depth, x.parts, levels, ragged_scales);
    } else {
      decode_levels(panel, k0, depth, levels);
    }
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = x.tokens * i / tiles, rows = x.tokens * (i + 1) / tiles - first;
      const int64_t row = k0 / kBlockDepth * x.tokens + first;
      const Int8Tile tile{x.values + row * kBlockDepth,
                          x.scales + row * x.stride(),
                          x.starts + row * x.stride(),
                          x.stride(),
                          x.segment / 4,
                          levels,
                          x.ragged() ? ragged_scales : panel_scales + k0 / x.segment * kPanelColumns,
                          sums + first * kPanelColumns};
      multiply_segments<Int8Products::kTileRows>(rows, segments, x.parts, tile);
    }
  }
}

// y[m, n0 .. n0 + columns) = sums + bias, rounded once.
void finish_int8(const NF4LinearInt8& p, int64_t m, int64_t n0, int64_t columns, float* sums) {
  if (p.bias) {
    float buffer[kPanelColumns] = {};
    const float* bias = as_float(p.bias, n0, columns, buffer);
    for (int64_t i = 0; i < columns; ++i) sums[i] += bias[i];
  }
  store_row(sums, columns, p.y, m * p.out_features + n0);
}

void nf4_linear_int8(const NF4LinearInt8& p, ThreadPool pool) {
  if (p.tokens == 0) return;
  const int64_t blocksize = int64_t{1} << p.nf4.blocksize_log2;
  const bool ragged = p.in_features % lesser(kGroup, blocksize) != 0;
  const int64_t segment = ragged ? kGroup : lesser(kGroup, blocksize);
  const int64_t parts = !ragged ? 1 : (blocksize < kGroup ? kMostParts : 2);

  const int64_t blocks = ceil_div(p.in_features, kBlockDepth);
  const int64_t chunk = lesser(p.tokens, greater(kChunkBytes / (blocks * kBlockDepth), Int8Products::kTileRows));
  const int64_t values_size = blocks * chunk * kBlockDepth / 4, scales_size = blocks * chunk * kBlockDepth / segment;
  Slice caller{caller_scratch(static_cast<size_t>(slice_size(values_size) + 2 * slice_size(scales_size)))};
  RoundedTokens x{chunk,
                  segment,
                  parts,
                  reinterpret_cast<int8_t*>(caller.take(values_size)),
                  caller.take(scales_size),
                  reinterpret_cast<int32_t*>(caller.take(scales_size))};
  for (int64_t m0 = 0; m0 < p.tokens; m0 += chunk) {
    x.tokens = lesser(chunk, p.tokens - m0);
    parallel(pool, x.tokens, [&](int64_t t) { round_token(p.x, p.in_features, m0 + t, t, x); });
    parallel(pool, ceil_div(p.out_features, kPanelColumns), [&](int64_t task) {
      const int64_t n0 = task * kPanelColumns, columns = lesser(kPanelColumns, p.out_features - n0);
      const PanelRows panel{p.nf4, p.in_features, n0, columns};
      const int64_t sums_size = x.tokens * kPanelColumns, panel_scales_size = p.in_features / segment * kPanelColumns;
      Slice scratch{task_scratch(static_cast<size_t>(slice_size(sums_size) + 2 * slice_size(panel_scales_size)))};
      float* sums = scratch.take(sums_size);
      float* panel_scales = scratch.take(panel_scales_size);
      if (!ragged) load_segment_scales(panel, segment, scratch.take(panel_scales_size), panel_scales);
      if (x.tokens <= kFewTokens && segment == kGroup && !ragged) {
        dispatch_few<kFewTokens>(panel, x, panel_scales, sums);
      } else {
        multiply_many(panel, x, panel_scales, sums);
      }
      for (int64_t t = 0; t < x.tokens; ++t) finish_int8(p, m0 + t, n0, columns, sums + t * kPanelColumns);
    });
  }
}
