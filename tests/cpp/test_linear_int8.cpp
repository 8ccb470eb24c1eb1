// NF4 linear on int8 activations: bit for bit what the definition gives one product at a time, on every instruction set
// and for several threads, over random shapes.
#include <algorithm>

#include "common/nf4.h"

#include "testing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::testing;

namespace {

struct Case {
  int64_t tokens, in_features, out_features;
  DType dtype;
  int blocksize_log2, nested_blocksize_log2;
  bool nested, bias, special;  // special: a zero, a tiny, a huge and a non-finite token
};

class Problem {
 public:
  Problem(const Case& c, Random& random) : c_(c), M(c.tokens), K(c.in_features), N(c.out_features) {
    std::vector<float> inputs = random.normals(M * K);
    if (c.special) {
      for (int64_t k = 0; k < K; ++k) {
        if (M > 0) inputs[static_cast<size_t>(k)] = 0.0f;
        if (M > 1) inputs[static_cast<size_t>(K + k)] *= 1e-38f;
        if (M > 2) inputs[static_cast<size_t>(2 * K + k)] *= 1e4f;
      }
      if (M > 3) inputs[static_cast<size_t>(3 * K + random.below(K))] = std::nanf("");
      if (M > 4) inputs[static_cast<size_t>(4 * K + random.below(K))] = -HUGE_VALF;
    }
    x = Values(c.dtype, inputs);
    if (c.bias) bias = Values(random.below(2) ? c.dtype : DType::kFloat32, random.normals(N));
    nf4 = nf4_values.fill(N * K, c.blocksize_log2, c.nested, c.nested_blocksize_log2, random);
    define();
  }

  void check(const Kernels& table) const {
    const Output y = run(table, threads<1>()), y3 = run(table, threads<3>());
    for (int64_t i = 0; i < M * N; ++i) {
      CHECK(same(y[i], expected[i]),
            "%s: y[%lld, %lld] = %.9g, expected %.9g; M = %lld, K = %lld, N = %lld, blocks of %d", table.name,
            static_cast<long long>(i / N), static_cast<long long>(i % N), y[i], expected[i], static_cast<long long>(M),
            static_cast<long long>(K), static_cast<long long>(N), 1 << c_.blocksize_log2);
      CHECK(same(y3[i], y[i]), "%s: results differ between 1 and 3 threads", table.name);
    }
  }

 private:
  static bool same(double a, double b) { return a == b || (a != a && b != b); }

  Output run(const Kernels& table, ThreadPool pool) const {
    Output y(c_.dtype, M * N);
    NF4LinearInt8 p;
    p.tokens = M;
    p.in_features = K;
    p.out_features = N;
    p.x = x.array();
    p.nf4 = nf4;
    p.bias = bias.array();
    p.y = y.array();
    table.nf4_linear_int8(p, pool);
    return y;
  }

  // Groups of 64 inputs, of which each part that lies in one block of the weight is summed exactly.
  void define() {
    std::vector<float> y;
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        float sum = 0.0f;
        for (int64_t k0 = 0; k0 < K; k0 += 64) {
          const int64_t end = std::min(k0 + 64, K);
          float largest = 0.0f;
          bool finite = true;
          for (int64_t k = k0; k < end; ++k) {
            const float magnitude = std::fabs(static_cast<float>(x[m * K + k]));
            finite = finite && std::isfinite(magnitude);
            largest = std::max(largest, magnitude);
          }
          const float factor = largest >= 0x1p-120f ? 127.0f / largest : 0.0f;
          const float scale = finite ? largest / (127.0f * 124.0f) : std::nanf("");
          for (int64_t k = k0; k < end;) {
            const int64_t block = (n * K + k) >> c_.blocksize_log2;
            int64_t products = 0;
            for (; k < end && (n * K + k) >> c_.blocksize_log2 == block; ++k) {
              const int64_t e = n * K + k;
              const uint8_t byte = nf4_values.packed[static_cast<size_t>(e / 2)];
              const float level = std::rint(124.0f * kNF4Code[e & 1 ? byte & 15 : byte >> 4]);
              const float value = finite ? std::rint(static_cast<float>(x[m * K + k]) * factor) : 0.0f;
              products += static_cast<int64_t>(value) * static_cast<int64_t>(level);
            }
            sum += static_cast<float>(products) * scale * nf4_values.absmax[static_cast<size_t>(block)];
          }
        }
        y.push_back(bias.present() ? sum + static_cast<float>(bias[n]) : sum);
      }
    }
    expected = Values(c_.dtype, y);
  }

  Case c_;
  int64_t M, K, N;
  Values x, bias, expected;
  NF4Weight nf4;
  NF4Values nf4_values;
};

}  // namespace

int main() {
  constexpr int64_t kTokens[] = {0, 1, 2, 3, 4, 5, 11, 12, 13, 25};
  constexpr int64_t kInFeatures[] = {1, 32, 33, 64, 96, 100, 192, 320, 577, 1024, 1088};
  constexpr int64_t kOutFeatures[] = {1, 3, 16, 33, 64, 67};
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  Random random(4);
  const auto pick = [&](const auto& from) { return from[random.below(static_cast<int64_t>(std::size(from)))]; };
  const auto log2 = [&] { return 5 + static_cast<int>(random.below(8)); };
  const auto check = [&](const Case& c) {
    const Problem problem(c, random);
    for (const Kernels* table : all_kernels()) problem.check(*table);
  };
  for (int i = 0; i < 150; ++i) {
    check({.tokens = pick(kTokens),
           .in_features = pick(kInFeatures),
           .out_features = pick(kOutFeatures),
           .dtype = pick(kDTypes),
           .blocksize_log2 = random.below(2) ? 5 + static_cast<int>(random.below(2)) : log2(),
           .nested_blocksize_log2 = log2(),
           .nested = random.below(2) != 0,
           .bias = random.below(2) != 0,
           .special = random.below(3) == 0});
  }
  // Wide enough that tokens come in several chunks: by panels, and row by row.
  for (const int64_t in_features : {int64_t{1} << 15, (int64_t{1} << 15) + 2}) {
    check({18, in_features, 2, DType::kFloat32, 6, 8, false, true, false});
  }
  return 0;
}
