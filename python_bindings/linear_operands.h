// The arguments that every op of the adapted linear has: contiguous, and checked against M, K and N.
#pragma once

#include <cmath>

#include "tensors.h"

namespace peft_kernels::bindings {

// Where `reads_x` is false x is left as it is, of any strides: a stand-in without values, or a caller's to copy.
struct Operands {
  Place place;
  int64_t tokens, in_features, out_features, rank = 0;
  Tensor x;
  DType dtype;         // of x
  const void* x_data;  // null where `reads_x` is false
  std::optional<NF4Parts> nf4;
  Tensor dense_weight;  // where nf4 is absent
  OptionalTensor lora_a, lora_b, column_scale, input_scale, seed;
  float scaling;
  double dropout_p;

  Operands(const Tensor& x_, const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
           const OptionalTensor& nested_code, const OptionalTensor& nested_offset, int64_t nested_blocksize,
           int64_t blocksize, int64_t out_features_, const OptionalTensor& lora_a_, const OptionalTensor& lora_b_,
           double scaling_, const OptionalTensor& column_scale_, const OptionalTensor& input_scale_, double dropout_p_,
           const OptionalTensor& seed_, bool reads_x, Place place_)
      : place(place_),
        out_features(out_features_),
        x(reads_x ? as_contiguous(defined("x", x_)) : defined("x", x_)),
        dtype(dtype_of("x", x.scalar_type())),
        lora_a(as_contiguous(lora_a_)),
        lora_b(as_contiguous(lora_b_)),
        column_scale(as_contiguous(column_scale_)),
        input_scale(as_contiguous(input_scale_)),
        seed(seed_),
        scaling(static_cast<float>(scaling_)),
        dropout_p(dropout_p_) {
    STD_TORCH_CHECK(x.dim() == 2, "x must be [M, K], got ", shape_of(x));
    x_data = reads_x ? data_of("x", x) : nullptr;
    tokens = x.size(0);
    in_features = x.size(1);
    place.check("x", x);
    STD_TORCH_CHECK(in_features > 0 && out_features > 0, "weight must be [N, K] with N, K > 0, got [", out_features,
                    ", ", in_features, "]");
    if (absmax) {
      nf4.emplace(weight, *absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize,
                  checked_product("weight", out_features, in_features), place);
    } else {
      check_shape("weight", weight, {out_features, in_features}, place);
      check_dtype("weight", weight, x.scalar_type());
      data_of("weight", weight);  // there is some: a GEMM would not look
      dense_weight = weight;
    }
    STD_TORCH_CHECK(std::isfinite(scaling_), "scaling must be finite, got ", scaling_);
    STD_TORCH_CHECK(lora_a.has_value() == lora_b.has_value(), "lora_a and lora_b must be given together");
    check_dropout(dropout_p, seed, place);
    STD_TORCH_CHECK(lora_a || dropout_p == 0.0, "dropout_p must be 0 without lora_a and lora_b, got ", dropout_p);
    if (lora_a) {
      STD_TORCH_CHECK(lora_a->dim() == 2 && lora_a->size(0) > 0, "lora_a must be [r, K] with r > 0, got ",
                      shape_of(*lora_a));
      rank = lora_a->size(0);
      check_shape("lora_a", *lora_a, {rank, in_features}, place);
      check_shape("lora_b", *lora_b, {out_features, rank}, place);
      check_float32_or_like_x("lora_a", *lora_a);
      check_dtype("lora_b", *lora_b, lora_a->scalar_type());
    }
    check_vector("column_scale", column_scale, out_features);
    check_vector("input_scale", input_scale, in_features);
  }

  void check_float32_or_like_x(const char* name, const Tensor& t) const {
    if (t.scalar_type() != ScalarType::Float) check_dtype(name, t, x.scalar_type());
  }
  void check_vector(const char* name, const OptionalTensor& t, int64_t size) const {
    if (!t) return;
    check_shape(name, *t, {size}, place);
    check_float32_or_like_x(name, *t);
  }
};

}  // namespace peft_kernels::bindings
