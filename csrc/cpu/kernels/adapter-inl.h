// The bottleneck adapter, forward, and what backward shares with it; formulas in api.h. A task owns a tile of tokens:
// both products, the activation, scale, dropout, gate and residual happen while the tile is in cache, and the
// intermediate [tile, rank] never leaves it. Each sum runs over its features in order, so neither the height of a tile
// nor the number of threads changes a bit. Products are those of P: where the set has bf16 arithmetic and hidden is in
// bf16, every operand of a product is rounded to bf16 (hidden and a bf16 weight are so already).

inline constexpr int64_t kAdapterTokens = 256;      // of a tile, at most
inline constexpr int64_t kAdapterElements = 65536;  // of an intermediate [tile, rank], at most, for a large rank
inline constexpr int64_t kFewAdapterTokens = 4;     // of a call, up to which weights are read as they lie
inline constexpr int64_t kAdapterColumns = 128;     // features that a tile computes at a time; at most kBlockDepth

// Tokens first .. first + count of one tile; `tiles` of nearly equal height, a whole number for each thread.
struct AdapterTiles {
  int64_t tokens, tiles, height;

  AdapterTiles(int64_t tokens_, int64_t rank, ThreadPool pool) : tokens(tokens_) {
    const int64_t most = greater(kTileRows, lesser(kAdapterTokens, kAdapterElements / rank));
    const int64_t rounds = ceil_div(tokens, most * pool.threads);
    tiles = greater(1, lesser(rounds * pool.threads, ceil_div(tokens, kTileRows)));
    height = ceil_div(tokens, tiles);
  }
  int64_t first(int64_t tile) const { return tokens * tile / tiles; }
  int64_t count(int64_t tile) const { return first(tile + 1) - first(tile); }
};

inline int64_t whole_panels(int64_t columns) { return ceil_div(columns, kPanelColumns) * kPanelColumns; }

// src[offset .. offset + count) as units of P, count at most kBlockElements<P>; an odd last element is followed by 0.
template <class P>
void as_units(Array src, int64_t offset, int64_t count, typename P::Unit* dst) {
  if constexpr (P::kElements == 1) {
    load_row(src, offset, count, dst);
  } else if (src.dtype == DType::kBFloat16) {
    copy_bf16_row(src, offset, count, dst);
  } else {
    float row[kBlockElements<P>];
    uint16_t rounded[kBlockElements<P>];
    load_row(src, offset, count, row);
    store_row(row, count, {rounded, DType::kBFloat16}, 0);
    copy_bf16_row({rounded, DType::kBFloat16}, 0, count, dst);
  }
}

// The left operand of a product: `src` itself, or its rows of `count`, `width` apart, as units in `buffer`.
template <class P>
const typename P::Unit* as_operand(const float* src, int64_t rows, int64_t width, int64_t count, float* buffer) {
  if constexpr (P::kElements == 1) {
    return src;
  } else {
    typename P::Unit* units = reinterpret_cast<typename P::Unit*>(buffer);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < count; k += kBlockElements<P>) {
        as_units<P>({src + i * width, DType::kFloat32}, k, lesser(kBlockElements<P>, count - k),
                    units + i * width + k / P::kElements);
      }
    }
    return units;
  }
}
// The size of that buffer.
template <class P>
int64_t operand_size(int64_t floats) {
  return P::kElements == 1 ? 0 : floats;
}

// A panel of src^T: panel[j][i] = src[first_row + i][column + j] for i < rows, zero from there on; j < depth, which is
// at most kBlockElements<P>. src has `row_size` columns.
template <class P>
void pack_transposed(Array src, int64_t row_size, int64_t first_row, int64_t rows, int64_t column, int64_t depth,
                     typename P::Unit* panel) {
  using Unit = typename P::Unit;
  Unit buffer[kLanes * kBlockDepth];
  const int64_t units = ceil_div(depth, P::kElements);
  for (int64_t half = 0; half < kPanelColumns; half += kLanes) {
    const uint8_t* row[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      Unit* spare = buffer + i * kBlockDepth;
      const int64_t at = (first_row + half + i) * row_size + column;
      row[i] = reinterpret_cast<const uint8_t*>(spare);
      if (half + i >= rows) {
        std::memset(spare, 0, static_cast<size_t>(units) * sizeof(Unit));
      } else if (P::kElements == 1 && src.dtype == DType::kFloat32) {
        row[i] = reinterpret_cast<const uint8_t*>(static_cast<const float*>(src.data) + at);
      } else {
        as_units<P>(src, at, depth, spare);
      }
    }
    for (int64_t j = 0; j < units; j += kLanes) {
      const int64_t words = lesser(kLanes, units - j);
      const Words w = load_transposed(row, j * static_cast<int64_t>(sizeof(Unit)), words);
      for (int64_t c = 0; c < words; ++c) {
        store(reinterpret_cast<float*>(panel) + (j + c) * kPanelColumns + half, as_floats(w.column[c]));
      }
    }
  }
}

// dst[j][i] = src[i][j] for rows i and columns j that lie lds, and ldd, apart.
void transpose(const float* src, int64_t lds, int64_t rows, int64_t columns, float* dst, int64_t ldd) {
  int64_t i = 0;
  for (; i + kLanes <= rows; i += kLanes) {
    const uint8_t* row[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) row[lane] = reinterpret_cast<const uint8_t*>(src + (i + lane) * lds);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t words = lesser(kLanes, columns - j);
      const Words w = load_transposed(row, j * static_cast<int64_t>(sizeof(float)), words);
      for (int64_t c = 0; c < words; ++c) store(dst + (j + c) * ldd + i, as_floats(w.column[c]));
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) dst[j * ldd + i] = src[i * lds + j];
  }
}

// Each row [width] becomes `values`, or zero where absent, and zero past `count`.
void fill_rows(Array values, int64_t first, int64_t count, int64_t rows, int64_t width, float* dst) {
  if (rows == 0) return;
  fill_zero(dst, width);
  if (values) load_row(values, first, count, dst);
  for (int64_t i = 1; i < rows; ++i) std::memcpy(dst + i * width, dst, static_cast<size_t>(width) * sizeof(float));
}

// dst[t] = src[m0 + t][k0 .. k0 + count), rows kBlockDepth units apart; the block after it is fetched on the way.
template <class P>
void load_adapter_block(Array src, int64_t row_size, int64_t m0, int64_t tokens, int64_t k0, int64_t count,
                        typename P::Unit* dst) {
  const int64_t next = lesser(kBlockElements<P>, row_size - k0 - count);
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = (m0 + t) * row_size + k0;
    as_units<P>(src, at, count, dst + t * kBlockDepth);
    prefetch_row(src, at + count, next);
  }
}

// sums[j] += x . weight[first + j] for j < rows, rows of `size` elements, of any dtype. For few tokens: packing a
// weight into panels would take longer than this.
void adapter_dots(Array x, int64_t at, Array weight, int64_t first, int64_t rows, int64_t size, float* sums) {
  constexpr int64_t kChunk = 1024;
  float x_buffer[kChunk], buffer[4 * kChunk];
  for (int64_t k0 = 0; k0 < size; k0 += kChunk) {
    const int64_t count = lesser(kChunk, size - k0);
    const float* values = as_float(x, at + k0, count, x_buffer);
    const auto row = [&](int64_t j, int64_t i) {
      return as_float(weight, (first + j) * size + k0, count, buffer + i * kChunk);
    };
    int64_t j = 0;
    for (; j + 4 <= rows; j += 4) {
      const float* four[4] = {row(j, 0), row(j + 1, 1), row(j + 2, 2), row(j + 3, 3)};
      multiply_dots<1, 4>(values, count, four, count, sums + j, rows);
    }
    for (; j < rows; ++j) {
      const float* one[4] = {row(j, 0)};
      multiply_dots<1, 1>(values, count, one, count, sums + j, rows);
    }
  }
}

// z[tokens, width] = hidden W_d^T + b_d for tokens from m0 on. Scratch: a [tokens, kBlockDepth] and
// panel [kBlockDepth, P].
template <class P>
void adapter_down(const AdapterOperands& p, int64_t m0, int64_t tokens, int64_t width, float* a, float* panel,
                  float* z) {
  using Unit = typename P::Unit;
  Unit *units = reinterpret_cast<Unit*>(a), *panel_units = reinterpret_cast<Unit*>(panel);
  fill_rows(p.down_bias, 0, p.rank, tokens, width, z);
  if (p.tokens <= kFewAdapterTokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      adapter_dots(p.hidden, (m0 + t) * p.in_features, p.down_weight, 0, p.rank, p.in_features, z + t * width);
    }
    return;
  }
  for (int64_t k0 = 0; k0 < p.in_features; k0 += kBlockElements<P>) {
    const int64_t depth = lesser(kBlockElements<P>, p.in_features - k0);
    load_adapter_block<P>(p.hidden, p.in_features, m0, tokens, k0, depth, units);
    for (int64_t j = 0; j < p.rank; j += kPanelColumns) {
      pack_transposed<P>(p.down_weight, p.in_features, j, lesser(kPanelColumns, p.rank - j), k0, depth, panel_units);
      multiply_panel<P>(units, kBlockDepth, tokens, panel_units, ceil_div(depth, P::kElements), z + j, width);
    }
  }
}

// sums[tokens, block] += f W_u^T for output features n0 .. n0 + columns, f [tokens, width], which `units` has in P's.
template <class P>
void adapter_up(const BottleneckAdapter& p, int64_t n0, int64_t columns, int64_t tokens, const float* f,
                const typename P::Unit* units, int64_t width, float* panel, float* sums, int64_t block) {
  typename P::Unit* panel_units = reinterpret_cast<typename P::Unit*>(panel);
  if (p.tokens <= kFewAdapterTokens) {
    for (int64_t t = 0; t < tokens; ++t) {
      adapter_dots({f + t * width, DType::kFloat32}, 0, p.up_weight, n0, columns, p.rank, sums + t * block);
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += kPanelColumns) {
    for (int64_t r0 = 0; r0 < p.rank; r0 += kBlockElements<P>) {
      const int64_t depth = lesser(kBlockElements<P>, p.rank - r0);
      pack_transposed<P>(p.up_weight, p.rank, n0 + j, lesser(kPanelColumns, columns - j), r0, depth, panel_units);
      multiply_panel<P>(units + r0 / P::kElements, width, tokens, panel_units, ceil_div(depth, P::kElements), sums + j,
                        block);
    }
  }
}

// The factor of output features n0 .. n0 + count, the constant included.
void load_adapter_scale(const AdapterOperands& p, int64_t n0, int64_t count, float* dst) {
  for (int64_t i = 0; i < count; ++i) dst[i] = p.scaling;
  if (!p.scale) return;
  if (p.scale_per_channel) return load_row(p.scale, n0, count, dst);
  load_row(p.scale, 0, 1, dst);
  for (int64_t i = 1; i < count; ++i) dst[i] = dst[0];
}
float load_gate(const AdapterOperands& p, int64_t m) {
  float gate = 1.0f;
  if (p.gate) load_row(p.gate, m, 1, &gate);
  return gate;
}

// Takes up[m, n0 .. n0 + count) before its scale, in `row`, to the outputs.
void finish_adapter_row(const BottleneckAdapter& p, int64_t m, int64_t n0, int64_t count, const float* scale,
                        float* row) {
  const int64_t at = m * p.out_features + n0;
  multiply_row(row, scale, count);
  if (p.up) store_row(row, count, p.up, at);
  if (p.dropout.threshold != 0) apply_dropout(row, count, at, p.dropout);
  if (p.gate) scale_row(row, load_gate(p, m), count);
  if (p.residual) {
    float buffer[kAdapterColumns];
    const float* residual = as_float(p.residual, at, count, buffer);
    for (int64_t i = 0; i < count; ++i) row[i] += residual[i];
  }
  store_row(row, count, p.out, at);
}
// The same in one go, for whole vectors with neither dropout nor gate.
void finish_plain_adapter_row(const BottleneckAdapter& p, int64_t m, int64_t n0, int64_t count, const float* scale,
                              const float* row) {
  const int64_t first = m * p.out_features + n0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec up = mul(load(row + i), load(scale + i));
    if (p.up) store_vector(up, p.up, first + i);
    store_vector(p.residual ? add(up, load_vector(p.residual, first + i)) : up, p.out, first + i);
  }
}

template <class P>
void bottleneck_adapter_by(const BottleneckAdapter& p, ThreadPool pool) {
  const AdapterTiles tiles(p.tokens, p.rank, pool);
  const int64_t width = whole_panels(p.rank);
  const bool plain = p.dropout.threshold == 0 && !p.gate;
  parallel(pool, tiles.tiles, [&](int64_t tile) {
    const int64_t m0 = tiles.first(tile), tokens = tiles.count(tile);
    Slice scratch{task_scratch(
        static_cast<size_t>(slice_size(tiles.height * kBlockDepth) + slice_size(kBlockDepth * kPanelColumns) +
                            slice_size(tiles.height * width) + slice_size(operand_size<P>(tiles.height * width))))};
    float* a = scratch.take(tiles.height * kBlockDepth);       // hidden, then the results
    float* panel = scratch.take(kBlockDepth * kPanelColumns);  // of either weight, transposed
    float* z = scratch.take(tiles.height * width);             // [tokens, width]
    adapter_down<P>(p, m0, tokens, width, a, panel, z);
    activate(p.activation, z, nullptr, tokens * width);
    const auto* f = as_operand<P>(z, tokens, width, p.rank, scratch.take(operand_size<P>(tiles.height * width)));
    for (int64_t t = 0; t < tokens && p.down; ++t) store_row(z + t * width, p.rank, p.down, (m0 + t) * p.rank);
    float scale[kAdapterColumns];
    for (int64_t n0 = 0; n0 < p.out_features; n0 += kAdapterColumns) {
      const int64_t columns = lesser(kAdapterColumns, p.out_features - n0), block = whole_panels(columns);
      fill_rows(p.up_bias, n0, columns, tokens, block, a);
      adapter_up<P>(p, n0, columns, tokens, z, f, width, panel, a, block);
      load_adapter_scale(p, n0, columns, scale);
      for (int64_t t = 0; t < tokens; ++t) {
        float* row = a + t * block;
        plain&& columns % kLanes == 0 ? finish_plain_adapter_row(p, m0 + t, n0, columns, scale, row)
                                      : finish_adapter_row(p, m0 + t, n0, columns, scale, row);
      }
    }
  });
}

// run<P>() with the products that are the set's best for hidden.
template <class Run>
void with_adapter_products(const AdapterOperands& p, const Run& run) {
  if constexpr (!std::is_void_v<Bf16Pairs>) {
    if (p.hidden.dtype == DType::kBFloat16) return run.template operator()<Bf16Pairs>();
  }
  run.template operator()<Fp32>();
}

void bottleneck_adapter(const BottleneckAdapter& p, ThreadPool pool) {
  if (p.tokens == 0) return;
  with_adapter_products(p, [&]<class P>() { bottleneck_adapter_by<P>(p, pool); });
}
