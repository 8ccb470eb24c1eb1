// bottleneck_adapter and bottleneck_adapter_backward for CPU tensors; schemas in peft_kernels/ops/adapter/schema.py.
#include <cmath>
#include <tuple>

#include "tensors.h"

namespace peft_kernels::bindings {
namespace {

// What forward and backward share: contiguous inputs, checked against each other.
struct Operands {
  Tensor hidden, down_weight, up_weight;
  OptionalTensor down_bias, up_bias, scale, gate;
  int64_t tokens, in_features, rank, out_features;
  cpu::AdapterOperands view;

  Operands(const Tensor& hidden_, const Tensor& down_weight_, const OptionalTensor& down_bias_,
           const Tensor& up_weight_, const OptionalTensor& up_bias_, int64_t activation, double scaling,
           const OptionalTensor& scale_, const OptionalTensor& gate_, double dropout_p, const OptionalTensor& seed)
      : hidden(as_contiguous(hidden_)),
        down_weight(as_contiguous(down_weight_)),
        up_weight(as_contiguous(up_weight_)),
        down_bias(as_contiguous(down_bias_)),
        up_bias(as_contiguous(up_bias_)),
        scale(as_contiguous(scale_)),
        gate(as_contiguous(gate_)) {
    STD_TORCH_CHECK(hidden.dim() == 2, "hidden must be [M, d], got ", shape_of(hidden));
    STD_TORCH_CHECK(down_weight.dim() == 2, "down_weight must be [r, d], got ", shape_of(down_weight));
    STD_TORCH_CHECK(up_weight.dim() == 2, "up_weight must be [N, r], got ", shape_of(up_weight));
    tokens = hidden.size(0);
    in_features = hidden.size(1);
    rank = down_weight.size(0);
    out_features = up_weight.size(0);
    STD_TORCH_CHECK(in_features > 0 && rank > 0 && out_features > 0,
                    "down_weight and up_weight must have elements, got ", shape_of(down_weight), " and ",
                    shape_of(up_weight));
    check_shape("hidden", hidden, {tokens, in_features});
    check_shape("down_weight", down_weight, {rank, in_features});
    check_shape("up_weight", up_weight, {out_features, rank});
    check_vector("down_bias", down_bias, rank);
    check_vector("up_bias", up_bias, out_features);
    check_vector("gate", gate, tokens);
    if (scale) check_vector("scale", scale, scale->numel() == 1 ? 1 : out_features);
    check_float32_or_like_hidden("down_weight", down_weight);
    check_float32_or_like_hidden("up_weight", up_weight);
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(cpu::Activation::kTanh),
                    "activation must be from 0 to ", static_cast<int64_t>(cpu::Activation::kTanh), ", got ",
                    activation);
    STD_TORCH_CHECK(std::isfinite(scaling), "scaling must be finite, got ", scaling);
    view.tokens = tokens;
    view.in_features = in_features;
    view.rank = rank;
    view.out_features = out_features;
    view.hidden = array("hidden", hidden);
    view.down_weight = array("down_weight", down_weight);
    view.down_bias = array("down_bias", down_bias);
    view.up_weight = array("up_weight", up_weight);
    view.up_bias = array("up_bias", up_bias);
    view.activation = static_cast<cpu::Activation>(activation);
    view.scaling = static_cast<float>(scaling);
    view.scale = array("scale", scale);
    view.scale_per_channel = scale && scale->numel() == out_features;
    view.gate = array("gate", gate);
    view.dropout = make_dropout(dropout_p, seed);
  }

  void check_float32_or_like_hidden(const char* name, const Tensor& t) const {
    if (t.scalar_type() != ScalarType::Float) check_dtype(name, t, hidden.scalar_type());
  }
  void check_vector(const char* name, const OptionalTensor& t, int64_t size) const {
    if (!t) return;
    check_shape(name, *t, {size});
    check_float32_or_like_hidden(name, *t);
  }
};

std::tuple<Tensor, Tensor, Tensor> bottleneck_adapter(const Tensor& hidden, const OptionalTensor& residual_,
                                                      const Tensor& down_weight, const OptionalTensor& down_bias,
                                                      const Tensor& up_weight, const OptionalTensor& up_bias,
                                                      int64_t activation, double scaling, const OptionalTensor& scale,
                                                      const OptionalTensor& gate, double dropout_p,
                                                      const OptionalTensor& seed, bool need_down, bool need_up) {
  const Operands in(hidden, down_weight, down_bias, up_weight, up_bias, activation, scaling, scale, gate, dropout_p,
                    seed);
  const OptionalTensor residual = as_contiguous(residual_);
  const ScalarType dtype = in.hidden.scalar_type();
  if (residual) {
    check_shape("residual", *residual, {in.tokens, in.out_features});
    in.check_float32_or_like_hidden("residual", *residual);
  }
  Tensor out = empty(in.hidden, {in.tokens, in.out_features}, residual ? residual->scalar_type() : dtype);
  Tensor down = need_down ? empty(in.hidden, {in.tokens, in.rank}, dtype) : empty(in.hidden, {0}, dtype);
  Tensor up = need_up ? empty(in.hidden, {in.tokens, in.out_features}, dtype) : empty(in.hidden, {0}, dtype);
  cpu::BottleneckAdapter problem{in.view, array("residual", residual), output(out), {}, {}};
  if (need_down) problem.down = output(down);
  if (need_up) problem.up = output(up);
  cpu::kernels().bottleneck_adapter(problem, torch_threads());
  return {out, down, up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_adapter_backward(
    const Tensor& grad_, const OptionalTensor& grad_down_, const Tensor& hidden, const Tensor& down_weight,
    const OptionalTensor& down_bias, const Tensor& up_weight, const OptionalTensor& up_bias, int64_t activation,
    double scaling, const OptionalTensor& scale, const OptionalTensor& gate, double dropout_p,
    const OptionalTensor& seed, bool residual_is_hidden, bool need_hidden, bool need_down_weight, bool need_down_bias,
    bool need_up_weight, bool need_up_bias, bool need_scale, bool need_gate) {
  const Operands in(hidden, down_weight, down_bias, up_weight, up_bias, activation, scaling, scale, gate, dropout_p,
                    seed);
  const Tensor grad = as_contiguous(grad_);
  const OptionalTensor grad_down = as_contiguous(grad_down_);
  const ScalarType dtype = in.hidden.scalar_type();
  check_shape("grad", grad, {in.tokens, in.out_features});
  in.check_float32_or_like_hidden("grad", grad);
  if (grad_down) {
    check_shape("grad_down", *grad_down, {in.tokens, in.rank});
    check_dtype("grad_down", *grad_down, dtype);
  }
  STD_TORCH_CHECK(!residual_is_hidden || in.in_features == in.out_features,
                  "residual_is_hidden needs as many output as input features, got ", in.out_features, " and ",
                  in.in_features);

  cpu::BottleneckAdapterBackward problem;
  static_cast<cpu::AdapterOperands&>(problem) = in.view;
  problem.grad = array("grad", grad);
  problem.grad_down = array("grad_down", grad_down);
  problem.residual_is_hidden = residual_is_hidden;
  // An output that is not asked for is an empty tensor of its parameter's dtype.
  const auto gradient = [&](const char* name, bool needed, const OptionalTensor& of, cpu::MutableArray& slot) {
    STD_TORCH_CHECK(!needed || of, "need_", name, " needs ", name);
    Tensor t = needed ? empty(grad, of->sizes(), of->scalar_type()) : empty(grad, {0}, of ? of->scalar_type() : dtype);
    if (needed) slot = output(t);
    return t;
  };
  Tensor dhidden = gradient("hidden", need_hidden, in.hidden, problem.dhidden);
  Tensor ddown_weight = gradient("down_weight", need_down_weight, in.down_weight, problem.ddown_weight);
  Tensor ddown_bias = gradient("down_bias", need_down_bias, in.down_bias, problem.ddown_bias);
  Tensor dup_weight = gradient("up_weight", need_up_weight, in.up_weight, problem.dup_weight);
  Tensor dup_bias = gradient("up_bias", need_up_bias, in.up_bias, problem.dup_bias);
  Tensor dscale = gradient("scale", need_scale, in.scale, problem.dscale);
  Tensor dgate = gradient("gate", need_gate, in.gate, problem.dgate);
  cpu::kernels().bottleneck_adapter_backward(problem, torch_threads());
  return {dhidden, ddown_weight, ddown_bias, dup_weight, dup_bias, dscale, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("bottleneck_adapter", TORCH_BOX(&bottleneck_adapter));
  m.impl("bottleneck_adapter_backward", TORCH_BOX(&bottleneck_adapter_backward));
}

}  // namespace peft_kernels::bindings
