// The bottleneck adapter, backward; formulas in api.h. Two passes:
//   tiles of tokens: the pre-activation again, then dz and dhidden, dgate     (sums over features)
//   features:        dW_u, db_u, dscale by output, dW_d by input, db_d        (sums over tokens)
// Between them stand f(z) and dz, [tokens, rank] each, transposed in blocks of kBlockDepth tokens. As in the forward,
// no sum's order depends on the number of threads.

inline constexpr int64_t kRowsAhead = 16;  // that are fetched where a pass goes down a block of columns

// The gradient of the gated up[m, n0 .. n0 + count), without the gate: dropout' grad.
void load_adapter_grad(const BottleneckAdapterBackward& p, int64_t m, int64_t n0, int64_t count, float* dst) {
  const int64_t at = m * p.out_features + n0;
  load_row(p.grad, at, count, dst);
  if (p.dropout.threshold != 0) apply_dropout(dst, count, at, p.dropout);
}

// q[tokens, width] = (scale * dropout' grad) W_u, and bias_part[t] = the same times b_u, where that is not null.
template <class P>
void adapter_up_backward(const BottleneckAdapterBackward& p, int64_t m0, int64_t tokens, int64_t width, float* a,
                         float* panels, float* q, float* bias_part) {
  using Unit = typename P::Unit;
  Unit *units = reinterpret_cast<Unit*>(a), *panel_units = reinterpret_cast<Unit*>(panels);
  float scale[kBlockElements<P>], bias[kBlockElements<P>], row[kBlockElements<P>];
  fill_zero(q, tokens * width);
  if (bias_part != nullptr) fill_zero(bias_part, tokens);
  for (int64_t n0 = 0; n0 < p.out_features; n0 += kBlockElements<P>) {
    const int64_t depth = lesser(kBlockElements<P>, p.out_features - n0);
    load_adapter_scale(p, n0, depth, scale);
    if (bias_part != nullptr) load_row(p.up_bias, n0, depth, bias);
    for (int64_t t = 0; t < tokens; ++t) {
      load_adapter_grad(p, m0 + t, n0, depth, row);
      prefetch_row(p.grad, (m0 + t) * p.out_features + n0 + depth,
                   lesser(kBlockElements<P>, p.out_features - n0 - depth));
      multiply_row(row, scale, depth);
      for (int64_t i = 0; i < depth && bias_part != nullptr; ++i) bias_part[t] += row[i] * bias[i];
      as_units<P>({row, DType::kFloat32}, 0, depth, units + t * kBlockDepth);
    }
    for (int64_t r0 = 0; r0 < p.rank; r0 += kBlockDepth) {
      const int64_t ranks = lesser(kBlockDepth, p.rank - r0);
      pack_rows<P>(depth, ranks, panel_units,
                   [&](int64_t i, float* dst) { load_row(p.up_weight, (n0 + i) * p.rank + r0, ranks, dst); });
      const int64_t unit_depth = ceil_div(depth, P::kElements);
      for (int64_t j = 0; j < ranks; j += kPanelColumns) {
        multiply_panel<P>(units, kBlockDepth, tokens, panel_units + j * unit_depth, unit_depth, q + r0 + j, width);
      }
    }
  }
}

// dst[block][j][t] = src[t][j] for tokens m0 + t; `dst` as transpose_tokens has it.
void store_transposed(const float* src, int64_t width, int64_t m0, int64_t tokens, int64_t rank, float* dst) {
  for (int64_t t = 0, count; t < tokens; t += count) {
    const int64_t m = m0 + t, at = m % kBlockDepth;
    count = lesser(tokens - t, kBlockDepth - at);
    transpose(src + t * width, width, count, rank, dst + (m - at) * rank + at, kBlockDepth);
  }
}

// dhidden of a tile: dz W_d, and the residual's share where the residual is hidden itself.
template <class P>
void adapter_dhidden(const BottleneckAdapterBackward& p, int64_t m0, int64_t tokens, const typename P::Unit* dz,
                     int64_t width, float* panels, float* sums) {
  typename P::Unit* panel_units = reinterpret_cast<typename P::Unit*>(panels);
  for (int64_t k0 = 0; k0 < p.in_features; k0 += kAdapterColumns) {
    const int64_t columns = lesser(kAdapterColumns, p.in_features - k0), block = whole_panels(columns);
    if (p.residual_is_hidden) {
      load_block(p.grad, p.in_features, m0, tokens, k0, columns, block, sums);
    } else {
      fill_zero(sums, tokens * block);
    }
    for (int64_t r0 = 0; r0 < p.rank; r0 += kBlockElements<P>) {
      const int64_t depth = lesser(kBlockElements<P>, p.rank - r0);
      pack_rows<P>(depth, columns, panel_units, [&](int64_t j, float* row) {
        load_row(p.down_weight, (r0 + j) * p.in_features + k0, columns, row);
      });
      multiply_panels<P>(dz + r0 / P::kElements, width, tokens, panel_units, ceil_div(depth, P::kElements), block,
                         sums);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      store_row(sums + t * block, columns, p.dhidden, (m0 + t) * p.in_features + k0);
    }
  }
}

template <class P>
void backward_tokens(const BottleneckAdapterBackward& p, float* f_transposed, float* dz_transposed, ThreadPool pool) {
  const AdapterTiles tiles(p.tokens, p.rank, pool);
  const int64_t width = whole_panels(p.rank), ranks = lesser(width, kBlockDepth);
  const bool through_activation = p.dhidden || p.ddown_weight || p.ddown_bias, needs_q = through_activation || p.dgate;
  parallel(pool, tiles.tiles, [&](int64_t tile) {
    const int64_t m0 = tiles.first(tile), tokens = tiles.count(tile);
    Slice scratch{task_scratch(static_cast<size_t>(
        slice_size(tiles.height * kBlockDepth) + slice_size(kBlockDepth * greater(ranks, kAdapterColumns)) +
        3 * slice_size(tiles.height * width) + slice_size(operand_size<P>(tiles.height * width)) +
        slice_size(tiles.height) + slice_size(width)))};
    float* a = scratch.take(tiles.height * kBlockDepth);  // hidden, grad, then dhidden
    float* panels = scratch.take(kBlockDepth * greater(ranks, kAdapterColumns));
    float* f = scratch.take(tiles.height * width);      // z, then f(z)    [tokens, width]
    float* slope = scratch.take(tiles.height * width);  // f'(z)           [tokens, width]
    float* dz = scratch.take(tiles.height * width);     // q, df, then dz  [tokens, width]
    float* operand = scratch.take(operand_size<P>(tiles.height * width));
    float* bias_part = scratch.take(tiles.height);
    float* row = scratch.take(width);
    adapter_down<P>(p, m0, tokens, width, a, panels, f);
    activate(p.activation, f, slope, tokens * width);
    if (f_transposed != nullptr) store_transposed(f, width, m0, tokens, p.rank, f_transposed);
    if (!needs_q) return;
    const bool bias_counts = p.dgate && p.up_bias;
    adapter_up_backward<P>(p, m0, tokens, width, a, panels, dz, bias_counts ? bias_part : nullptr);
    for (int64_t t = 0; t < tokens; ++t) {
      float* d = dz + t * width;
      if (p.dgate) {
        float sum = bias_counts ? bias_part[t] : 0.0f;
        for (int64_t j = 0; j < p.rank; ++j) sum += f[t * width + j] * d[j];
        store_row(&sum, 1, p.dgate, m0 + t);
      }
      if (p.gate) scale_row(d, load_gate(p, m0 + t), p.rank);
      if (p.grad_down) {
        load_row(p.grad_down, (m0 + t) * p.rank, p.rank, row);
        for (int64_t j = 0; j < p.rank; ++j) d[j] += row[j];
      }
      multiply_row(d, slope + t * width, p.rank);
    }
    if (dz_transposed != nullptr) store_transposed(dz, width, m0, tokens, p.rank, dz_transposed);
    if (p.dhidden) {
      adapter_dhidden<P>(p, m0, tokens, as_operand<P>(dz, tokens, width, p.rank, operand), width, panels, a);
    }
  });
}

// What a task of the second pass works in.
struct FeatureScratch {
  float* panels;  // grad or hidden  [width / P, tokens, P]
  float* left;    // f or dz of a block of tokens, in units of P  [rank, kBlockDepth]
  float* sums;    // [rank, width]
  float* rows;    // of dW_u  [kLanes, rank]
  float* weight;  // [rank]
};

// sums[rank, width] = left^T rows, for `columns` features from n0 on; load(m, row) provides a token's.
template <class P, class Load>
void adapter_weight_sums(int64_t tokens, int64_t rank, const float* left_transposed, int64_t columns, int64_t width,
                         const FeatureScratch& s, const Load& load) {
  typename P::Unit* panel_units = reinterpret_cast<typename P::Unit*>(s.panels);
  fill_zero(s.sums, rank * width);
  for (int64_t m0 = 0; m0 < tokens; m0 += kBlockDepth) {
    const int64_t count = lesser(kBlockDepth, tokens - m0);
    pack_rows<P>(count, columns, panel_units, [&](int64_t t, float* row) { load(m0 + t, row); });
    const auto* left = as_operand<P>(left_transposed + m0 * rank, rank, kBlockDepth, count, s.left);
    multiply_panels<P>(left, kBlockDepth, rank, panel_units, ceil_div(count, P::kElements), width, s.sums);
  }
}

// G = (gate * dropout' grad)^T f: dW_u = scale * G, db_u likewise, and dscale_n = W_u[n] . G[n] + b_u[n] * (the sum
// whose multiple db_u[n] is), so that `up` is not computed again.
template <class P>
void backward_up_weight(const BottleneckAdapterBackward& p, const float* f_transposed, int64_t n0, int64_t columns,
                        const FeatureScratch& s, float* dscale) {
  const int64_t width = whole_panels(columns);
  float total[kBlockDepth] = {}, partial[kBlockDepth] = {}, scale[kBlockDepth], bias[kBlockDepth] = {};
  const auto add_partial = [&] {  // sums by blocks of tokens, as the products have them
    for (int64_t i = 0; i < columns; ++i) {
      total[i] += partial[i];
      partial[i] = 0.0f;
    }
  };
  const bool sums_needed = p.dup_weight || p.dscale;
  const auto load = [&](int64_t m, float* dst) {
    load_adapter_grad(p, m, n0, columns, dst);
    if (m + kRowsAhead < p.tokens) prefetch_row(p.grad, (m + kRowsAhead) * p.out_features + n0, columns);
    if (m % kBlockDepth == 0) add_partial();
    const float gate = load_gate(p, m);
    for (int64_t i = 0; i < columns; ++i) {
      dst[i] *= gate;
      partial[i] += dst[i];
    }
  };
  if (sums_needed) {
    adapter_weight_sums<P>(p.tokens, p.rank, f_transposed, columns, width, s, load);
  } else {
    for (int64_t m = 0; m < p.tokens; ++m) load(m, s.panels);
  }
  add_partial();
  load_adapter_scale(p, n0, columns, scale);
  if (p.up_bias) load_row(p.up_bias, n0, columns, bias);
  for (int64_t first = 0; first < columns && sums_needed; first += kLanes) {
    const int64_t count = lesser(kLanes, columns - first);
    transpose(s.sums + first, width, p.rank, count, s.rows, p.rank);
    for (int64_t i = first; i < first + count; ++i) {
      float* row = s.rows + (i - first) * p.rank;  // G[n0 + i]
      if (p.dscale) {
        load_row(p.up_weight, (n0 + i) * p.rank, p.rank, s.weight);
        float dot = bias[i] * total[i];
        const float* one[4] = {s.weight};
        multiply_dots<1, 1>(row, p.rank, one, p.rank, &dot, 1);
        dscale[n0 + i] = dot;
      }
      if (!p.dup_weight) continue;
      scale_row(row, scale[i], p.rank);
      store_row(row, p.rank, p.dup_weight, (n0 + i) * p.rank);
    }
  }
  multiply_row(total, scale, columns);
  if (p.dup_bias) store_row(total, columns, p.dup_bias, n0);
}

template <class P>
void backward_down_weight(const BottleneckAdapterBackward& p, const float* dz_transposed, int64_t k0, int64_t columns,
                          const FeatureScratch& s) {
  const int64_t width = whole_panels(columns);
  adapter_weight_sums<P>(p.tokens, p.rank, dz_transposed, columns, width, s, [&](int64_t m, float* row) {
    load_row(p.hidden, m * p.in_features + k0, columns, row);
    if (m + kRowsAhead < p.tokens) prefetch_row(p.hidden, (m + kRowsAhead) * p.in_features + k0, columns);
  });
  for (int64_t j = 0; j < p.rank; ++j) store_row(s.sums + j * width, columns, p.ddown_weight, j * p.in_features + k0);
}

template <class P>
void backward_features(const BottleneckAdapterBackward& p, const float* f_transposed, const float* dz_transposed,
                       float* dscale, ThreadPool pool) {
  const int64_t out_block = block_columns(p.out_features, kBlockDepth, pool);
  const int64_t in_block = block_columns(p.in_features, kBlockDepth, pool);
  const int64_t out_tasks = p.dup_weight || p.dup_bias || p.dscale ? ceil_div(p.out_features, out_block) : 0;
  const int64_t in_tasks = p.ddown_weight ? ceil_div(p.in_features, in_block) : 0;
  const int64_t width = whole_panels(greater(out_block, in_block));
  parallel(pool, out_tasks + in_tasks, [&](int64_t task) {
    const int64_t left = operand_size<P>(p.rank * kBlockDepth);
    Slice scratch{task_scratch(static_cast<size_t>(slice_size(kBlockDepth * width) + slice_size(left) +
                                                   slice_size(p.rank * width) + slice_size(kLanes * p.rank) +
                                                   slice_size(p.rank)))};
    const FeatureScratch s{scratch.take(kBlockDepth * width), scratch.take(left), scratch.take(p.rank * width),
                           scratch.take(kLanes * p.rank), scratch.take(p.rank)};
    if (task < out_tasks) {
      const int64_t n0 = task * out_block;
      backward_up_weight<P>(p, f_transposed, n0, lesser(out_block, p.out_features - n0), s, dscale);
    } else {
      const int64_t k0 = (task - out_tasks) * in_block;
      backward_down_weight<P>(p, dz_transposed, k0, lesser(in_block, p.in_features - k0), s);
    }
  });
}

// db_d = sum dz, from the transposed blocks.
void backward_down_bias(const BottleneckAdapterBackward& p, const float* dz_transposed, float* row) {
  for (int64_t j = 0; j < p.rank; ++j) {
    row[j] = 0.0f;
    for (int64_t m0 = 0; m0 < p.tokens; m0 += kBlockDepth) {
      const float* block = dz_transposed + m0 * p.rank + j * kBlockDepth;
      float sum = 0.0f;
      for (int64_t t = 0; t < lesser(kBlockDepth, p.tokens - m0); ++t) sum += block[t];
      row[j] += sum;
    }
  }
  store_row(row, p.rank, p.ddown_bias, 0);
}

void bottleneck_adapter_backward(const BottleneckAdapterBackward& p, ThreadPool pool) {
  const bool needs_f = p.dup_weight || p.dscale, needs_dz = p.ddown_weight || p.ddown_bias;
  const int64_t transposed = transposed_size(p.tokens, p.rank);
  Slice caller{caller_scratch(static_cast<size_t>((needs_f ? slice_size(transposed) : 0) +
                                                  (needs_dz ? slice_size(transposed) : 0) + slice_size(p.out_features) +
                                                  slice_size(p.rank)))};
  float* f_transposed = needs_f ? caller.take(transposed) : nullptr;
  float* dz_transposed = needs_dz ? caller.take(transposed) : nullptr;
  float* dscale = caller.take(p.out_features);
  float* row = caller.take(p.rank);
  with_adapter_products(p, [&]<class P>() {
    if (p.tokens > 0 && (needs_f || needs_dz || p.dhidden || p.dgate)) {
      backward_tokens<P>(p, f_transposed, dz_transposed, pool);
    }
    backward_features<P>(p, f_transposed, dz_transposed, dscale, pool);
  });
  if (p.ddown_bias) backward_down_bias(p, dz_transposed, row);
  if (p.dscale && p.scale_per_channel) store_row(dscale, p.out_features, p.dscale, 0);
  if (p.dscale && !p.scale_per_channel) {
    double sum = 0.0;
    for (int64_t n = 0; n < p.out_features; ++n) sum += static_cast<double>(dscale[n]);
    const float total = static_cast<float>(sum);
    store_row(&total, 1, p.dscale, 0);
  }
}
