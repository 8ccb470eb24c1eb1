// dora_norm: the length of every row of W + scaling * B A. The rows are formed a tile at a time, in registers, and
// summed as squares: the product B A costs what W A^T costs in the expanded ||W||^2 + 2 <W, B A> + ||B A||^2, and
// nothing cancels. docs/cpu.md has the comparison. Nothing of size N x K is held.

inline constexpr int64_t kNormRows = 2 * kTileRows;  // rows of a task; even, as rows are decoded in twos

// A number of 48 bits. The rounding of `scaling` to fp32 would be the same for all of a row's elements, and not
// average.
struct TwoFloats {
  float high, low;
  explicit TwoFloats(double value)
      : high(static_cast<float>(value)), low(static_cast<float>(value - static_cast<double>(high))) {}
};

// squares[i] += the squares of w[i] + scaling * b[i] A, i < kRows, over one panel of A [rank, kPanelColumns]; lanes run
// along the inputs.
template <int kRows>
void norm_tile(const float* w, int64_t ldw, const float* b, int64_t rank, const float* a, const TwoFloats& scaling,
               float* squares) {
  Vec left[kRows], right[kRows];
  for (int i = 0; i < kRows; ++i) left[i] = right[i] = zero();
  for (int64_t j = 0; j < rank; ++j, a += kPanelColumns) {
    const Vec a0 = load(a), a1 = load(a + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec s = broadcast(b[i * rank + j]);
      left[i] = fmadd(s, a0, left[i]);
      right[i] = fmadd(s, a1, right[i]);
    }
  }
  const Vec high = broadcast(scaling.high), low = broadcast(scaling.low);
  for (int i = 0; i < kRows; ++i, w += ldw, squares += kLanes) {
    Vec v0 = load(w), v1 = load(w + kLanes);
    v0 = fmadd(high, left[i], v0);
    v1 = fmadd(high, right[i], v1);
    if (scaling.low != 0.0f) {  // after the high part has taken most of w away: to w itself it would be lost
      v0 = fmadd(low, left[i], v0);
      v1 = fmadd(low, right[i], v1);
    }
    store(squares, fmadd(v1, v1, fmadd(v0, v0, load(squares))));
  }
}

template <int kRows>
void norm_rows(int64_t rows, const float* w, int64_t ldw, const float* b, int64_t rank, const float* a,
               const TwoFloats& scaling, float* squares) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return norm_tile<kRows>(w, ldw, b, rank, a, scaling, squares);
    norm_rows<kRows - 1>(rows, w, ldw, b, rank, a, scaling, squares);
  }
}

// A task's rows n0 .. n0 + rows of W, `kPanelColumns` inputs at a time, as the tile reads them.
struct NormRows {
  const DoraNorm& p;
  int64_t n0, rows;
  float* panel;   // [kNormRows, kPanelColumns]
  float* scales;  // [rows, blocks] of NF4, for the inputs from k0 on
  int64_t first_block = 0, blocks = 0;

  // To be called for every kBlockDepth inputs.
  void begin(int64_t k0, int64_t depth) {
    if (p.dense || !rows_are_whole_blocks(p.nf4, p.in_features)) return;
    const int log2 = p.nf4.blocksize_log2;
    first_block = k0 >> log2;
    blocks = ((k0 + depth - 1) >> log2) + 1 - first_block;
    for (int64_t i = 0; i < rows; ++i) {
      load_scales(p.nf4, ((n0 + i) * p.in_features >> log2) + first_block, blocks, scales + i * blocks);
    }
  }

  // W[n0 .. n0 + rows][k .. k + columns), zero from `columns` on; `ld` apart.
  const float* read(int64_t k, int64_t columns, int64_t& ld) const {
    ld = kPanelColumns;
    if (!p.dense) {
      decode_panel_by_input<Fp32>(p.nf4, p.in_features, n0, rows, k, columns,
                                  scales + ((k >> p.nf4.blocksize_log2) - first_block), blocks, nullptr, panel);
      return panel;
    }
    // Reading `rows` rows side by side defeats the processor's own prefetching; so as much of the next task's rows is
    // fetched meanwhile, in the order of memory.
    const int64_t size = p.dense.dtype == DType::kFloat32 ? 4 : 2;
    const char* w = static_cast<const char*>(p.dense.data) + n0 * p.in_features * size;
    const char* next = w + rows * (p.in_features + k) * size;
    for (int64_t i = 0; i < rows * kPanelColumns * size; i += kCacheLine) prefetch(next + i);
    if (p.dense.dtype != DType::kFloat32 || columns < kPanelColumns) {
      load_block(p.dense, p.in_features, n0, rows, k, columns, kPanelColumns, panel);
      return panel;
    }
    ld = p.in_features;
    return reinterpret_cast<const float*>(w) + k;
  }
};

// Row n in double.
double norm_in_double(const DoraNorm& p, int64_t n, const float* a, const float* b) {
  double sum = 0.0;
  for (int64_t k0 = 0; k0 < p.in_features; k0 += kPanelColumns) {
    const int64_t count = lesser(kPanelColumns, p.in_features - k0), first = n * p.in_features + k0;
    float w[kPanelColumns];
    double update[kPanelColumns] = {};
    if (p.dense) {
      load_row(p.dense, first, count, w);
    } else {
      decode_run(p.nf4, first, count, w);
    }
    for (int64_t j = 0; j < p.rank; ++j, a += kPanelColumns) {
      for (int64_t i = 0; i < kPanelColumns; ++i) update[i] += static_cast<double>(b[j]) * a[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      const double v = w[i] + p.scaling * update[i];
      sum += v * v;
    }
  }
  return std::sqrt(sum);
}

// Whether a row's length `norm`, made in fp32, is good to 1e-6. An element of the low-rank part is a sum of `rank`
// products, off by at most (rank + 2) roundings of the sum of their magnitudes, which is at most `reach` = |scaling|
// sum_j |b_j| max|A_j|; and with near certainty by 3 sqrt(rank + 1), roundings being random (Higham and Mary, SIAM J.
// Sci. Comput. 41, 2019, theorem 2.4). For the same reason the errors of a row's elements do not add up to more than
// the largest of them in its length, but for the half of their squares' sum. This matters where the row is far shorter
// than its parts. The sum of squares, in order in blocks of kBlockDepth, adds less than 6e-7. Not so where squares
// leave the range of fp32, or are not finite.
inline bool norm_is_accurate(double norm, double reach, int64_t rank, int64_t in_features) {
  constexpr double kNormError = 4e-7, kRounding = 0x1p-24, kLeast = 1e-12, kMost = 1e19;
  if (!(norm > kLeast && norm < kMost)) return false;
  const double terms = static_cast<double>(rank + 1), roundings = std::fmin(terms + 1.0, 3.0 * std::sqrt(terms));
  const double element = roundings * kRounding * reach / norm;
  return element + 0.5 * element * element * static_cast<double>(in_features) <= kNormError;
}

void dora_norm(const DoraNorm& p, ThreadPool pool) {
  constexpr int64_t kMostBlocks = kBlockDepth / 32 + 1;  // of one row in kBlockDepth inputs; 32 is the least blocksize
  const int64_t in_features = p.in_features, rank = p.rank, chunks = ceil_div(in_features, kBlockDepth);
  Slice caller{caller_scratch(
      static_cast<size_t>(slice_size(chunks * kBlockDepth * rank) + slice_size(chunks * rank) + slice_size(rank)))};
  float* a = caller.take(chunks * kBlockDepth * rank);  // [K / P, rank, P]
  float* chunk_most = caller.take(chunks * rank);       // max|A_j| by chunks
  float* a_most = caller.take(rank);                    // max|A_j|
  parallel(pool, chunks, [&](int64_t chunk) {
    const int64_t k0 = chunk * kBlockDepth, count = lesser(kBlockDepth, in_features - k0);
    pack_rows(rank, count, a + k0 * rank, [&](int64_t j, float* row) {
      load_row(p.a, j * in_features + k0, count, row);
      float most = 0.0f;
      for (int64_t i = 0; i < count; ++i) most = std::fmax(most, std::fabs(row[i]));
      chunk_most[chunk * rank + j] = most;
    });
  });
  for (int64_t j = 0; j < rank; ++j) {
    a_most[j] = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) a_most[j] = std::fmax(a_most[j], chunk_most[chunk * rank + j]);
  }

  const TwoFloats scaling(p.scaling);
  parallel(pool, ceil_div(p.out_features, kNormRows), [&](int64_t task) {
    const int64_t n0 = task * kNormRows, rows = lesser(kNormRows, p.out_features - n0);
    Slice scratch{task_scratch(static_cast<size_t>(slice_size(rows * rank) + slice_size(kNormRows * kPanelColumns) +
                                                   slice_size(rows * kMostBlocks) + slice_size(rows * kLanes)))};
    float* b = scratch.take(rows * rank);
    float* panel = scratch.take(kNormRows * kPanelColumns);
    float* scales = scratch.take(rows * kMostBlocks);
    float* squares = scratch.take(rows * kLanes);  // [rows, lanes]
    double sums[kNormRows] = {};
    load_row(p.b, n0 * rank, rows * rank, b);
    NormRows weight{p, n0, rows, panel, scales};
    for (int64_t k0 = 0; k0 < in_features; k0 += kBlockDepth) {
      const int64_t end = lesser(k0 + kBlockDepth, in_features);
      weight.begin(k0, end - k0);
      fill_zero(squares, rows * kLanes);
      for (int64_t k = k0; k < end; k += kPanelColumns) {
        int64_t ld = 0;
        const float* w = weight.read(k, lesser(kPanelColumns, end - k), ld);
        for (int64_t i = 0; i < rows; i += kTileRows) {
          norm_rows<kTileRows>(lesser(kTileRows, rows - i), w + i * ld, ld, b + i * rank, rank, a + k * rank, scaling,
                               squares + i * kLanes);
        }
      }
      for (int64_t i = 0; i < rows; ++i) sums[i] += reduce_add(load(squares + i * kLanes));
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = b + i * rank;
      double reach = 0.0;
      for (int64_t j = 0; j < rank; ++j) reach += std::fabs(static_cast<double>(row[j]) * a_most[j]);
      const double norm = std::sqrt(sums[i]);
      const bool accurate = norm_is_accurate(norm, std::fabs(p.scaling) * reach, rank, in_features);
      p.norm[n0 + i] = static_cast<float>(accurate ? norm : norm_in_double(p, n0 + i, a, row));
    }
  });
}
