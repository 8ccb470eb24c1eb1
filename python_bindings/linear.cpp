// adapted_linear and adapted_linear_backward for CPU tensors; schemas in peft_kernels/ops/linear/schema.py. A dense
// weight's product is the vendor GEMM's, through torch; our kernels add the rest to it.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "linear_operands.h"

namespace peft_kernels::bindings {
namespace {

// out = a @ b by torch's GEMM. The out variant: autocast leaves it alone, and the operands are detached because it
// refuses tensors that require grad.
void vendor_matmul(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const auto detach = [](const Tensor& t) {
    std::array<StableIValue, 1> stack{from(t)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  };
  std::array<StableIValue, 3> stack{from(detach(a)), from(detach(b)), from(out)};
  explained("the product with a dense weight failed",
            [&] { TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION)); });
  to<Tensor>(stack[0]);  // takes back the reference that the dispatcher returned
}

// out = (a * scale) @ b, or a @ b. a * scale is rounded once, to the dtype of a, and held for a block of rows at a
// time: as many as a GEMM needs to be at its full speed, and few enough to stay in cache on the way to it.
void scaled_matmul(Tensor a, const OptionalTensor& scale, const Tensor& b, Tensor out) {
  if (!scale) return vendor_matmul(a, b, out);
  constexpr int64_t kLeastRows = 512;
  const int64_t rows = a.size(0), blocks = std::max<int64_t>(1, rows / kLeastRows);
  Tensor scaled = empty(a, {(rows + blocks - 1) / blocks, a.size(1)}, a.scalar_type());
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    const Tensor scaled_rows = torch::stable::narrow(scaled, 0, 0, count);
    cpu::ScaleColumns problem;
    problem.rows = count;
    problem.columns = a.size(1);
    problem.v = array("the scaled operand", torch::stable::narrow(a, 0, first, count));
    problem.scale = array("the scale", scale);
    problem.scaled = output(scaled_rows);
    cpu::kernels().scale_columns(problem, torch_threads());
    vendor_matmul(scaled_rows, b, torch::stable::narrow(out, 0, first, count));
  }
}

// The kernels' view of what forward and backward share.
struct CpuOperands : Operands {
  cpu::LowRank lowrank;
  std::optional<cpu::NF4Weight> nf4_weight;

  template <class... Arguments>
  explicit CpuOperands(const Arguments&... arguments) : Operands(arguments..., Place::kCpu) {
    if (nf4) nf4_weight = cpu_weight(*nf4);
    if (rank == 0) return;
    lowrank = {rank, array("lora_a", lora_a), array("lora_b", lora_b), scaling, make_dropout(dropout_p, seed)};
  }

  // Writes the members that AdaptedLinear and AdaptedLinearBackward have in common.
  template <class Problem>
  void fill(Problem& p) const {
    p.tokens = tokens;
    p.in_features = in_features;
    p.out_features = out_features;
    p.x = {x_data, dtype};
    if (nf4_weight) p.nf4 = *nf4_weight;
    p.lowrank = lowrank;
    p.column_scale = array("column_scale", column_scale);
    p.input_scale = array("input_scale", input_scale);
  }
};

std::tuple<Tensor, Tensor, Tensor> adapted_linear(
    const Tensor& x, const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& nested_absmax,
    const OptionalTensor& nested_code, const OptionalTensor& nested_offset, int64_t nested_blocksize, int64_t blocksize,
    int64_t out_features, const OptionalTensor& lora_a, const OptionalTensor& lora_b, double scaling,
    const OptionalTensor& column_scale, const OptionalTensor& input_scale, const OptionalTensor& bias_,
    double dropout_p, const OptionalTensor& seed, bool save_preactivation) {
  const CpuOperands in(x, weight, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize,
                       out_features, lora_a, lora_b, scaling, column_scale, input_scale, dropout_p, seed, true);
  const OptionalTensor bias = as_contiguous(bias_);
  in.check_vector("bias", bias, out_features);
  const int64_t tokens = in.tokens, rank = in.rank;
  const ScalarType dtype = in.x.scalar_type();
  Tensor y = empty(in.x, {tokens, out_features}, dtype);
  Tensor u = rank ? empty(in.x, {tokens, rank}, ScalarType::Float) : empty(in.x, {0}, ScalarType::Float);
  Tensor z = save_preactivation ? empty(in.x, {tokens, out_features}, dtype) : empty(in.x, {0}, dtype);

  cpu::AdaptedLinear problem;
  in.fill(problem);
  problem.bias = array("bias", bias);
  problem.y = output(y);
  problem.u = static_cast<float*>(u.mutable_data_ptr());
  if (save_preactivation) problem.z = output(z);
  if (!in.nf4) {  // the product goes to y, where the kernel picks it up, or is all of z
    const bool is_z = save_preactivation && rank == 0;
    const Tensor& product = is_z ? z : y;
    scaled_matmul(in.x, in.input_scale, torch::stable::transpose(in.dense_weight, 0, 1), product);
    problem.base = array("base", product);
    if (is_z) problem.z = {};
    if (!is_z && rank == 0 && !in.column_scale && !bias) return {y, u, z};  // nothing joins the product
  }
  cpu::kernels().adapted_linear(problem, torch_threads());
  return {y, u, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapted_linear_backward(
    const Tensor& grad_, const Tensor& x, const Tensor& weight, const OptionalTensor& absmax,
    const OptionalTensor& nested_absmax, const OptionalTensor& nested_code, const OptionalTensor& nested_offset,
    int64_t nested_blocksize, int64_t blocksize, const OptionalTensor& lora_a, const OptionalTensor& lora_b,
    double scaling, const OptionalTensor& column_scale, const OptionalTensor& input_scale, double dropout_p,
    const OptionalTensor& seed, const OptionalTensor& u_, const OptionalTensor& z_, bool need_x, bool need_lora_a,
    bool need_lora_b, bool need_column_scale, bool need_input_scale, bool need_bias) {
  const Tensor grad = as_contiguous(grad_);
  STD_TORCH_CHECK(grad.dim() == 2, "grad must be [M, N], got ", shape_of(grad));
  const CpuOperands in(x, weight, absmax, nested_absmax, nested_code, nested_offset, nested_blocksize, blocksize,
                       grad.size(1), lora_a, lora_b, scaling, column_scale, input_scale, dropout_p, seed,
                       need_lora_a || need_input_scale);
  const int64_t tokens = in.tokens, rank = in.rank;
  const ScalarType dtype = in.x.scalar_type();
  check_shape("grad", grad, {tokens, in.out_features});
  check_dtype("grad", grad, dtype);
  const OptionalTensor u = as_contiguous(u_), z = as_contiguous(z_);
  const bool through_weight = need_x || need_input_scale;

  cpu::AdaptedLinearBackward problem;
  in.fill(problem);
  problem.grad = array("grad", grad);
  cpu::ScaleColumns outputs;  // of the layer
  outputs.rows = tokens;
  outputs.columns = in.out_features;
  outputs.v = problem.grad;
  // An output that is not asked for is an empty tensor of its parameter's dtype.
  const auto gradient = [&](bool needed, const OptionalTensor& of, cpu::MutableArray& slot) {
    Tensor t = needed ? empty(in.x, of->sizes(), of->scalar_type()) : empty(in.x, {0}, of ? of->scalar_type() : dtype);
    if (needed) slot = output(t);
    return t;
  };
  if (need_lora_a || need_lora_b) {
    STD_TORCH_CHECK(rank != 0, "need_lora_a and need_lora_b need lora_a and lora_b");
  }
  if (need_lora_b) {
    STD_TORCH_CHECK(u.has_value(), "need_lora_b needs u, the forward's second output");
    check_shape("u", *u, {tokens, rank});
    check_dtype("u", *u, ScalarType::Float);
    problem.u = data_of<float>("u", *u);
  }
  if (need_column_scale) {
    STD_TORCH_CHECK(in.column_scale && z, "need_column_scale needs column_scale and z, the forward's third output");
    check_shape("z", *z, {tokens, in.out_features});
    check_dtype("z", *z, dtype);
    outputs.z = array("z", z);
  }
  STD_TORCH_CHECK(!need_input_scale || in.input_scale, "need_input_scale needs input_scale");
  Tensor dx = gradient(need_x, in.x, problem.dx);
  Tensor dlora_a = gradient(need_lora_a, in.lora_a, problem.dlora_a);
  Tensor dlora_b = gradient(need_lora_b, in.lora_b, problem.dlora_b);
  Tensor dcolumn_scale = gradient(need_column_scale, in.column_scale, outputs.dots);
  Tensor dinput_scale = gradient(need_input_scale, in.input_scale, problem.dinput_scale);
  Tensor dbias = need_bias ? empty(grad, {in.out_features}, dtype) : empty(grad, {0}, dtype);
  if (need_bias) outputs.sums = output(dbias);

  if (outputs.sums || outputs.dots) cpu::kernels().scale_columns(outputs, torch_threads());

  OptionalTensor base;
  if (!in.nf4 && through_weight) {  // the product goes to dx, where the kernel picks it up
    base = need_x ? dx : empty(in.x, {tokens, in.in_features}, dtype);
    scaled_matmul(grad, in.column_scale, in.dense_weight, *base);
    problem.base = array("base", base);
  }
  if (!base || rank != 0) {
    cpu::kernels().adapted_linear_backward(problem, torch_threads());
  } else if (in.input_scale) {  // all that joins the product
    cpu::ScaleColumns inputs;
    inputs.rows = tokens;
    inputs.columns = in.in_features;
    inputs.v = problem.base;
    inputs.scale = problem.input_scale;
    inputs.z = problem.x;
    inputs.scaled = problem.dx;
    inputs.dots = problem.dinput_scale;
    cpu::kernels().scale_columns(inputs, torch_threads());
  }
  return {dx, dlora_a, dlora_b, dcolumn_scale, dinput_scale, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("adapted_linear", TORCH_BOX(&adapted_linear));
  m.impl("adapted_linear_backward", TORCH_BOX(&adapted_linear_backward));
}

}  // namespace peft_kernels::bindings
