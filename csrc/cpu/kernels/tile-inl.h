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
template <class P = Fp32>
void multiply_panels(const typename P::Unit* a, int64_t lda, int64_t rows, const typename P::Unit* panels,
                     int64_t depth, int64_t width, float* c) {
  for (int64_t j = 0; j < width; j += kPanelColumns, panels += depth * kPanelColumns) {
    multiply_panel<P>(a, lda, rows, panels, depth, c + j, width);
  }
}

// Panels from rows, `width` of each at most kBlockDepth: fill(i, row) provides row i in fp32. With one element a unit,
// panels[j / P][i][j % P] = row i's element j; with two, unit [i / 2] has rows i and i + 1. Zero past `width`, and for
// the row after an odd last one.
template <class P = Fp32, class Fill>
void pack_rows(int64_t rows, int64_t width, typename P::Unit* panels, const Fill& fill) {
  float row[P::kElements][kBlockDepth];
  const int64_t padded = ceil_div(width, kPanelColumns) * kPanelColumns, depth = ceil_div(rows, P::kElements);
  for (int64_t i = 0; i < rows; i += P::kElements) {
    for (int64_t e = 0; e < P::kElements; ++e) {
      const int64_t count = i + e < rows ? width : 0;
      if (count != 0) fill(i + e, row[e]);
      fill_zero(row[e] + count, padded - count);
    }
    for (int64_t j = 0; j < padded; j += kLanes) {
      typename P::Unit* to =
          panels + (j / kPanelColumns * depth + i / P::kElements) * kPanelColumns + j % kPanelColumns;
      if constexpr (P::kElements == 1) {
        store(to, load(row[0] + j));
      } else {
        P::store_two(to, load(row[0] + j), load(row[1] + j));
      }
    }
  }
}
