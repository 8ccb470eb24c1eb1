// The adapted linear, backward; formulas in api.h. Three passes, each parallel over what its sums do not run over:
//   tokens:          du = scaling * dz B                                    (sums over output features)
//   output features: dB                                                     (sums over tokens)
//   input features:  dx, dA, d input_scale, W decoded once per token block  (sums over output features and tokens)
// As in the forward, no sum's order depends on the number of threads. W is never held but for one block of panels.

inline constexpr int64_t kMostBlockInputs = kBlockDepth;  // input features that a task owns, at most

// grad[m, n0 .. n0 + count) * column_scale in fp32; column_scale is those features' values, or null.
void load_dz(const AdaptedLinearBackward& p, int64_t m, int64_t n0, int64_t count, const float* column_scale,
             float* dst) {
  load_scaled(p.grad, m * p.out_features + n0, count, column_scale, dst);
}

// du[M, rank] = scaling * dz B.
void backward_du(const AdaptedLinearBackward& p, float* du, ThreadPool pool) {
  constexpr int64_t kTokens = 48;
  const int64_t rank = p.lowrank.rank;
  parallel(pool, ceil_div(p.tokens, kTokens), [&](int64_t task) {
    const int64_t m0 = task * kTokens, tokens = lesser(kTokens, p.tokens - m0);
    for (int64_t j0 = 0; j0 < rank; j0 += kBlockDepth) {
      const int64_t ranks = lesser(kBlockDepth, rank - j0), width = ceil_div(ranks, kPanelColumns) * kPanelColumns;
      Slice scratch{task_scratch(static_cast<size_t>(slice_size(kTokens * kBlockDepth) +
                                                     slice_size(kBlockDepth * width) + slice_size(kTokens * width)))};
      float* a = scratch.take(kTokens * kBlockDepth);     // dz   [tokens, depth]
      float* panels = scratch.take(kBlockDepth * width);  // B    [width / P, depth, P]
      float* sums = scratch.take(kTokens * width);        // du   [tokens, width]
      fill_zero(sums, tokens * width);
      for (int64_t n0 = 0; n0 < p.out_features; n0 += kBlockDepth) {
        const int64_t depth = lesser(kBlockDepth, p.out_features - n0);
        pack_rows(depth, ranks, panels,
                  [&](int64_t i, float* row) { load_row(p.lowrank.b, (n0 + i) * rank + j0, ranks, row); });
        float scale_buffer[kBlockDepth];
        const float* column_scale = optional_as_float(p.column_scale, n0, depth, scale_buffer);
        for (int64_t t = 0; t < tokens; ++t) load_dz(p, m0 + t, n0, depth, column_scale, a + t * kBlockDepth);
        multiply_panels(a, kBlockDepth, tokens, panels, depth, width, sums);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < ranks; ++j) du[(m0 + t) * rank + j0 + j] = p.lowrank.scaling * sums[t * width + j];
      }
    }
  });
}

// src^T in blocks of kBlockDepth tokens: dst[block][j][t] = src[block * kBlockDepth + t][j], for src [M, rank].
void transpose_tokens(const float* src, int64_t tokens, int64_t rank, float* dst, ThreadPool pool) {
  parallel(pool, ceil_div(tokens, kBlockDepth), [&](int64_t block) {
    const int64_t first = block * kBlockDepth, count = lesser(kBlockDepth, tokens - first);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t j = 0; j < rank; ++j) dst[first * rank + j * kBlockDepth + t] = src[(first + t) * rank + j];
    }
  });
}
inline int64_t transposed_size(int64_t tokens, int64_t rank) {
  return ceil_div(tokens, kBlockDepth) * kBlockDepth * rank;
}

// dB = scaling * dz^T u; tasks own output features.
void backward_lora_b(const AdaptedLinearBackward& p, const float* u_transposed, ThreadPool pool) {
  const int64_t rank = p.lowrank.rank;
  const int64_t block = block_columns(p.out_features, kMostBlockColumns, pool);
  parallel(pool, ceil_div(p.out_features, block), [&](int64_t task) {
    const int64_t n0 = task * block, columns = lesser(block, p.out_features - n0);
    const int64_t width = ceil_div(columns, kPanelColumns) * kPanelColumns;
    Slice scratch{task_scratch(
        static_cast<size_t>(slice_size(kBlockDepth * width) + slice_size(rank * width) + slice_size(rank)))};
    float* panels = scratch.take(kBlockDepth * width);  // dz   [width / P, tokens, P]
    float* sums = scratch.take(rank * width);           // dB^T [rank, width]
    float* db_row = scratch.take(rank);
    float scale_buffer[kMostBlockColumns];
    const float* column_scale = optional_as_float(p.column_scale, n0, columns, scale_buffer);
    fill_zero(sums, rank * width);
    for (int64_t m0 = 0; m0 < p.tokens; m0 += kBlockDepth) {
      const int64_t tokens = lesser(kBlockDepth, p.tokens - m0);
      pack_rows(tokens, columns, panels,
                [&](int64_t t, float* row) { load_dz(p, m0 + t, n0, columns, column_scale, row); });
      multiply_panels(u_transposed + m0 * rank, kBlockDepth, rank, panels, tokens, width, sums);
    }
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t j = 0; j < rank; ++j) db_row[j] = p.lowrank.scaling * sums[j * width + i];
      store_row(db_row, rank, p.dlora_b, (n0 + i) * rank);
    }
  });
}

// --- dz W for few tokens: W is looked up straight into the accumulation, as in the forward's GEMV --------------------

// Some output features, n0 .. n0 + rows, of the product; their rows of W are read from one end of the task's input
// features to the other, as they lie in memory.
struct GemvRows {
  const NF4Weight& w;
  int64_t in_features, out_features, n0, rows;
  const float* dz;      // [tokens, out_features]
  const float* scales;  // [rows, blocks], from the block of the task's first input feature on
  int64_t first_block;  // that block, of those in a row
  int64_t blocks;
  bool first, last;  // of the output features
  float* product;    // [tokens, in_features]; until the last rows are in, even before odd inputs in each panel
};

// product[t][k .. k + kPanels * kPanelColumns) += sum_n dz[t][n] W[n][k ..]; lanes run along k, even and odd k apart
// (the nibbles' order).
template <int kTokens, int kPanels>
void gemv_by_input(const GemvRows& c, int64_t k) {
  const Table code = load_table(kNF4Code);
  const int log2 = c.w.blocksize_log2;
  Vec even[kTokens][kPanels], odd[kTokens][kPanels];
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < kPanels; ++i) {
      const float* partial = c.product + t * c.in_features + k + i * kPanelColumns;
      even[t][i] = c.first ? zero() : load(partial);
      odd[t][i] = c.first ? zero() : load(partial + kLanes);
    }
  }
  for (int64_t r = 0; r < c.rows; ++r) {
    const uint8_t* bytes = c.w.packed + (((c.n0 + r) * c.in_features + k) >> 1);
    if ((k - (c.first_block << log2)) / 2 % kCacheLine == 0) prefetch(bytes + (c.rows * c.in_features >> 1));
    int64_t block = -1;
    Table table = code;
    for (int i = 0; i < kPanels; ++i) {
      if (const int64_t next = (k + i * kPanelColumns) >> log2; next != block) {
        block = next;
        table = scale(code, c.scales[r * c.blocks + block - c.first_block]);
      }
      const Bytes b = load_bytes(bytes + i * kLanes);
      const Vec high = look_up_high(table, b), low = look_up_low(table, b);
      for (int t = 0; t < kTokens; ++t) {
        const Vec s = broadcast(c.dz[t * c.out_features + c.n0 + r]);
        even[t][i] = fmadd(s, high, even[t][i]);
        odd[t][i] = fmadd(s, low, odd[t][i]);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < kPanels; ++i) {
      float* to = c.product + t * c.in_features + k + i * kPanelColumns;
      if (c.last) {
        store_interleaved(to, even[t][i], odd[t][i]);
      } else {
        store(to, even[t][i]);
        store(to + kLanes, odd[t][i]);
      }
    }
  }
}

template <int kTokens>
void gemv_by_inputs(int64_t tokens, const GemvRows& c, int64_t k0, int64_t width) {
  if constexpr (kTokens > 0) {
    if (tokens != kTokens) return gemv_by_inputs<kTokens - 1>(tokens, c, k0, width);
    constexpr int kPanels = kAccumulators / 2 / kTokens >= 4 ? 4 : (kAccumulators / 2 / kTokens >= 2 ? 2 : 1);
    constexpr int64_t kStep = kPanels * kPanelColumns;
    const int64_t end = k0 + width;
    int64_t k = k0;
    for (; k + kStep <= end; k += kStep) gemv_by_input<kTokens, kPanels>(c, k);
    for (; k < end; k += kPanelColumns) gemv_by_input<kTokens, 1>(c, k);
  }
}

// product[M, K] = dz W.
void backward_gemv(const AdaptedLinearBackward& p, const float* dz, float* product, ThreadPool pool) {
  constexpr int64_t kRows = 32;
  const int log2 = p.nf4.blocksize_log2;
  const int64_t blocks = p.in_features >> log2;                              // of a row
  const int64_t share = ceil_div(blocks, lesser(blocks, 2 * pool.threads));  // of a task; any gives the same bits
  parallel(pool, ceil_div(blocks, share), [&](int64_t task) {
    const int64_t first_block = task * share, task_blocks = lesser(share, blocks - first_block);
    float* scales = task_scratch(static_cast<size_t>(kRows * task_blocks));
    for (int64_t n0 = 0; n0 < p.out_features; n0 += kRows) {
      const int64_t rows = lesser(kRows, p.out_features - n0);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t block = (n0 + r) * blocks + first_block;
        load_scales(p.nf4, block, task_blocks, scales + r * task_blocks);
        for (int64_t i = 0; i < task_blocks; i += kCacheLine / 4) prefetch_scales(p.nf4, block + kRows * blocks + i);
      }
      const GemvRows c{p.nf4,
                       p.in_features,
                       p.out_features,
                       n0,
                       rows,
                       dz,
                       scales,
                       first_block,
                       task_blocks,
                       n0 == 0,
                       n0 + rows == p.out_features,
                       product};
      gemv_by_inputs<kGemvByInputTokens>(p.tokens, c, first_block << log2, task_blocks << log2);
    }
  });
}

// --- dz W for more tokens, and everything else that belongs to input features ---------------------------------------

// sums[t][i] = dz[m0 + t] . W[:, k0 + i], by panels, for i < width; zero from `inputs` on.
template <class P>
void multiply_by_input(const AdaptedLinearBackward& p, int64_t m0, int64_t tokens, int64_t k0, int64_t inputs,
                       int64_t width, float* a, float* panels, float* sums) {
  using Unit = typename P::Unit;
  static_assert(sizeof(Unit) == sizeof(float));
  Unit* units = reinterpret_cast<Unit*>(a);
  Unit* panel = reinterpret_cast<Unit*>(panels);
  const int log2 = p.nf4.blocksize_log2;
  const int64_t first_block = k0 >> log2, blocks = ((k0 + inputs - 1) >> log2) + 1 - first_block;  // of a row
  float scales[kBlockElements<P> * (kMostBlockInputs / 32 + 1)];  // [depth, blocks]; 32 is the least blocksize
  fill_zero(sums, tokens * width);
  for (int64_t n0 = 0; n0 < p.out_features; n0 += kBlockElements<P>) {
    const int64_t depth = lesser(kBlockElements<P>, p.out_features - n0);
    float scale_buffer[kBlockElements<P>];
    const float* column_scale = optional_as_float(p.column_scale, n0, depth, scale_buffer);
    for (int64_t t = 0; t < tokens; ++t) {
      load_units<P>(p.grad, (m0 + t) * p.out_features + n0, depth, units + t * kBlockDepth);
    }
    if (rows_are_whole_blocks(p.nf4, p.in_features)) {
      for (int64_t n = 0; n < depth; ++n) {
        const int64_t block = ((n0 + n) * p.in_features >> log2) + first_block;
        prefetch_scales(p.nf4, block + (p.in_features >> log2) * kBlockElements<P>);
        load_scales(p.nf4, block, blocks, scales + n * blocks);
        if (column_scale != nullptr) scale_row(scales + n * blocks, column_scale[n], blocks);  // a row of W times c
      }
    }
    for (int64_t j = 0; j < width; j += kPanelColumns) {  // a panel is used while it is in the first-level cache
      decode_panel_by_input<P>(p.nf4, p.in_features, n0, depth, k0 + j, lesser(kPanelColumns, inputs - j),
                               scales + (((k0 + j) >> log2) - first_block), blocks, column_scale, panel);
      multiply_panel<P>(units, kBlockDepth, tokens, panel, ceil_div(depth, P::kElements), sums + j, width);
    }
  }
}
// P is void in a set without bf16 arithmetic, which plans no such product.
template <class P>
void multiply_by_input_bf16(const AdaptedLinearBackward& p, int64_t m0, int64_t tokens, int64_t k0, int64_t inputs,
                            int64_t width, float* a, float* panels, float* sums) {
  if constexpr (!std::is_void_v<P>) multiply_by_input<P>(p, m0, tokens, k0, inputs, width, a, panels, sums);
}

inline Method plan_backward(const AdaptedLinearBackward& p) {
  return plan({true, p.tokens, p.in_features, p.nf4.blocksize_log2, p.grad.dtype});
}

// dx, dA and d input_scale; tasks own input features and go through all tokens. `base` is dz W [M, K], where that is
// computed already.
void backward_inputs(const AdaptedLinearBackward& p, Array base, const float* du, const float* du_transposed,
                     ThreadPool pool) {
  const int64_t in_features = p.in_features, rank = p.lowrank.rank;
  const int64_t block = block_columns(in_features, kMostBlockInputs, pool);
  const bool through_weight = p.dx || p.dinput_scale;
  const Method method = plan_backward(p);
  // Where neither dropout nor an input scale treats the two parts of dx apart, both go into the same sums.
  const bool apart = rank != 0 && (p.lowrank.dropout.threshold != 0 || p.input_scale);
  parallel(pool, ceil_div(in_features, block), [&](int64_t task) {
    const int64_t k0 = task * block, inputs = lesser(block, in_features - k0);
    const int64_t width = ceil_div(inputs, kPanelColumns) * kPanelColumns;
    Slice scratch{
        task_scratch(static_cast<size_t>(slice_size(kBlockTokens * kBlockDepth) + slice_size(kBlockDepth * width) +
                                         2 * slice_size(kBlockTokens * width) + slice_size(rank * width)))};
    float* a = scratch.take(kBlockTokens * kBlockDepth);   // dz or du     [tokens, depth]
    float* panels = scratch.take(kBlockDepth * width);     // W or A or x  [width / P, depth, P]
    float* sums = scratch.take(kBlockTokens * width);      // dz W         [tokens, width]
    float* low_sums = scratch.take(kBlockTokens * width);  // du A         [tokens, width], where apart
    float* da = scratch.take(rank * width);                // dA           [rank, width]
    float row[kBlockDepth], scale_buffer[kBlockDepth], dinput_scale[kBlockDepth] = {};
    const float* input_scale = optional_as_float(p.input_scale, k0, inputs, scale_buffer);

    for (int64_t m0 = 0; m0 < p.tokens && through_weight; m0 += kBlockTokens) {
      const int64_t tokens = lesser(kBlockTokens, p.tokens - m0);
      if (base) {
        load_block(base, in_features, m0, tokens, k0, inputs, width, sums);
      } else if (method == Method::kBf16Panels) {
        multiply_by_input_bf16<Bf16Pairs>(p, m0, tokens, k0, inputs, width, a, panels, sums);
      } else {
        multiply_by_input<Fp32>(p, m0, tokens, k0, inputs, width, a, panels, sums);
      }
      if (p.dinput_scale) {
        for (int64_t t = 0; t < tokens; ++t) {
          load_row(p.x, (m0 + t) * in_features + k0, inputs, row);
          for (int64_t i = 0; i < inputs; ++i) dinput_scale[i] += row[i] * sums[t * width + i];
        }
      }
      if (!p.dx) continue;
      float* low = apart ? low_sums : sums;
      if (apart) fill_zero(low, tokens * width);
      for (int64_t j0 = 0; j0 < rank; j0 += kBlockDepth) {
        const int64_t depth = lesser(kBlockDepth, rank - j0);
        pack_rows(depth, inputs, panels,
                  [&](int64_t j, float* r) { load_row(p.lowrank.a, (j0 + j) * in_features + k0, inputs, r); });
        multiply_panels(du + m0 * rank + j0, rank, tokens, panels, depth, width, low);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        float* sum = sums + t * width;
        const int64_t at = (m0 + t) * in_features + k0;
        if (input_scale != nullptr) multiply_row(sum, input_scale, inputs);
        if (apart) {
          float* low_row = low + t * width;
          if (p.lowrank.dropout.threshold != 0) apply_dropout(low_row, inputs, at, p.lowrank.dropout);
          for (int64_t i = 0; i < inputs; ++i) sum[i] += low_row[i];
        }
        store_row(sum, inputs, p.dx, at);
      }
    }
    if (p.dinput_scale) store_row(dinput_scale, inputs, p.dinput_scale, k0);

    if (p.dlora_a) {
      fill_zero(da, rank * width);
      for (int64_t m0 = 0; m0 < p.tokens; m0 += kBlockDepth) {
        const int64_t tokens = lesser(kBlockDepth, p.tokens - m0);
        pack_rows(tokens, inputs, panels,
                  [&](int64_t t, float* r) { load_dropped(p.lowrank, p.x, in_features, m0 + t, k0, inputs, r); });
        multiply_panels(du_transposed + m0 * rank, kBlockDepth, rank, panels, tokens, width, da);
      }
      for (int64_t j = 0; j < rank; ++j) store_row(da + j * width, inputs, p.dlora_a, j * in_features + k0);
    }
  });
}

void adapted_linear_backward(const AdaptedLinearBackward& p, ThreadPool pool) {
  const int64_t rank = p.lowrank.rank;
  const bool need_du = rank != 0 && (p.dx || p.dlora_a), through_weight = p.dx || p.dinput_scale;
  const bool few = through_weight && p.tokens > 0 && !p.base && plan_backward(p) == Method::kGemv;
  const int64_t du_size = need_du ? p.tokens * rank : 0;
  const int64_t du_transposed_size = p.dlora_a ? transposed_size(p.tokens, rank) : 0;
  const int64_t u_transposed_size = p.dlora_b ? transposed_size(p.tokens, rank) : 0;
  const int64_t dz_size = few ? p.tokens * p.out_features : 0, product_size = few ? p.tokens * p.in_features : 0;
  const int64_t scale_size = few && p.column_scale ? p.out_features : 0;
  Slice caller{caller_scratch(static_cast<size_t>(slice_size(du_size) + slice_size(du_transposed_size) +
                                                  slice_size(u_transposed_size) + slice_size(dz_size) +
                                                  slice_size(product_size) + slice_size(scale_size)))};
  float* du = caller.take(du_size);
  float* du_transposed = caller.take(du_transposed_size);
  float* u_transposed = caller.take(u_transposed_size);
  if (need_du) backward_du(p, du, pool);
  if (p.dlora_a) transpose_tokens(du, p.tokens, rank, du_transposed, pool);
  if (p.dlora_b) transpose_tokens(p.u, p.tokens, rank, u_transposed, pool);
  if (p.dlora_b) backward_lora_b(p, u_transposed, pool);
  Array base = p.base;
  if (few) {
    float* dz = caller.take(dz_size);
    float* product = caller.take(product_size);
    const float* column_scale = optional_as_float(p.column_scale, 0, p.out_features, caller.take(scale_size));
    for (int64_t m = 0; m < p.tokens; ++m) load_dz(p, m, 0, p.out_features, column_scale, dz + m * p.out_features);
    backward_gemv(p, dz, product, pool);
    base = {product, DType::kFloat32};
  }
  if (through_weight || p.dlora_a) backward_inputs(p, base, du, du_transposed, pool);
}
