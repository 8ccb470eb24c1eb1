// Rows of any dtype in and out of fp32, and the helpers that every kernel shares.
// A "-inl.h" file is compiled once per instruction set, inside that set's namespace, after its simd/ header.

inline constexpr int64_t kCacheLine = 64;  // bytes

inline int64_t slice_size(int64_t floats) { return (floats + 15) / 16 * 16; }  // keeps 64-byte alignment
struct Slice {  // what a task gets of its scratch: consecutive arrays cut off one allocation
  float* next;
  float* take(int64_t floats) {
    float* p = next;
    next += slice_size(floats);
    return p;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Runs body(task) for every task, on the caller's pool. Which thread runs a task never changes what it computes.
template <class Body>
void parallel(ThreadPool pool, int64_t tasks, const Body& body) {
  auto run = [](void* context, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) (*static_cast<const Body*>(context))(task);
  };
  pool.parallel_for(tasks, const_cast<Body*>(&body), run);
}

// The elements of each dtype: kLanes of them as a Vec, or one as a float.
struct Float32 {
  using Element = float;
  static Vec load_vec(const Element* p) { return load(p); }
  static void store_vec(Element* p, Vec v) { store(p, v); }
  static float to_float(Element e) { return e; }
  static Element from_float(float f) { return f; }
};
struct BFloat16 {
  using Element = uint16_t;
  static Vec load_vec(const Element* p) { return load_bf16(p); }
  static void store_vec(Element* p, Vec v) { store_bf16(p, v); }
  static float to_float(Element e) { return bf16_to_float(e); }
  static Element from_float(float f) { return float_to_bf16(f); }
};
struct Float16 {
  using Element = uint16_t;
  static Vec load_vec(const Element* p) { return load_half(p); }
  static void store_vec(Element* p, Vec v) { store_half(p, v); }
  static float to_float(Element e) { return half_to_float(e); }
  static Element from_float(float f) { return float_to_half(f); }
};

// body(D{}) with the struct D of `dtype`.
template <class Body>
void with_elements(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Float32{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

// dst[i] = src[offset + i] in fp32.
void load_row(Array src, int64_t offset, int64_t count, float* dst) {
  with_elements(src.dtype, [&](auto d) {
    using D = decltype(d);
    const auto* p = static_cast<const typename D::Element*>(src.data) + offset;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(dst + i, D::load_vec(p + i));
    for (; i < count; ++i) dst[i] = D::to_float(p[i]);
  });
}

// dst[offset + i] = src[i], rounded once to dst's dtype.
void store_row(const float* src, int64_t count, MutableArray dst, int64_t offset) {
  with_elements(dst.dtype, [&](auto d) {
    using D = decltype(d);
    auto* p = static_cast<typename D::Element*>(dst.data) + offset;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) D::store_vec(p + i, load(src + i));
    for (; i < count; ++i) p[i] = D::from_float(src[i]);
  });
}

// src[at .. at + kLanes) in fp32, and back, rounded once.
inline Vec load_vector(Array src, int64_t at) {
  Vec v = zero();
  with_elements(src.dtype, [&](auto d) {
    using D = decltype(d);
    v = D::load_vec(static_cast<const typename D::Element*>(src.data) + at);
  });
  return v;
}
inline void store_vector(Vec v, MutableArray dst, int64_t at) {
  with_elements(dst.dtype, [&](auto d) {
    using D = decltype(d);
    D::store_vec(static_cast<typename D::Element*>(dst.data) + at, v);
  });
}

// Pairs of bf16 as they are: dst[i] = src[offset + 2 i] | src[offset + 2 i + 1] << 16, a last odd one with 0.
inline void copy_bf16_row(Array src, int64_t offset, int64_t count, uint32_t* dst) {
  if (count & 1) dst[count / 2] = 0;
  std::memcpy(dst, static_cast<const uint16_t*>(src.data) + offset, static_cast<size_t>(count) * sizeof(uint16_t));
}

// A pointer to src[offset .. offset + count) in fp32: into src itself where it is fp32, else converted into `buffer`.
const float* as_float(Array src, int64_t offset, int64_t count, float* buffer) {
  if (src.dtype == DType::kFloat32) return static_cast<const float*>(src.data) + offset;
  load_row(src, offset, count, buffer);
  return buffer;
}

// Fetches src[at .. at + count) into the second-level cache: what lies a row apart is nothing that the processor would
// fetch by itself.
inline void prefetch_row(Array src, int64_t at, int64_t count) {
  const int64_t size = src.dtype == DType::kFloat32 ? 4 : 2;
  const char* bytes = static_cast<const char*>(src.data) + at * size;
  for (int64_t i = 0; i < count * size; i += kCacheLine) prefetch_far(bytes + i);
}

void fill_zero(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0.0f;
}
// dst[i][j] = src[first_row + i][first_column + j] for j < columns, 0 from there to `width`; src has `row_size`
// columns.
void load_block(Array src, int64_t row_size, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
                int64_t width, float* dst) {
  for (int64_t i = 0; i < rows; ++i, dst += width) {
    load_row(src, (first_row + i) * row_size + first_column, columns, dst);
    fill_zero(dst + columns, width - columns);
  }
}
void scale_row(float* row, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row[i] *= factor;
}
void multiply_row(float* row, const float* factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row[i] *= factor[i];
}

// row[i] = keep(first + i) ? row[i] * scale : 0, where `first` is the flat index of row[0].
void apply_dropout(float* row, int64_t count, int64_t first, const Dropout& dropout) {
  const Vec scale = broadcast(dropout.scale);
  for (int64_t i = 0; i < count;) {
    const uint64_t element = static_cast<uint64_t>(first + i);
    const int skip = static_cast<int>(element % 4);  // bits before `element` in its counter's group of four
    uint64_t keep = philox_keep(element / 4, dropout.seed, dropout.threshold) >> skip;
    const int64_t end = lesser(i + 64 - skip, count);
    for (; i + kLanes <= end; i += kLanes, keep >>= kLanes) {
      store(row + i, keep_scaled(keep, load(row + i), scale));
    }
    for (; i < end; ++i, keep >>= 1) row[i] = keep & 1 ? row[i] * dropout.scale : 0.0f;
  }
}

void philox_dropout(Array x, int64_t count, const Dropout& dropout, MutableArray out, ThreadPool pool) {
  constexpr int64_t kChunk = 4096;
  parallel(pool, ceil_div(count, kChunk), [&](int64_t task) {
    const int64_t first = task * kChunk, n = lesser(kChunk, count - first);
    float* row = task_scratch(kChunk);
    load_row(x, first, n, row);
    apply_dropout(row, n, first, dropout);
    store_row(row, n, out, first);
  });
}
