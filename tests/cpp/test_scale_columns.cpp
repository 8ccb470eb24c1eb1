// Scales and sums of an array's columns, against sums in double, over random shapes; and the same bits for one thread
// and for several, and whatever else is asked for.
#include "testing.h"

using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::testing;

namespace {

struct Results {
  Output scaled, sums, dots;
};

class Problem {
 public:
  Problem(int64_t rows, int64_t columns, DType dtype, DType scale_dtype, Random& random)
      : M(rows),
        N(columns),
        dtype_(dtype),
        v(dtype, random.normals(M * N)),
        z(dtype, random.normals(M * N)),
        scale(scale_dtype, random.normals(N)) {}

  void check(const Kernels& table) const {
    const Results all = run(table, threads<1>(), true, true, true), again = run(table, threads<3>(), true, true, true);
    CHECK(all.scaled == again.scaled && all.sums == again.sums && all.dots == again.dots,
          "%s: results differ between 1 and 3 threads", table.name);
    CHECK(run(table, threads<2>(), true, false, false).scaled == all.scaled, "%s: scaled alone", table.name);
    CHECK(run(table, threads<2>(), false, true, false).sums == all.sums, "%s: sums alone", table.name);
    CHECK(run(table, threads<2>(), false, false, true).dots == all.dots, "%s: dots alone", table.name);
    check_in_place(table, all.scaled);

    // Sums of M products in any order: Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1; the
    // factor 2 over 2^-24 covers the products' own rounding where there is no FMA.
    const double unit = static_cast<double>(M + 1) * 0x1p-23;
    std::vector<double> scaled, sums(static_cast<size_t>(N)), dots(sums.size()), sizes(sums.size()),
        dot_sizes(sums.size());
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        const size_t column = static_cast<size_t>(n);
        const double value = v[m * N + n], product = value * z[m * N + n];
        scaled.push_back(value * scale[n]);
        sums[column] += value;
        sizes[column] += std::fabs(value);
        dots[column] += product;
        dot_sizes[column] += std::fabs(product);
      }
    }
    for (size_t n = 0; n < sums.size(); ++n) sizes[n] *= unit, dot_sizes[n] *= unit;
    std::vector<double> rounded(scaled.size());  // the product in fp32, before it goes to its dtype
    for (size_t i = 0; i < scaled.size(); ++i) rounded[i] = 0x1p-24 * std::fabs(scaled[i]);
    all.scaled.check_close("scaled", scaled, rounded);
    all.sums.check_close("sums", sums, sizes);
    all.dots.check_close("dots", dots, dot_sizes);
  }

 private:
  ScaleColumns inputs() const {
    ScaleColumns p;
    p.rows = M;
    p.columns = N;
    p.v = v.array();
    p.scale = scale.array();
    p.z = z.array();
    return p;
  }

  Results run(const Kernels& table, ThreadPool pool, bool scaled, bool sums, bool dots) const {
    Results r{{dtype_, M * N}, {dtype_, N}, {DType::kFloat32, N}};
    ScaleColumns p = inputs();
    if (scaled) p.scaled = r.scaled.array();
    if (sums) p.sums = r.sums.array();
    if (dots) p.dots = r.dots.array();
    if (!scaled) p.scale = {};
    if (!dots) p.z = {};
    table.scale_columns(p, pool);
    return r;
  }

  void check_in_place(const Kernels& table, const Output& expected) const {
    Output both(dtype_, M * N), dots(DType::kFloat32, N);
    ScaleColumns p = inputs();
    p.v = both.hold(v);
    p.scaled = both.array();
    p.dots = dots.array();
    table.scale_columns(p, threads<2>());
    CHECK(both == expected, "%s: in place", table.name);
  }

  int64_t M, N;
  DType dtype_;
  Values v, z, scale;
};

}  // namespace

int main() {
  constexpr int64_t kRows[] = {0, 1, 5, 64, 127, 128, 300, 1100}, kColumns[] = {1, 3, 16, 33, 130, 4096, 4101};
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  Random random(7);
  for (const int64_t rows : kRows) {
    for (const int64_t columns : kColumns) {
      if (rows * columns > 1'500'000) continue;
      const DType dtype = kDTypes[random.below(3)];
      const Problem problem(rows, columns, dtype, random.below(2) == 0 ? dtype : DType::kFloat32, random);
      for (const Kernels* table : all_kernels()) problem.check(*table);
    }
  }
  return 0;
}
