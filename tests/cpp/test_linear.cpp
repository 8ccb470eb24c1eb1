// The adapted linear, forward and backward, against sums in double, over random shapes and options; and the same bits
// for one thread and for several. Under ThreadSanitizer this is also the test that tasks do not touch each other's
// data.
#include "common/nf4.h"
#include "common/philox.h"

#include "testing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::testing;

namespace {

struct Case {
  int64_t tokens, in_features, out_features, rank;
  DType dtype, adapter_dtype;
  int blocksize_log2, nested_blocksize_log2;
  bool nested, dense, dropout, column_scale, input_scale, bias;
};

// A case's inputs, and its float64 results with the bounds that fp32 accumulation allows: |error| <= n * 2^-23 * sum
// |terms| for sums of n products in any order (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1;
// the factor 2 over 2^-24 covers the products' own rounding where there is no FMA).
class Problem {
 public:
  Problem(const Case& c, Random& random) : c_(c), M(c.tokens), K(c.in_features), N(c.out_features), R(c.rank) {
    x = Values(c.dtype, random.normals(M * K));
    grad = Values(c.dtype, random.normals(M * N));
    if (R != 0) a = Values(c.adapter_dtype, random.normals(R * K)), b = Values(c.adapter_dtype, random.normals(N * R));
    if (c.column_scale) column_scale = Values(DType::kFloat32, random.normals(N));
    if (c.input_scale) input_scale = Values(c.dtype, random.normals(K));
    if (c.bias) bias = Values(c.dtype, random.normals(N));
    make_weight(random);
    if (c.dropout) dropout = {0x123456789abcdefu, static_cast<uint32_t>(0.25 * 0x1p32), 4.0f / 3.0f};
  }

  void check(const Kernels& table) {
    Output y(c_.dtype, M * N), z(c_.dtype, M * N), u(DType::kFloat32, M * R);
    AdaptedLinear forward;
    fill(forward);
    forward.bias = bias.array();
    const auto run_forward = [&](ThreadPool pool, Output& y_, Output& z_, Output& u_) {
      forward.y = y_.array();
      if (c_.dense) forward.base = y_.hold(base);  // as the bindings do: the product arrives in y
      forward.z = z_.array();
      forward.u = static_cast<float*>(u_.array().data);
      table.adapted_linear(forward, pool);
    };
    run_forward(threads<1>(), y, z, u);
    Output y3 = Output(c_.dtype, M * N), z3 = y3, u3(DType::kFloat32, M * R);
    run_forward(threads<3>(), y3, z3, u3);
    CHECK(y == y3 && z == z3 && u == u3, "%s: results differ between 1 and 3 threads", table.name);
    check_forward(table, y, z, u);
    check_backward(table, u);
  }

 private:
  using Sums = std::vector<double>;

  template <class P>
  void fill(P& p) const {
    p.tokens = M;
    p.in_features = K;
    p.out_features = N;
    p.x = x.array();
    p.nf4 = nf4;
    p.lowrank = {R, a.array(), b.array(), 0.5f, dropout};
    p.column_scale = column_scale.array();
    p.input_scale = input_scale.array();
  }

  void make_weight(Random& random) {
    const int64_t count = N * K;
    nf4 = nf4_values.fill(count, c_.blocksize_log2, c_.nested, c_.nested_blocksize_log2, random);
    weight.resize(static_cast<size_t>(count));
    for (int64_t e = 0; e < count; ++e) {
      const uint8_t byte = nf4_values.packed[static_cast<size_t>(e / 2)];
      weight[static_cast<size_t>(e)] =
          kNF4Code[e & 1 ? byte & 15 : byte >> 4] * nf4_values.absmax[static_cast<size_t>(e >> c_.blocksize_log2)];
    }
    if (c_.dense) {  // stands for what a vendor GEMM gave; any values will do
      base = Values(c_.dtype, random.normals(M * N));
      base_of_grad = Values(c_.dtype, random.normals(M * K));
    }
  }

  // Where the product is of bf16 pairs, each weight, times its scale, was rounded to bf16 first: 2^-8 of its size at
  // most.
  double weight_roundoff(const Kernels& table, bool by_input) const {
    const NF4Product product{by_input, M, K, c_.blocksize_log2, c_.dtype};
    return !c_.dense && table.plan(product) == Method::kBf16Panels ? 0x1p-8 : 0.0;
  }

  double w(int64_t n, int64_t k) const { return weight[static_cast<size_t>(n * K + k)]; }
  double at(const Values& v, int64_t i, double absent) const { return v.present() ? v[i] : absent; }
  double dropped(int64_t m, int64_t k) const { return x[m * K + k] * mask(m, k); }
  double mask(int64_t m, int64_t k) const {
    if (!c_.dropout) return 1.0;
    const int64_t e = m * K + k;
    const PhiloxWords words = philox4x32({{static_cast<uint32_t>(e / 4), 0, 0, 0}}, static_cast<uint32_t>(dropout.seed),
                                         static_cast<uint32_t>(dropout.seed >> 32));
    return words.word[e % 4] >= dropout.threshold ? static_cast<double>(dropout.scale) : 0.0;
  }

  void check_forward(const Kernels& table, const Output& y, const Output& z, const Output& u) const {
    Sums eu, bu, ez, bz, ey, by;
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t j = 0; j < R; ++j) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < K; ++k) {
          const double term = dropped(m, k) * a[j * K + k];
          sum += term;
          size += std::fabs(term);
        }
        eu.push_back(sum);
        bu.push_back(static_cast<double>(K + 2) * 0x1p-23 * size);
      }
      for (int64_t n = 0; n < N; ++n) {
        double sum = c_.dense ? base[m * N + n] : 0, size = std::fabs(sum), inherited = 0;
        for (int64_t k = 0; k < K && !c_.dense; ++k) {
          const double term = x[m * K + k] * at(input_scale, k, 1) * w(n, k);
          sum += term;
          size += std::fabs(term);
        }
        const double rounded = weight_roundoff(table, false) * size;
        for (int64_t j = 0; j < R; ++j) {
          const double factor = 0.5 * b[n * R + j], term = eu[static_cast<size_t>(m * R + j)] * factor;
          sum += term;
          size += std::fabs(term);
          inherited += bu[static_cast<size_t>(m * R + j)] * std::fabs(factor);
        }
        const double bound = static_cast<double>(K + R + 4) * 0x1p-23 * size + rounded + inherited;
        ez.push_back(sum);
        bz.push_back(bound);
        const double scale = at(column_scale, n, 1);
        ey.push_back(scale * sum + at(bias, n, 0));
        by.push_back(std::fabs(scale) * bound + 0x1p-23 * (std::fabs(scale * sum) + std::fabs(at(bias, n, 0))));
      }
    }
    u.check_close("u", eu, bu);
    z.check_close("z", ez, bz);
    y.check_close("y", ey, by);
  }

  void check_backward(const Kernels& table, Output& u) {
    AdaptedLinearBackward p;
    fill(p);
    p.grad = grad.array();
    p.u = static_cast<const float*>(u.array().data);
    struct Gradients {
      Output dx, da, db, dl;
    };
    const auto make = [&] {
      return Gradients{{c_.dtype, M * K}, {c_.adapter_dtype, R * K}, {c_.adapter_dtype, N * R}, {c_.dtype, K}};
    };
    const auto run = [&](ThreadPool pool, Gradients& g) {
      p.dx = g.dx.array();
      if (c_.dense) p.base = g.dx.hold(base_of_grad);
      if (R != 0) p.dlora_a = g.da.array(), p.dlora_b = g.db.array();
      if (c_.input_scale) p.dinput_scale = g.dl.array();
      table.adapted_linear_backward(p, pool);
    };
    Gradients g = make(), g3 = make();
    run(threads<1>(), g);
    run(threads<3>(), g3);
    CHECK(g.dx == g3.dx && g.da == g3.da && g.db == g3.db && (!c_.input_scale || g.dl == g3.dl),
          "%s: gradients differ between 1 and 3 threads", table.name);

    check_each_gradient_alone(table, p, g.dx, g.da, g.db, g.dl);

    const double unit = 0x1p-23;
    Sums edu, bdu;  // du
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t j = 0; j < R; ++j) {
        double sum = 0, size = 0;
        for (int64_t n = 0; n < N; ++n) {
          const double term = 0.5 * dz(m, n) * b[n * R + j];
          sum += term;
          size += std::fabs(term);
        }
        edu.push_back(sum);
        bdu.push_back(static_cast<double>(N + 4) * unit * size);
      }
    }
    Sums edx, bdx, edl(static_cast<size_t>(K)), sdl(edl.size()), bdl(edl.size());
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t k = 0; k < K; ++k) {
        double sum = c_.dense ? base_of_grad[m * K + k] : 0, size = std::fabs(sum);
        for (int64_t n = 0; n < N && !c_.dense; ++n) {
          const double term = dz(m, n) * w(n, k);
          sum += term;
          size += std::fabs(term);
        }
        const double bound = (static_cast<double>(N + 4) * unit + weight_roundoff(table, true)) * size,
                     scale = at(input_scale, k, 1);
        const size_t column = static_cast<size_t>(k);
        edl[column] += x[m * K + k] * sum;
        sdl[column] += std::fabs(x[m * K + k] * sum);
        bdl[column] += std::fabs(x[m * K + k]) * bound;
        double low = 0, low_size = 0, inherited = 0;
        for (int64_t j = 0; j < R; ++j) {
          const size_t i = static_cast<size_t>(m * R + j);
          const double factor = a[j * K + k] * mask(m, k);
          low += edu[i] * factor;
          low_size += std::fabs(edu[i] * factor);
          inherited += bdu[i] * std::fabs(factor);
        }
        edx.push_back(scale * sum + low);
        bdx.push_back(std::fabs(scale) * bound + inherited +
                      static_cast<double>(R + 4) * unit * (low_size + std::fabs(scale * sum)));
      }
    }
    for (size_t k = 0; k < edl.size(); ++k) bdl[k] += static_cast<double>(M + 4) * unit * sdl[k];
    g.dx.check_close("dx", edx, bdx);
    if (c_.input_scale) g.dl.check_close("dinput_scale", edl, bdl);

    Sums eda, bda, edb, bdb;
    for (int64_t j = 0; j < R; ++j) {
      for (int64_t k = 0; k < K; ++k) {
        double sum = 0, size = 0, inherited = 0;
        for (int64_t m = 0; m < M; ++m) {
          const size_t i = static_cast<size_t>(m * R + j);
          sum += edu[i] * dropped(m, k);
          size += std::fabs(edu[i] * dropped(m, k));
          inherited += bdu[i] * std::fabs(dropped(m, k));
        }
        eda.push_back(sum);
        bda.push_back(static_cast<double>(M + 4) * unit * size + inherited);
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t j = 0; j < R; ++j) {
        double sum = 0, size = 0;
        for (int64_t m = 0; m < M; ++m) {
          sum += 0.5 * dz(m, n) * u[m * R + j];
          size += std::fabs(0.5 * dz(m, n) * u[m * R + j]);
        }
        edb.push_back(sum);
        bdb.push_back(static_cast<double>(M + 4) * unit * size);
      }
    }
    if (R != 0) g.da.check_close("dlora_a", eda, bda), g.db.check_close("dlora_b", edb, bdb);
  }

  // A gradient is the same whether or not others are asked for.
  void check_each_gradient_alone(const Kernels& table, const AdaptedLinearBackward& all, const Output& dx,
                                 const Output& da, const Output& db, const Output& dl) const {
    const auto check = [&](MutableArray AdaptedLinearBackward::* slot, const Output& expected) {
      if (!(all.*slot)) return;
      AdaptedLinearBackward p = all;
      p.dx = p.dlora_a = p.dlora_b = p.dinput_scale = MutableArray{};
      Output alone(expected);
      alone.poison();
      p.*slot = alone.array();
      Output product(c_.dtype, M * K);  // where dx is not asked for, the dense product has memory of its own
      if (c_.dense) p.base = slot == &AdaptedLinearBackward::dx ? alone.hold(base_of_grad) : product.hold(base_of_grad);
      table.adapted_linear_backward(p, threads<2>());
      CHECK(alone == expected, "%s: a gradient changes when it is computed alone", table.name);
    };
    check(&AdaptedLinearBackward::dx, dx);
    check(&AdaptedLinearBackward::dlora_a, da);
    check(&AdaptedLinearBackward::dlora_b, db);
    check(&AdaptedLinearBackward::dinput_scale, dl);
  }

  double dz(int64_t m, int64_t n) const { return grad[m * N + n] * at(column_scale, n, 1); }

  Case c_;
  int64_t M, K, N, R;
  Values x, grad, a, b, column_scale, input_scale, bias, base, base_of_grad;
  NF4Weight nf4;
  Dropout dropout;
  NF4Values nf4_values;
  std::vector<float> weight;
};

}  // namespace

int main() {
  constexpr int64_t kTokens[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 31, 48, 49, 64, 192, 193, 270};
  constexpr int64_t kInFeatures[] = {1, 31, 32, 64, 100, 160, 256, 384, 577, 1056};
  constexpr int64_t kOutFeatures[] = {1, 3, 16, 33, 64, 130, 260};
  constexpr int64_t kRanks[] = {0, 1, 3, 4, 8, 16, 33, 260};
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  Random random(3);
  const auto pick = [&](const auto& from) { return from[random.below(static_cast<int64_t>(std::size(from)))]; };
  for (int i = 0; i < 90; ++i) {  // every set checks each: minutes under sanitizers
    const DType dtype = pick(kDTypes);
    const bool any[] = {false, true};
    const auto log2 = [&] { return 5 + static_cast<int>(random.below(8)); };
    const Case c{.tokens = pick(kTokens),
                 .in_features = pick(kInFeatures),
                 .out_features = pick(kOutFeatures),
                 .rank = pick(kRanks),
                 .dtype = dtype,
                 .adapter_dtype = pick(any) ? dtype : DType::kFloat32,
                 .blocksize_log2 = log2(),
                 .nested_blocksize_log2 = log2(),
                 .nested = pick(any),
                 .dense = random.below(5) == 0,
                 .dropout = pick(any),
                 .column_scale = pick(any),
                 .input_scale = pick(any),
                 .bias = pick(any)};
    Problem problem(c, random);
    for (const Kernels* table : all_kernels()) problem.check(*table);
  }
  return 0;
}
