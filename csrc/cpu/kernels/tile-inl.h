// The micro-kernel of every product here: c += a * panel, with a row-major and the panel kPanelColumns wide.

// c[i][j] += sum_k a[i * lda + k] * panel[k * kPanelColumns + j], i < kRows. Sums run over k in order, from zero.
// a and panel hold P's units, `depth` of them.
template <int kRows, class P>
void multiply_tile(const typename P::Unit* a, int64_t lda, const typename P::Unit* panel, int64_t depth, float* c,
                   int64_t ldc) {
  Vec left[kRows], right[kRows];
  for (int i = 0; i < kRows; ++i) left[i] = right[i] = zero();
  for (int64_t k = 0; k < depth; ++k, panel += kPanelColumns) {
    const typename P::Units b0 = P::load_units(panel), b1 = P::load_units(panel + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const typename P::Units s = P::broadcast_unit(a[i * lda + k]);
      left[i] = P::multiply_add(s, b0, left[i]);
      right[i] = P::multiply_add(s, b1, right[i]);
    }
  }
  for (int i = 0; i < kRows; ++i, c += ldc) {
    store(c, add(load(c), left[i]));
    store(c + kLanes, add(load(c + kLanes), right[i]));
  }
}

template <int kRows, class P>
void multiply_rows(int64_t rows, const typename P::Unit* a, int64_t lda, const typename P::Unit* panel, int64_t depth,
                   float* c, int64_t ldc) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply_tile<kRows, P>(a, lda, panel, depth, c, ldc);
    multiply_rows<kRows - 1, P>(rows, a, lda, panel, depth, c, ldc);
  }
}

// Any number of rows, in tiles of nearly equal height: a last tile of a few rows would wait for its own FMAs.
template <class P = Fp32>
void multiply_panel(const typename P::Unit* a, int64_t lda, int64_t rows, const typename P::Unit* panel, int64_t depth,
                    float* c, int64_t ldc) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
    multiply_rows<kTileRows, P>(last - first, a + first * lda, lda, panel, depth, c + first * ldc, ldc);
  }
}

// The same over panels that lie one after the other: c has `width` columns, a multiple of kPanelColumns.
void multiply_panels(const float* a, int64_t lda, int64_t rows, const float* panels, int64_t depth, int64_t width,
                     float* c) {
  for (int64_t j = 0; j < width; j += kPanelColumns, panels += depth * kPanelColumns) {
    multiply_panel(a, lda, rows, panels, depth, c + j, width);
  }
}

// Panels from rows: panels[j / P][i][j % P] = row i's element j, zero past `width`. fill(i, row) provides row i.
template <class Fill>
void pack_rows(int64_t rows, int64_t width, float* panels, const Fill& fill) {
  float row[kBlockDepth];
  const int64_t padded = ceil_div(width, kPanelColumns) * kPanelColumns;
  for (int64_t i = 0; i < rows; ++i) {
    fill(i, row);
    fill_zero(row + width, padded - width);
    for (int64_t j = 0; j < padded; j += kLanes) {
      const int64_t panel = j / kPanelColumns;
      store(panels + (panel * rows + i) * kPanelColumns + j % kPanelColumns, load(row + j));
    }
  }
}
