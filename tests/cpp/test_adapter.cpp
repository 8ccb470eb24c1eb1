// The bottleneck adapter, forward and backward, against sums in double, over random shapes and options; and the same
// bits for one thread and for several. Under ThreadSanitizer this is also the test that tasks do not touch each other's
// data. Activations are exact here (identity, relu away from its kink): test_activation.cpp has the others.
#include "common/philox.h"

#include "testing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::testing;

namespace {

using Sums = std::vector<double>;

struct Case {
  int64_t tokens, in_features, rank, out_features;
  DType dtype, parameter_dtype;
  bool relu, biases, gate, dropout, residual, residual_is_hidden, grad_down;
  int scale;  // 0: a constant, 1: one for all, 2: one a channel
};

// A result in double, and what fp32 sums of `count` terms may be off by: count * 2^-23 * sum |terms| (Higham, "Accuracy
// and Stability of Numerical Algorithms", section 3.1), where the terms themselves carry errors already.
struct Value {
  double value = 0, size = 0, error = 0;

  void add(double a, double b) { add({a, std::fabs(a), 0}, b); }
  void add(const Value& a, double b) {
    value += a.value * b;
    size += std::fabs(a.value * b);
    error += a.error * std::fabs(b);
  }
  // `operands`: what the factors of the terms may be off by, relatively.
  Value after(int64_t count, double operands) const {
    return {value, size, error + (static_cast<double>(count) * 0x1p-23 + operands) * (size + error)};
  }
};

class Problem {
 public:
  Problem(const Case& c, Random& random) : c_(c), M(c.tokens), D(c.in_features), R(c.rank), N(c.out_features) {
    hidden = Values(c.dtype, random.normals(M * D));
    grad = Values(c.dtype, random.normals(M * N));
    std::vector<float> weight = random.normals(R * D);  // z is of unit size
    for (float& w : weight) w /= std::sqrt(static_cast<float>(D));
    down_weight = Values(c.parameter_dtype, weight);
    up_weight = Values(c.parameter_dtype, random.normals(N * R));
    if (c.biases) {
      std::vector<float> bias = random.normals(R);  // so large that relu's kink is far, on either side
      for (float& b : bias) b = b > 0 ? 8.0f : -8.0f;
      down_bias = Values(c.parameter_dtype, bias);
      up_bias = Values(c.parameter_dtype, random.normals(N));
    }
    if (c.gate) gate = Values(c.dtype, random.normals(M));
    if (c.residual) residual = Values(c.dtype, random.normals(M * N));
    if (c.grad_down) grad_down = Values(c.dtype, random.normals(M * R));
    if (c.scale != 0) scale = Values(c.parameter_dtype, random.normals(c.scale == 1 ? 1 : N));
    if (c.dropout) dropout = {0x123456789abcdefu, static_cast<uint32_t>(0.25 * 0x1p32), 4.0f / 3.0f};
  }

  void check(const Kernels& table) {
    // Both factors of a product are rounded to bf16 where the set has such products.
    if (c_.dtype == DType::kBFloat16 && std::string(table.name) == "avx512_bf16") operands_ = (2 + 0x1p-8) * 0x1p-8;
    compute();
    check_forward(table);
    check_backward(table);
  }

 private:
  void fill(AdapterOperands& p) const {
    p.tokens = M, p.in_features = D, p.rank = R, p.out_features = N;
    p.hidden = hidden.array();
    p.down_weight = down_weight.array(), p.down_bias = down_bias.array();
    p.up_weight = up_weight.array(), p.up_bias = up_bias.array();
    p.activation = c_.relu ? Activation::kRelu : Activation::kIdentity;
    p.scaling = -1.5f;
    p.scale = scale.array();
    p.scale_per_channel = c_.scale == 2;
    p.gate = gate.array();
    p.dropout = dropout;
  }
  static double at(const Values& v, int64_t i, double absent) { return v.present() ? v[i] : absent; }
  double s(int64_t n) const { return c_.scale == 0 ? -1.5 : scale[c_.scale == 1 ? 0 : n]; }
  double keep(int64_t m, int64_t n) const {
    if (!c_.dropout) return 1.0;
    const int64_t e = m * N + n;
    const PhiloxWords words = philox4x32({{static_cast<uint32_t>(e / 4), 0, 0, 0}}, static_cast<uint32_t>(dropout.seed),
                                         static_cast<uint32_t>(dropout.seed >> 32));
    return words.word[e % 4] >= dropout.threshold ? static_cast<double>(dropout.scale) : 0.0;
  }
  double e(int64_t m, int64_t n) const { return grad[m * N + n] * keep(m, n); }  // D'(g)
  bool passes(int64_t m, int64_t j) const { return !c_.relu || down[static_cast<size_t>(m * R + j)].value > 0; }

  void compute() {
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t j = 0; j < R; ++j) {
        Value z;
        z.add(at(down_bias, j, 0), 1);
        for (int64_t k = 0; k < D; ++k) z.add(hidden[m * D + k], down_weight[j * D + k]);
        z = z.after(D + 2, operands_);
        CHECK(!c_.relu || std::fabs(z.value) > z.error, "the kink of relu is within the error of z: %g", z.value);
        if (c_.relu && z.value < 0) z = {};
        down.push_back(z);
      }
      for (int64_t n = 0; n < N; ++n) {
        Value v;
        v.add(at(up_bias, n, 0), 1);
        for (int64_t j = 0; j < R; ++j) v.add(down[static_cast<size_t>(m * R + j)], up_weight[n * R + j]);
        up.push_back(v.after(R + 2, operands_));  // before its scale
      }
    }
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t j = 0; j < R; ++j) {
        Value d;
        for (int64_t n = 0; n < N; ++n) d.add(e(m, n) * s(n) * at(gate, m, 1), up_weight[n * R + j]);
        d.add(at(grad_down, m * R + j, 0), 1);
        dz.push_back(passes(m, j) ? d.after(N + 6, operands_) : Value{});
      }
    }
  }

  static void compare(const char* what, const Output& got, const std::vector<Value>& expected) {
    Sums values, errors;
    for (const Value& v : expected) values.push_back(v.value), errors.push_back(v.error);
    got.check_close(what, values, errors);
  }

  void check_forward(const Kernels& table) {
    BottleneckAdapter p;
    fill(p);
    p.residual = c_.residual_is_hidden ? hidden.array() : residual.array();
    Output out[2] = {Output(c_.dtype, M * N), Output(c_.dtype, M * N)};
    Output down_out[2] = {Output(c_.dtype, M * R), Output(c_.dtype, M * R)};
    Output up_out[2] = {Output(c_.dtype, M * N), Output(c_.dtype, M * N)};
    Output alone(c_.dtype, M * N);
    for (int i = 0; i < 2; ++i) {
      p.out = out[i].array(), p.down = down_out[i].array(), p.up = up_out[i].array();
      table.bottleneck_adapter(p, i == 0 ? threads<1>() : threads<3>());
    }
    p.out = alone.array(), p.down = {}, p.up = {};
    table.bottleneck_adapter(p, threads<2>());
    CHECK(out[0] == out[1] && down_out[0] == down_out[1] && up_out[0] == up_out[1] && alone == out[0],
          "%s: results differ between 1, 2 and 3 threads", table.name);
    std::vector<Value> expected, expected_up;
    for (int64_t i = 0; i < M * N; ++i) {
      const int64_t m = i / N, n = i % N;
      Value u, o;
      u.add(up[static_cast<size_t>(i)], s(n));
      expected_up.push_back(u.after(1, operands_));
      o.add(u, keep(m, n) * at(gate, m, 1));
      o.add(c_.residual_is_hidden ? hidden[i] : at(residual, i, 0), 1);
      expected.push_back(o.after(5, operands_));
    }
    compare("out", out[0], expected);
    compare("down", down_out[0], down);
    compare("up", up_out[0], expected_up);
  }

  void check_backward(const Kernels& table) {
    BottleneckAdapterBackward p;
    fill(p);
    p.grad = grad.array();
    p.grad_down = grad_down.array();
    p.residual_is_hidden = c_.residual_is_hidden;
    struct Results {
      Output dhidden, ddown_weight, ddown_bias, dup_weight, dup_bias, dscale, dgate;
    };
    const int64_t scales = c_.scale == 0 ? 0 : (c_.scale == 1 ? 1 : N);
    const auto make = [&] {
      return Results{Output(c_.dtype, M * D),
                     Output(c_.parameter_dtype, R * D),
                     Output(c_.parameter_dtype, c_.biases ? R : 0),
                     Output(c_.parameter_dtype, N * R),
                     Output(c_.parameter_dtype, c_.biases ? N : 0),
                     Output(c_.parameter_dtype, scales),
                     Output(c_.dtype, c_.gate ? M : 0)};
    };
    const auto run = [&](ThreadPool pool) {
      Results r = make();
      p.dhidden = r.dhidden.array(), p.ddown_weight = r.ddown_weight.array(), p.dup_weight = r.dup_weight.array();
      if (c_.biases) p.ddown_bias = r.ddown_bias.array(), p.dup_bias = r.dup_bias.array();
      if (scales != 0) p.dscale = r.dscale.array();
      if (c_.gate) p.dgate = r.dgate.array();
      table.bottleneck_adapter_backward(p, pool);
      return r;
    };
    const Results one = run(threads<1>()), three = run(threads<3>());
    CHECK(one.dhidden == three.dhidden && one.ddown_weight == three.ddown_weight &&
              one.ddown_bias == three.ddown_bias && one.dup_weight == three.dup_weight &&
              one.dup_bias == three.dup_bias && one.dscale == three.dscale && one.dgate == three.dgate,
          "%s: gradients differ between 1 and 3 threads", table.name);

    std::vector<Value> dhidden, ddown_weight(static_cast<size_t>(R * D)), ddown_bias(static_cast<size_t>(R));
    std::vector<Value> dup_weight(static_cast<size_t>(N * R)), dup_bias(static_cast<size_t>(N));
    std::vector<Value> dscale(static_cast<size_t>(N)), dgate;
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t k = 0; k < D; ++k) {
        Value h;
        if (c_.residual_is_hidden) h.add(grad[m * N + k], 1);
        for (int64_t j = 0; j < R; ++j) h.add(dz[static_cast<size_t>(m * R + j)], down_weight[j * D + k]);
        dhidden.push_back(h.after(R + 2, operands_));
      }
      Value gates;
      for (int64_t n = 0; n < N; ++n) {
        const double dup = e(m, n) * at(gate, m, 1);
        const Value& v = up[static_cast<size_t>(m * N + n)];
        const Value spread{v.value, v.size, v.error + static_cast<double>(R + 2) * 0x1p-23 * v.size};
        gates.add(spread, e(m, n) * s(n));
        dscale[static_cast<size_t>(n)].add(spread, dup);
        dscale[static_cast<size_t>(n)].size += std::fabs(dup) * v.size;  // W_u . G sums |W_u| |G|
        dup_bias[static_cast<size_t>(n)].add(dup * s(n), 1);
        for (int64_t j = 0; j < R; ++j) {
          dup_weight[static_cast<size_t>(n * R + j)].add(down[static_cast<size_t>(m * R + j)], dup * s(n));
        }
        gates.size += std::fabs(e(m, n) * s(n)) * v.size;
      }
      dgate.push_back(gates.after(N + R + 6, operands_));
      for (int64_t j = 0; j < R; ++j) {
        const Value& d = dz[static_cast<size_t>(m * R + j)];
        ddown_bias[static_cast<size_t>(j)].add(d, 1);
        for (int64_t k = 0; k < D; ++k) ddown_weight[static_cast<size_t>(j * D + k)].add(d, hidden[m * D + k]);
      }
    }
    const auto finished = [&](std::vector<Value> values, int64_t count) {
      for (Value& v : values) v = v.after(count, operands_);
      return values;
    };
    compare("dhidden", one.dhidden, dhidden);
    compare("ddown_weight", one.ddown_weight, finished(ddown_weight, M + 2));
    compare("dup_weight", one.dup_weight, finished(dup_weight, M + 6));
    if (c_.biases) compare("ddown_bias", one.ddown_bias, finished(ddown_bias, M + 2));
    if (c_.biases) compare("dup_bias", one.dup_bias, finished(dup_bias, M + 6));
    if (c_.gate) compare("dgate", one.dgate, dgate);
    if (c_.scale == 2) compare("dscale", one.dscale, finished(dscale, M + R + 6));
    if (c_.scale == 1) {
      Value total;
      for (const Value& v : finished(dscale, M + R + 6)) total.value += v.value, total.error += v.error;
      compare("dscale", one.dscale, {total});
    }
  }

  Case c_;
  double operands_ = 0.0;
  int64_t M, D, R, N;
  Values hidden, grad, down_weight, down_bias, up_weight, up_bias, gate, residual, grad_down, scale;
  Dropout dropout;
  std::vector<Value> down, up, dz;  // f(z), W_u f(z) + b_u, dL/dz
};

}  // namespace

int main() {
  Random random(7);
  const DType dtypes[3] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  for (const Kernels* table : all_kernels()) {
    for (int i = 0; i < 24; ++i) {
      const DType dtype = dtypes[random.below(3)];
      const int64_t d = 1 + random.below(i < 18 ? 70 : 300), r = 1 + random.below(i < 18 ? 40 : 280);
      const bool residual_is_hidden = random.below(3) == 0, biases = random.below(3) != 0;
      const Case c{1 + random.below(i < 18 ? 30 : 300),
                   d,
                   r,
                   residual_is_hidden ? d : 1 + random.below(140),
                   dtype,
                   random.below(2) ? DType::kFloat32 : dtype,
                   biases,  // relu only where they keep its kink away
                   biases,
                   random.below(2) != 0,
                   random.below(2) != 0,
                   !residual_is_hidden && random.below(2),
                   residual_is_hidden,
                   random.below(2) != 0,
                   static_cast<int>(random.below(3))};
      Problem(c, random).check(*table);
    }
    BottleneckAdapter empty;
    empty.in_features = empty.rank = empty.out_features = 4;
    table->bottleneck_adapter(empty, threads<2>());
  }
  return 0;
}
