// Scales and sums of an array's columns, in one pass. A task has some of the rows, a slice, and of the columns a strip
// whose sums stay in cache. How many there are depends on the shape only, and so does the order of every sum: the rows
// of a slice one after the other, then the slices.

inline constexpr int64_t kStripColumns = 4096, kLeastSliceRows = 64, kMostSlices = 16;

// A row's part in a strip: elements at .. at + count of v, of z and of the result. Those columns' `scale` is null where
// there is no result, their sums and dots where they are not asked for; all three are whole vectors long.
template <class D>
void scale_row_part(const ScaleColumns& p, int64_t at, int64_t count, const float* scale, float* sums, float* dots) {
  using Element = typename D::Element;
  const Element* v = static_cast<const Element*>(p.v.data) + at;
  const Element* z = dots == nullptr ? nullptr : static_cast<const Element*>(p.z.data) + at;
  Element* scaled = scale == nullptr ? nullptr : static_cast<Element*>(p.scaled.data) + at;
  const auto step = [&](int64_t i, const Element* v_part, const Element* z_part, Element* scaled_part) {
    const Vec value = D::load_vec(v_part);
    if (sums != nullptr) store(sums + i, add(load(sums + i), value));
    if (z_part != nullptr) store(dots + i, fmadd(value, D::load_vec(z_part), load(dots + i)));
    if (scaled_part != nullptr) D::store_vec(scaled_part, mul(value, load(scale + i)));
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    step(i, v + i, z == nullptr ? nullptr : z + i, scaled == nullptr ? nullptr : scaled + i);
  }
  if (const size_t rest = static_cast<size_t>(count - i) * sizeof(Element); rest != 0) {
    Element v_part[kLanes] = {}, z_part[kLanes] = {}, scaled_part[kLanes];
    std::memcpy(v_part, v + i, rest);
    if (z != nullptr) std::memcpy(z_part, z + i, rest);
    step(i, v_part, z == nullptr ? nullptr : z_part, scaled == nullptr ? nullptr : scaled_part);
    if (scaled != nullptr) std::memcpy(scaled + i, scaled_part, rest);
  }
}

void scale_columns(const ScaleColumns& p, ThreadPool pool) {
  const int64_t slices = greater(1, lesser(kMostSlices, p.rows / kLeastSliceRows));
  const int64_t strips = ceil_div(p.columns, kStripColumns);
  const int64_t sums_size = p.sums ? slices * p.columns : 0, dots_size = p.dots ? slices * p.columns : 0;
  Slice caller{caller_scratch(static_cast<size_t>(slice_size(sums_size) + slice_size(dots_size)))};
  float* slice_sums = caller.take(sums_size);  // [slices, N]
  float* slice_dots = caller.take(dots_size);  // [slices, N]
  parallel(pool, slices * strips, [&](int64_t task) {
    const int64_t slice = task / strips, n0 = task % strips * kStripColumns;
    const int64_t columns = lesser(kStripColumns, p.columns - n0), at = slice * p.columns + n0;
    Slice scratch{task_scratch(3 * kStripColumns)};  // room for whole vectors
    float* scale = p.scaled ? scratch.take(kStripColumns) : nullptr;
    float* sums = p.sums ? scratch.take(kStripColumns) : nullptr;
    float* dots = p.dots ? scratch.take(kStripColumns) : nullptr;
    if (scale != nullptr) load_row(p.scale, n0, columns, scale);
    if (sums != nullptr) fill_zero(sums, kStripColumns);
    if (dots != nullptr) fill_zero(dots, kStripColumns);
    with_elements(p.v.dtype, [&](auto d) {
      for (int64_t m = p.rows * slice / slices; m < p.rows * (slice + 1) / slices; ++m) {
        scale_row_part<decltype(d)>(p, m * p.columns + n0, columns, scale, sums, dots);
      }
    });
    if (sums != nullptr) std::memcpy(slice_sums + at, sums, static_cast<size_t>(columns) * sizeof(float));
    if (dots != nullptr) std::memcpy(slice_dots + at, dots, static_cast<size_t>(columns) * sizeof(float));
  });
  const auto finish = [&](float* of_slices, MutableArray out) {
    if (!out) return;
    for (int64_t slice = 1; slice < slices; ++slice) {
      for (int64_t n = 0; n < p.columns; ++n) of_slices[n] += of_slices[slice * p.columns + n];
    }
    store_row(of_slices, p.columns, out, 0);
  };
  finish(slice_sums, p.sums);
  finish(slice_dots, p.dots);
}
