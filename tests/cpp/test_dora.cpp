// dora_norm against sums in double: random shapes, dtypes and weights, some rows of which nearly cancel, on every
// instruction set and for several threads.
#include "common/nf4.h"

#include "testing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::testing;

namespace {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

void check(int64_t N, int64_t K, int64_t rank, DType dtype, bool quantised, Random& random) {
  const int blocksize_log2 = 5 + static_cast<int>(random.below(3));
  const bool nested = random.below(2) != 0;
  const double scaling = random.normal();
  const Values a(dtype, random.normals(rank * K)), b(dtype, random.normals(N * rank));
  std::vector<double> update(static_cast<size_t>(N * K));
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      double sum = 0.0;
      for (int64_t j = 0; j < rank; ++j) sum += b[n * rank + j] * a[j * K + k];
      update[static_cast<size_t>(n * K + k)] = scaling * sum;
    }
  }

  NF4Values nf4_values;
  NF4Weight nf4;
  Values dense;
  std::vector<double> weight(update.size());
  if (quantised) {
    nf4 = nf4_values.fill(N * K, blocksize_log2, nested, 5, random);
    for (int64_t e = 0; e < N * K; ++e) {
      const uint8_t byte = nf4_values.packed[static_cast<size_t>(e / 2)];
      const float scale = nf4_values.absmax[static_cast<size_t>(e >> blocksize_log2)];
      weight[static_cast<size_t>(e)] = kNF4Code[e & 1 ? byte & 15 : byte >> 4] * scale;
    }
  } else {  // every third row is what the update takes away, but for a thousandth
    std::vector<float> values = random.normals(N * K);
    for (int64_t e = 0; e < N * K; ++e) {
      if (e / K % 3 == 0) values[static_cast<size_t>(e)] = static_cast<float>(-0.999 * update[static_cast<size_t>(e)]);
    }
    dense = Values(dtype, values);
    for (int64_t e = 0; e < N * K; ++e) weight[static_cast<size_t>(e)] = dense[e];
  }

  std::vector<double> expected(static_cast<size_t>(N)), bound(expected.size());
  for (int64_t n = 0; n < N; ++n) {
    double sum = 0.0;
    for (int64_t e = n * K; e < (n + 1) * K; ++e) {
      const double v = weight[static_cast<size_t>(e)] + update[static_cast<size_t>(e)];
      sum += v * v;
    }
    expected[static_cast<size_t>(n)] = std::sqrt(sum);
    bound[static_cast<size_t>(n)] = 1e-6 * std::sqrt(sum);
  }

  for (const Kernels* table : all_kernels()) {
    Output first(DType::kFloat32, N);
    for (const ThreadPool pool : {threads<1>(), threads<3>()}) {
      Output norm(DType::kFloat32, N);
      DoraNorm p;
      p.in_features = K;
      p.out_features = N;
      p.rank = rank;
      p.nf4 = nf4;
      p.dense = dense.array();
      p.a = a.array();
      p.b = b.array();
      p.scaling = scaling;
      p.norm = static_cast<float*>(norm.array().data);
      table->dora_norm(p, pool);
      norm.check_close(table->name, expected, bound);
      CHECK(pool.threads == 1 || norm == first, "%s: results differ between 1 and 3 threads", table->name);
      first = norm;
    }
  }
}

}  // namespace

int main() {
  Random random(11);
  for (int i = 0; i < 60; ++i) {
    const int64_t N = 1 + random.below(60), rank = 1 + random.below(9);
    const int64_t K = i % 3 ? 32 * (1 + random.below(12)) : 1 + random.below(600);
    check(N, K, rank, kDTypes[i % 3], i % 2 == 0, random);
  }
  return 0;
}
