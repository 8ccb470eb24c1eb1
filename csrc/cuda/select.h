// Which kernel computes a product with an NF4 weight, in what tiles: the only chooser, a pure function of the problem
// and the device. Host code without CUDA: `pk.explain` asks it too (python_bindings/cuda/plan.cpp).
#pragma once

#include <algorithm>

#include "cuda/plan.h"
#include "cuda/select_input_gradient.h"
#include "cuda/select_linear.h"

namespace peft_kernels::cuda {

// Whether kernels can count what a problem has: rows and columns in 31 bits, pieces of 16 bytes of the codes in 32.
inline bool countable(const Product& product) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 4096;  // to which a step may be added
  const auto fits = [](int64_t size) { return size >= 1 && size <= kMost; };
  return product.tokens >= 1 && fits(product.in_features) && fits(product.out_features) &&
         product.in_features * product.out_features >> 37 == 0;
}

inline Plan select(const Product& product, const Device& device) {
  if (!countable(product)) return {};
  return product.by_input ? select_input_gradient(product, device) : select_linear(product, device);
}

// Parts of the sum over K of dora_norm: four CTAs of 64 rows for a multiprocessor, 256 inputs or more for each.
inline int64_t norm_splits(int64_t in_features, int64_t out_features, const Device& device) {
  const int64_t row_blocks = (out_features + 63) / 64;
  const int64_t wanted = (4 * device.multiprocessors + row_blocks - 1) / row_blocks;
  return std::max<int64_t>(1, std::min(wanted, in_features / 256));
}

}  // namespace peft_kernels::cuda
