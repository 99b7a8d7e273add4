// Our product with weights beside oneDNN's, in turn in one process:
//
//   linear_onednn_bench [THREADS [M [N [K]]]]        out [M, N] = x [M, K] · w [N, K]ᵀ, default 1 512 4096
//   4096
//
// Ours reads the bf16 weights as a checkpoint stores them and f32 activations, which --precision bf16 rounds;
// oneDNN gets weights that are packed beforehand in its own layout: in f32, and in bf16 with activations that
// are bf16 already, where the processor multiplies these. Built where its library is: -DKL_ONEDNN=ON (with
// OpenMP, as Debian builds it).
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/check.h"
#include "ops/linear/linear.h"
#include "simd/isa.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

using dnnl::memory;

constexpr int kRounds = 15;

struct Shape {
  int64_t M, N, K;
};

// oneDNN's product of x and w in `type`, result in f32. Throws dnnl::error where the processor has none.
class OneDnnProduct {
 public:
  OneDnnProduct(const Shape& s, DType type, const Tensor& x, const Tensor& w, Tensor out)
      : engine_(dnnl::engine::kind::cpu, 0), stream_(engine_) {
    const auto dtype = type == DType::bf16 ? memory::data_type::bf16 : memory::data_type::f32;
    const memory::desc src({s.M, s.K}, dtype, memory::format_tag::ab);
    const memory::desc any({s.K, s.N}, dtype, memory::format_tag::any);
    const memory::desc dst({s.M, s.N}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc plan(dnnl::matmul::desc(src, any, dst), engine_);
    product_ = dnnl::matmul(plan);
    name_ = plan.impl_info_str();
    memory stored({{s.K, s.N}, dtype, memory::format_tag::ba}, engine_, w.data);
    memory packed(plan.weights_desc(), engine_);
    dnnl::reorder(stored, packed).execute(stream_, stored, packed);
    args_ = {{DNNL_ARG_SRC, memory(src, engine_, x.data)},
             {DNNL_ARG_WEIGHTS, packed},
             {DNNL_ARG_DST, memory(dst, engine_, out.data)}};
    stream_.wait();
  }
  void operator()() {
    product_.execute(stream_, args_);
    stream_.wait();
  }
  const std::string& name() const { return name_; }

 private:
  dnnl::engine engine_;
  dnnl::stream stream_;
  dnnl::matmul product_;
  std::unordered_map<int, memory> args_;
  std::string name_;
};

struct Candidate {
  std::string name;
  std::function<void()> run;
  OwnedTensor out;
  std::vector<double> seconds = {};
};

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

double relative_rms(const Tensor& a, const Tensor& b) {
  double difference = 0, sum = 0;
  for (int64_t i = 0; i < a.numel(); ++i) {
    const double x = a.ptr<float>()[i], y = b.ptr<float>()[i];
    difference += (x - y) * (x - y), sum += y * y;
  }
  return std::sqrt(difference / sum);
}

OwnedTensor converted(const Tensor& from, DType type) {
  OwnedTensor to = make_tensor(type, {from.size(0), from.size(1)});
  for (int64_t i = 0; i < from.numel(); ++i) {
    const float x = from.dtype == DType::f32 ? from.ptr<float>()[i] : static_cast<float>(from.ptr<bf16>()[i]);
    if (type == DType::f32)
      to.tensor.ptr<float>()[i] = x;
    else
      to.tensor.ptr<bf16>()[i] = bf16(x);
  }
  return to;
}

int run(int threads, const Shape& s) {
  omp_set_num_threads(threads);  // oneDNN's
  testing::Random random(1);
  const OwnedTensor x = testing::random_normal(DType::f32, {s.M, s.K}, random);
  const OwnedTensor w = testing::random_normal(DType::bf16, {s.N, s.K}, random, 0.02);
  const OwnedTensor x16 = converted(x.tensor, DType::bf16), w32 = converted(w.tensor, DType::f32);

  ThreadPool pool(threads);
  Arena scratch;
  Ctx ctx;
  ctx.pool = &pool, ctx.scratch = &scratch;
  std::vector<Candidate> all;
  const auto add = [&](std::string name) -> Candidate& {
    all.push_back({std::move(name), {}, make_tensor(DType::f32, {s.M, s.N})});
    return all.back();
  };
  const auto ours = [&](Precision precision) {
    Candidate& c = add(std::string("ours, activations ") + (precision == Precision::bf16 ? "bf16" : "f32"));
    c.run = [&, precision, out = c.out.tensor] {
      ctx.precision = precision;
      linear(ctx, {.x = x.tensor, .w = w.tensor, .out = out});
    };
  };
  const auto theirs = [&](DType type, const Tensor& activations, const Tensor& weights) {
    const char* bits = type == DType::bf16 ? "bf16" : "f32";
    OwnedTensor out = make_tensor(DType::f32, {s.M, s.N});
    try {
      auto product = std::make_shared<OneDnnProduct>(s, type, activations, weights, out.tensor);
      all.push_back({std::string("oneDNN, ") + bits + " (" + product->name() + ")",
                     [product] { (*product)(); }, std::move(out)});
    } catch (const dnnl::error& error) {
      std::printf("oneDNN, %s: %s\n", bits, error.what());
    }
  };
  ours(Precision::exact);
  theirs(DType::f32, x.tensor, w32.tensor);
  ours(Precision::bf16);
  theirs(DType::bf16, x16.tensor, w.tensor);

  for (int round = -2; round < kRounds; ++round)  // two to warm up
    for (Candidate& c : all) {
      // oneDNN's threads may spin for some time after their product, on the processors of ours.
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      const auto begin = std::chrono::steady_clock::now();
      c.run();
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
      if (round >= 0) c.seconds.push_back(taken.count());
    }
  const double flops = 2. * static_cast<double>(s.M) * static_cast<double>(s.N) * static_cast<double>(s.K);
  const dnnl_version_t* version = dnnl_version();
  std::printf("out [%lld, %lld], K %lld, %d threads, %s, oneDNN %d.%d.%d\n", static_cast<long long>(s.M),
              static_cast<long long>(s.N), static_cast<long long>(s.K), threads,
              std::string(name_of(active_isa())).c_str(), version->major, version->minor, version->patch);
  for (const Candidate& c : all)
    std::printf("%-52s %8.2f ms  %8.1f GFLOP/s   %.1e from ours in f32\n", c.name.c_str(),
                1e3 * median(c.seconds), 1e-9 * flops / median(c.seconds),
                relative_rms(c.out.tensor, all[0].out.tensor));
  return 0;
}

}  // namespace
}  // namespace kl

int main(int argc, char** argv) {
  const auto number = [&](int i, int64_t otherwise) { return argc > i ? std::atoll(argv[i]) : otherwise; };
  try {
    return kl::run(static_cast<int>(number(1, 1)), {number(2, 512), number(3, 4096), number(4, 4096)});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
