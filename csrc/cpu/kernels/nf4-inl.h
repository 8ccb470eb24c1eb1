// The NF4 codec: scales, decoding into rows and panels, and the two ops. Format: common/nf4.h.

// dst[i] = absmax of block first + i.
void load_scales(const NF4Weight& w, int64_t first, int64_t count, float* dst) {
  if (w.absmax != nullptr) {
    for (int64_t i = 0; i < count; ++i) dst[i] = w.absmax[first + i];
    return;
  }
  const uint8_t* codes = w.absmax_codes + first;
  for (int64_t i = 0; i < count;) {  // runs of blocks that share one second-level scale
    const int64_t group = (first + i) >> w.nested_blocksize_log2;
    const int64_t end = lesser(((group + 1) << w.nested_blocksize_log2) - first, count);
    const float scale = w.nested_absmax[group];
    if (end - i >= kLanes) {
      const ByteTable table = load_byte_table(w.nested_code);
      const Vec factor = broadcast(scale), offset = broadcast(w.nested_offset);
      for (; i + kLanes <= end; i += kLanes) store(dst + i, add(mul(look_up_bytes(table, codes + i), factor), offset));
    }
    for (; i < end; ++i)
      dst[i] = w.nested_code[codes[i]] * scale + w.nested_offset;  // -ffp-contract=off: two roundings
  }
}

inline void prefetch_scales(const NF4Weight& w, int64_t block) {
  prefetch(w.absmax != nullptr ? static_cast<const void*>(w.absmax + block) : w.absmax_codes + block);
}

inline float decode_one(const NF4Weight& w, int64_t element, float scale_of_block) {
  const uint8_t byte = w.packed[element >> 1];
  return kNF4Code[element & 1 ? byte & 15 : byte >> 4] * scale_of_block;
}

// dst[i] = weight[first + i] for any range; whole vectors inside a block, single elements at its ragged ends.
void decode_run(const NF4Weight& w, int64_t first, int64_t count, float* dst) {
  const Table code = load_table(kNF4Code);
  const int64_t last = first + count;
  for (int64_t e = first; e < last;) {
    const int64_t block = e >> w.blocksize_log2;
    const int64_t end = lesser((block + 1) << w.blocksize_log2, last);
    float scale_of_block = 0.0f;
    load_scales(w, block, 1, &scale_of_block);
    const Table table = scale(code, scale_of_block);
    if (e & 1) {
      dst[e - first] = decode_one(w, e, scale_of_block);
      ++e;
    }
    for (; e + 2 * kLanes <= end; e += 2 * kLanes) {
      const Bytes b = load_bytes(w.packed + (e >> 1));
      store_interleaved(dst + (e - first), look_up_high(table, b), look_up_low(table, b));
    }
    for (; e < end; ++e) dst[e - first] = decode_one(w, e, scale_of_block);
  }
}

inline bool rows_are_whole_blocks(const NF4Weight& w, int64_t in_features) {
  return rows_are_whole_blocks(w.blocksize_log2, in_features);
}

// Panels are blocks of a decoded weight as the micro-kernel reads them: kPanelColumns wide, made of units of P (below)
// that hold one or two successive elements of the reduction.
inline constexpr int kPanelColumns = 2 * kLanes;
inline constexpr int64_t kBlockDepth = 256;  // units that a panel is deep, at most; a multiple of every kPanelColumns
template <class P>
inline constexpr int64_t kBlockElements = kBlockDepth * P::kElements;

// How a product is computed; `P` in what follows. This one: in fp32, whatever the dtype of x. Bf16Pairs, in the simd
// header of a set that has it: bf16 times bf16, summed in fp32, for x in bf16; the weight is rounded to bf16.
struct Fp32 {
  using Unit = float;  // what a panel is made of
  using Units = Vec;   // a vector of them
  static constexpr int kElements = 1;

  static Units load_units(const Unit* p) { return load(p); }
  static Units broadcast_unit(Unit u) { return broadcast(u); }
  static Vec multiply_add(Units a, Units b, Vec c) { return fmadd(a, b, c); }
  // Two successive elements of the reduction for kLanes columns, to a panel's one or two rows.
  static void store_two(Unit* panel, Vec first, Vec second) {
    store(panel, first);
    store(panel + kPanelColumns, second);
  }
  // The same for 2 * kLanes columns, of which `high` holds the even and `low` the odd ones.
  static void store_two_interleaved(Unit* panel, Vec high0, Vec low0, Vec high1, Vec low1) {
    store_interleaved(panel, high0, low0);
    store_interleaved(panel + kPanelColumns, high1, low1);
  }
};

// Weights 8 c .. 8 c + 7 of kLanes rows, from their words, to a panel. A byte's high nibble is the even weight.
// `input_scale` is that of the eight, or null.
template <class P, class Word>
inline void store_word(const Table& code, const Word& words, Vec scale_of_row, const float* input_scale,
                       typename P::Unit* out) {
  const auto put = [&](int k, Vec even, Vec odd) {
    even = mul(even, scale_of_row);
    odd = mul(odd, scale_of_row);
    if (input_scale != nullptr) {
      even = mul(even, broadcast(input_scale[k]));
      odd = mul(odd, broadcast(input_scale[k + 1]));
    }
    P::store_two(out + k / P::kElements * kPanelColumns, even, odd);
  };
  put(0, look_up_shifted<4>(code, words), look_up_shifted<0>(code, words));
  put(2, look_up_shifted<12>(code, words), look_up_shifted<8>(code, words));
  put(4, look_up_shifted<20>(code, words), look_up_shifted<16>(code, words));
  put(6, look_up_shifted<28>(code, words), look_up_shifted<24>(code, words));
}

inline constexpr int64_t kScaleBlocks = 16;  // blocks of a row whose scales are kept at hand: a cache line of absmax

// scales[i] = those of the kScaleBlocks blocks from `block` on of row n0 + i. After this row's, the next to be read
// are those of `next_row` rows further on.
void load_scales_of_rows(const NF4Weight& w, int64_t in_features, int64_t n0, int64_t rows, int64_t block,
                         int64_t next_row, float* scales) {
  const int64_t blocks = in_features >> w.blocksize_log2, count = lesser(kScaleBlocks, blocks - block);
  for (int64_t i = 0; i < rows; ++i, scales += kScaleBlocks) {
    const int64_t first = (n0 + i) * blocks + block;
    prefetch_scales(w, block + count < blocks ? first + kScaleBlocks : (n0 + next_row + i) * blocks);
    load_scales(w, first, count, scales);
  }
}

// A panel of the forward product: panel[k][i] = W[n0 + i][k0 + k] for i < kPanelColumns; what it holds from `columns`
// on is not defined. It is multiplied by input_scale[k], where that is given: a bf16 panel is rounded once. W is
// transposed while it is packed (an eighth of the data), then looked up with lanes = output features. Where rows are
// whole blocks, scales[i][b % kScaleBlocks] is that of block b of row n0 + i. The panel after this one in the order of
// k, or of the task's next rows, is `ahead` elements further on.
template <class P>
void decode_panel_by_output(const NF4Weight& w, int64_t in_features, int64_t n0, int64_t columns, int64_t k0,
                            int64_t depth, int64_t ahead, const float* scales, const float* input_scale,
                            typename P::Unit* panel) {
  if (rows_are_whole_blocks(w, in_features)) {
    constexpr int64_t kWord = 8;                                                // weights
    const int64_t blocks = ceil_div(depth, int64_t{1} << w.blocksize_log2);     // k0 starts a block, or they are
    const int64_t first_block = (k0 >> w.blocksize_log2) & (kScaleBlocks - 1);  // larger
    const Table code = load_table(kNF4Code);
    for (int64_t first = 0; first < kPanelColumns; first += kLanes) {
      const uint8_t *row[kLanes], *scale_row[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t column = lesser(first + i, columns - 1);
        row[i] = w.packed + (((n0 + column) * in_features + k0) >> 1);
        scale_row[i] = reinterpret_cast<const uint8_t*>(scales + column * kScaleBlocks + first_block);
        for (int64_t line = 0; line < depth / 2; line += kCacheLine) prefetch(row[i] + ahead / 2 + line);
      }
      Vec scale_of_rows[kBlockElements<P> / 32];  // [block]; 32 is the least blocksize
      for (int64_t block = 0; block < blocks; block += kLanes) {
        const int64_t count = lesser(kLanes, blocks - block);
        const Words words = load_transposed(scale_row, block * int64_t{sizeof(float)}, count);
        for (int64_t i = 0; i < count; ++i) scale_of_rows[block + i] = as_floats(words.column[i]);
      }
      typename P::Unit* out = panel + first;
      for (int64_t k = 0; k < depth; k += kLanes * kWord) {
        const int64_t count = lesser(kLanes, (depth - k) / kWord);
        const Words words = load_transposed(row, k / 2, count);
        for (int64_t c = 0; c < count; ++c, out += kWord / P::kElements * kPanelColumns) {
          store_word<P>(code, words.column[c], scale_of_rows[(k + c * kWord) >> w.blocksize_log2],
                        input_scale == nullptr ? nullptr : input_scale + k + c * kWord, out);
        }
      }
    }
    return;
  }
  if constexpr (P::kElements == 1) {  // plan-inl.h: only fp32 products take rows that are not whole blocks
    float row[kBlockDepth];
    for (int64_t i = 0; i < kPanelColumns; ++i) {
      if (i < columns) {
        decode_run(w, (n0 + i) * in_features + k0, depth, row);
        if (input_scale != nullptr) multiply_row(row, input_scale, depth);
      } else {
        fill_zero(row, depth);
      }
      for (int64_t k = 0; k < depth; ++k) panel[k * kPanelColumns + i] = row[k];
    }
  }
}

// A panel of the input gradient: panel[n][i] = W[n0 + n][k0 + i] for n < rows, zero from `columns` on. Where rows are
// whole blocks, `columns` are always all, and scales[n * stride] is row n's. Elsewhere row n is multiplied by
// column_scale[n], where that is given.
template <class P>
void decode_panel_by_input(const NF4Weight& w, int64_t in_features, int64_t n0, int64_t rows, int64_t k0,
                           int64_t columns, const float* scales, int64_t stride, const float* column_scale,
                           typename P::Unit* panel) {
  if (rows_are_whole_blocks(w, in_features)) {  // then k0 is a multiple of kPanelColumns: a panel row lies in one block
    constexpr int64_t kAhead = 24;              // rows
    const Table code = load_table(kNF4Code);
    Vec high[2], low[2];
    for (int64_t n = 0; n < rows; n += 2, panel += 2 / P::kElements * kPanelColumns) {
      for (int64_t i = 0; i < 2; ++i) {
        if (n + i == rows) {  // an odd last row is followed by zeros
          high[i] = low[i] = zero();
          break;
        }
        const uint8_t* bytes = w.packed + (((n0 + n + i) * in_features + k0) >> 1);
        prefetch(bytes + kAhead * (in_features >> 1));
        const Table table = scale(code, scales[(n + i) * stride]);
        const Bytes b = load_bytes(bytes);
        high[i] = look_up_high(table, b);
        low[i] = look_up_low(table, b);
      }
      P::store_two_interleaved(panel, high[0], low[0], high[1], low[1]);
    }
    return;
  }
  if constexpr (P::kElements == 1) {
    for (int64_t n = 0; n < rows; ++n, panel += kPanelColumns) {
      decode_run(w, (n0 + n) * in_features + k0, columns, panel);
      if (column_scale != nullptr) scale_row(panel, column_scale[n], columns);
      fill_zero(panel + columns, kPanelColumns - columns);
    }
  }
}

void nf4_dequantize(const NF4Weight& w, int64_t count, MutableArray out, ThreadPool pool) {
  constexpr int64_t kChunk = 4096;
  parallel(pool, ceil_div(count, kChunk), [&](int64_t task) {
    const int64_t first = task * kChunk, n = lesser(kChunk, count - first);
    if (out.dtype == DType::kFloat32) {
      decode_run(w, first, n, static_cast<float*>(out.data) + first);
      return;
    }
    float* row = task_scratch(kChunk);
    decode_run(w, first, n, row);
    store_row(row, n, out, first);
  });
}

// codes[i] = the number of midpoints between levels that lie below value[i], which is scaled to [-1, 1]; NaN gives 15.
// Midpoint by midpoint, so that the loop over values is one that compilers turn into vectors.
void nearest_codes(const float (&midpoint)[15], const float* value, int64_t count, int32_t* codes) {
  for (int64_t i = 0; i < count; ++i) codes[i] = 0;
  for (const float m : midpoint) {
    for (int64_t i = 0; i < count; ++i) codes[i] += !(m >= value[i]);
  }
}

// Bit for bit what bitsandbytes stores: a full block multiplies by the rounded reciprocal of its absmax, a last partial
// block divides by it; absmax below 1e-38 counts as 1e-38 (and is stored so in the partial block).
void nf4_quantize(Array weight, int64_t count, int blocksize_log2, uint8_t* packed, float* absmax, ThreadPool pool) {
  float midpoint[15];
  for (int i = 0; i < 15; ++i) midpoint[i] = (kNF4Code[i] + kNF4Code[i + 1]) / 2;
  constexpr float kLeastAbsmax = 1e-38f;
  constexpr int64_t kLargestBlock = 4096;
  const int64_t blocksize = int64_t{1} << blocksize_log2;
  const int64_t blocks_a_task = kLargestBlock / blocksize;

  parallel(pool, ceil_div(count, kLargestBlock), [&](int64_t task) {
    float* value = task_scratch(2 * kLargestBlock);
    int32_t* code = reinterpret_cast<int32_t*>(value + kLargestBlock);
    for (int64_t block = task * blocks_a_task; block < lesser((task + 1) * blocks_a_task, ceil_div(count, blocksize));
         ++block) {
      const int64_t first = block * blocksize, n = lesser(blocksize, count - first);
      load_row(weight, first, n, value);
      float largest = 0.0f;
      bool nan = false;
      for (int64_t i = 0; i < n; ++i) {
        const float magnitude = value[i] < 0 ? -value[i] : value[i];
        largest = magnitude > largest ? magnitude : largest;
        nan |= value[i] != value[i];
      }
      if (nan) largest = __builtin_nanf("");
      const float divisor = largest < kLeastAbsmax ? kLeastAbsmax : largest;
      const bool partial = n < blocksize;
      absmax[block] = partial ? divisor : largest;
      const float reciprocal = 1.0f / divisor;
      for (int64_t i = 0; i < n; ++i) {
        const float scaled = partial ? value[i] / divisor : value[i] * reciprocal;
        value[i] = scaled > 1.0f ? 1.0f : (scaled < -1.0f ? -1.0f : scaled);
      }
      nearest_codes(midpoint, value, n, code);
      if (n & 1) code[n] = 7;  // the level 0
      for (int64_t i = 0; i < n; i += 2) packed[(first + i) >> 1] = static_cast<uint8_t>(code[i] << 4 | code[i + 1]);
    }
  });
}
