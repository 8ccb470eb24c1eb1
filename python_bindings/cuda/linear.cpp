// adapted_linear and nf4_linear_backward_input for tensors on GPUs; schemas in peft_kernels/ops/linear/schema.py.
// Problems that select() leaves to others go on to Triton's kernels.
#include "../linear_operands.h"
#include "cuda/select.h"
#include "gpu.h"

namespace peft_kernels::bindings {
namespace {

Tensor empty_float(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return empty(like, shape, ScalarType::Float);
}
float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// u = D(x) A^T, [M, r].
Tensor projected(const Operands& in, const Tensor& x, const OnGpu& gpu) {
  if (in.rank == 0) return empty_float(x, {0});
  cuda::Projection problem;
  problem.tokens = in.tokens;
  problem.in_features = in.in_features;
  problem.rank = in.rank;
  problem.x = array("x", x);
  problem.x_stride = row_stride(x);
  problem.a = array("lora_a", in.lora_a);
  problem.dropout = gpu_dropout(in.dropout_p, in.seed, in.place);
  const Tensor u = empty_float(x, {in.tokens, in.rank});
  problem.u = floats(u);
  OnGpu::succeeded("the projection", cuda::project(problem, gpu.stream));
  return u;
}

std::tuple<Tensor, Tensor, Tensor> adapted_linear(
    const Tensor& x_, const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
    const OptionalTensor& nested_code, const OptionalTensor& nested_offset, int64_t nested_blocksize, int64_t blocksize,
    int64_t out_features, const OptionalTensor& lora_a, const OptionalTensor& lora_b, double scaling,
    const OptionalTensor& column_scale, const OptionalTensor& input_scale, const OptionalTensor& bias_,
    double dropout_p, const OptionalTensor& seed, bool save_preactivation) {
  const Operands in(x_, weight, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize,
                    out_features, lora_a, lora_b, scaling, column_scale, input_scale, dropout_p, seed, false,
                    Place::of("x", x_));
  const OptionalTensor bias = as_contiguous(bias_);
  in.check_vector("bias", bias, out_features);
  const OnGpu gpu(x_);
  cuda::Plan plan;
  if (in.nf4 && !in.input_scale && aligned_16(in.nf4->packed.const_data_ptr())) {
    plan = cuda::select({false, in.tokens, in.in_features, out_features, in.nf4->blocksize_log2, in.dtype}, gpu.device);
  }
  if (plan.method == cuda::Method::kElsewhere) {
    return by_triton<Tensor, Tensor, Tensor>("peft_kernels::adapted_linear", x_, weight, absmax, nested_absmax,
                                             nested_code, nested_offset, nested_blocksize, blocksize, out_features,
                                             lora_a, lora_b, scaling, column_scale, input_scale, bias_, dropout_p, seed,
                                             save_preactivation);
  }
  const Tensor x = with_aligned_rows(in.x);
  const ScalarType dtype = x.scalar_type();
  const Tensor u = projected(in, x, gpu);
  const Tensor y = empty(x, {in.tokens, out_features}, dtype);
  const Tensor z = save_preactivation ? empty(x, {in.tokens, out_features}, dtype) : empty(x, {0}, dtype);

  cuda::Linear problem;
  problem.tokens = in.tokens;
  problem.in_features = in.in_features;
  problem.out_features = out_features;
  problem.rank = in.rank;
  problem.x = array("x", x);
  problem.x_stride = row_stride(x);
  problem.weight = gpu_weight(*in.nf4);
  problem.u = in.rank ? floats(u) : nullptr;
  problem.lora_b = array("lora_b", in.lora_b);
  problem.scaling = in.scaling;
  problem.column_scale = array("column_scale", in.column_scale);
  problem.bias = array("bias", bias);
  problem.y = output(y);
  if (save_preactivation) problem.z = output(z);
  OnGpu::succeeded("adapted_linear", cuda::linear(problem, plan, gpu.stream));
  return {y, u, z};
}

Tensor nf4_linear_backward_input(const Tensor& grad_, const Tensor& weight, const Tensor& absmax,
                                 const OptionalTensor& nested_absmax, const OptionalTensor& nested_code,
                                 const OptionalTensor& nested_offset, int64_t nested_blocksize, int64_t blocksize,
                                 int64_t in_features, const OptionalTensor& column_scale_, const OptionalTensor& du_,
                                 const OptionalTensor& lora_a_, const OptionalTensor& input_scale_, double dropout_p,
                                 const OptionalTensor& seed) {
  STD_TORCH_CHECK(grad_.dim() == 2, "grad must be [M, N], got ", shape_of(grad_));
  const Place place = Place::of("grad", grad_);
  const DType dtype = dtype_of("grad", grad_.scalar_type());
  const int64_t tokens = grad_.size(0), out_features = grad_.size(1);
  STD_TORCH_CHECK(in_features > 0 && out_features > 0, "weight must be [N, K] with N, K > 0, got [", out_features, ", ",
                  in_features, "]");
  const NF4Parts nf4(weight, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize,
                     checked_product("weight", out_features, in_features), place);
  const OptionalTensor column_scale = as_contiguous(column_scale_), input_scale = as_contiguous(input_scale_);
  const OptionalTensor du = as_contiguous(du_), lora_a = as_contiguous(lora_a_);
  const auto check = [&](const char* name, const OptionalTensor& t, std::initializer_list<int64_t> shape) {
    if (!t) return;
    check_shape(name, *t, shape, place);
    if (t->scalar_type() != ScalarType::Float) check_dtype(name, *t, grad_.scalar_type());
  };
  check("column_scale", column_scale, {out_features});
  check("input_scale", input_scale, {in_features});
  STD_TORCH_CHECK(du.has_value() == lora_a.has_value(), "du and lora_a must be given together");
  int64_t rank = 0;
  if (du) {
    STD_TORCH_CHECK(lora_a->dim() == 2, "lora_a must be [r, K], got ", shape_of(*lora_a));
    rank = lora_a->size(0);
    check("lora_a", lora_a, {rank, in_features});
    check_shape("du", *du, {tokens, rank}, place);
    check_dtype("du", *du, ScalarType::Float);
  }
  check_dropout(dropout_p, seed, place);

  const OnGpu gpu(grad_);
  cuda::Plan plan;
  if (aligned_16(nf4.packed.const_data_ptr())) {
    plan = cuda::select({true, tokens, in_features, out_features, nf4.blocksize_log2, dtype}, gpu.device);
  }
  if (plan.method == cuda::Method::kElsewhere) {
    return std::get<0>(by_triton<Tensor>("peft_kernels::nf4_linear_backward_input", grad_, weight, absmax,
                                         nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize,
                                         in_features, column_scale_, du_, lora_a_, input_scale_, dropout_p, seed));
  }
  const Tensor grad = with_aligned_rows(grad_);
  const Tensor dx = empty(grad, {tokens, in_features}, grad.scalar_type());
  const Tensor partials = empty_float(grad, {plan.splits > 1 ? plan.splits * tokens * in_features : 0});
  cuda::InputGradient problem;
  problem.tokens = tokens;
  problem.in_features = in_features;
  problem.out_features = out_features;
  problem.rank = rank;
  problem.grad = array("grad", grad);
  problem.grad_stride = row_stride(grad);
  problem.weight = gpu_weight(nf4);
  problem.column_scale = array("column_scale", column_scale);
  if (du) problem.du = data_of<float>("du", *du);
  problem.lora_a = array("lora_a", lora_a);
  problem.dropout = gpu_dropout(dropout_p, seed, place);
  problem.input_scale = array("input_scale", input_scale);
  if (plan.splits > 1) problem.partials = floats(partials);
  problem.dx = output(dx);
  OnGpu::succeeded("nf4_linear_backward_input", cuda::input_gradient(problem, plan, gpu.stream));
  return dx;
}

}  // namespace

PEFT_KERNELS_CUDA_OP(adapted_linear)
PEFT_KERNELS_CUDA_OP(nf4_linear_backward_input)

}  // namespace peft_kernels::bindings
