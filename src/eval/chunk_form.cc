// R1: the chunkwise form of KDA beside the f64 recurrence.
#include <algorithm>

#include "eval/claims.h"
#include "eval/memory_case.h"
#include "ops/kda/kda.h"

namespace kl {
namespace {

using namespace eval;

struct Gate {
  const char* name;
  KdaGateKind kind;
  double low, high;  // raw values are uniform between
};
// The last is a softplus down to -20 a step, beyond what a factored form of one chunk can hold.
constexpr Gate kGates[] = {{"0", KdaGateKind::log_decay, 0, 0},
                           {"-5", KdaGateKind::log_decay, -5, -5},
                           {"-5 to 0", KdaGateKind::log_decay, -5, 0},
                           {"softplus", KdaGateKind::softplus, -5, 20}};
constexpr double kCorrelations[] = {0, 0.6, 0.9};

struct Problem {
  MemoryCase memory;
  KdaGateKind gate;
  Values g, beta;  // [T, H, K], [T, H]
};

// Every pair of keys of a head has this cosine, on average.
Values correlated_keys(int64_t T, int64_t row, double correlation, Random& random) {
  const Values common = normal_values(row, random);
  Values keys = normal_values(T * row, random);
  for (size_t i = 0; i < keys.size(); ++i)
    keys[i] = std::sqrt(correlation) * common[i % common.size()] + std::sqrt(1 - correlation) * keys[i];
  return keys;
}

Problem make_problem(const Gate& gate, double correlation, uint64_t seed) {
  Random random(seed);
  Problem p{.memory = {.lengths = {200, 0, 17, 64, 1}, .H = 2, .K = 64, .V = 64}, .gate = gate.kind};
  MemoryCase& m = p.memory;
  const int64_t T = m.tokens();
  m.q = normal_values(T * m.H * m.K, random);
  m.k = correlated_keys(T, m.H * m.K, correlation, random);
  m.v = normal_values(T * m.H * m.V, random);
  m.state = normal_values(m.sequences() * m.H * m.K * m.V, random);
  p.g.resize(m.q.size());
  for (double& g : p.g) g = random.uniform(gate.low, gate.high);
  p.beta = normal_values(T * m.H, random);
  return p;
}

template <class F>
MemoryResult run_kda(const Problem& p, const MemoryTypes& types, F&& kda) {
  const MemoryCase& m = p.memory;
  const OwnedTensor g = to_tensor(types.inputs, {m.tokens(), m.H, m.K}, p.g),
                    beta = to_tensor(types.inputs, {m.tokens(), m.H}, p.beta);
  return run<KdaArgs>(m, types, [&](KdaArgs& args) {
    args.g = g.tensor, args.beta = beta.tensor, args.gate.kind = p.gate;
    kda(args);
  });
}

// Inputs of `type`, everything else in f64.
MemoryResult definition(const Problem& p, DType type) {
  return run_kda(p, {type, DType::f64, DType::f64},
                 [](const KdaArgs& args) { kda_recurrent_ref(args, KdaPrecision::f64); });
}
MemoryResult prefill(const Problem& p, DType type, ThreadPool* pool) {
  return run_kda(p, {type, DType::f32, type}, [&](const KdaArgs& args) {
    Ctx ctx{.pool = pool};
    kda_prefill(ctx, args);
  });
}
MemoryResult decode(const Problem& p, ThreadPool* pool) {
  return run_kda(p, kAllF32, [&](const KdaArgs& args) {
    Ctx ctx{.pool = pool};
    kda_decode(ctx, args);
  });
}

double error(const MemoryResult& x, const MemoryResult& exact) {
  return std::max(relative_error(x.out, exact.out), relative_error(x.state, exact.state));
}

// How far a bf16 output is off, over how far the exact result is off when it is merely stored as bf16.
double over_rounding_floor(const Values& out, const Values& exact) {
  Values rounded = exact;
  for (double& x : rounded) x = bf16(static_cast<float>(x));
  return std::sqrt(squared_distance(out, exact) / squared_distance(rounded, exact));
}

int64_t not_finite(const MemoryResult& r) {
  const Values all = joined(r);
  return std::count_if(all.begin(), all.end(), [](double x) { return !std::isfinite(x); });
}

// Outputs of the first 150 tokens that differ, in any bit, when all later tokens of the sequence are others.
int64_t changed_past(const Problem& p, const MemoryResult& before, ThreadPool* pool) {
  constexpr int64_t kPast = 150;
  Problem other = p;
  Random random(99);
  const MemoryCase& m = p.memory;
  for (Values* rows : {&other.memory.q, &other.memory.k, &other.memory.v})
    for (int64_t i = kPast * m.H * m.K; i < m.lengths[0] * m.H * m.K; ++i)
      (*rows)[static_cast<size_t>(i)] += 10 * random.normal();
  const MemoryResult after = prefill(other, DType::f32, pool);
  int64_t changed = 0;
  for (size_t i = 0; i < static_cast<size_t>(kPast * m.H * m.V); ++i)
    changed += before.out[i] != after.out[i];
  return changed;
}

// std::max that keeps a NaN.
void raise(double& worst, double x) {
  if (!(x <= worst)) worst = x;
}

}  // namespace

std::vector<Claim> chunk_form_claims(ThreadPool* pool) {
  double chunk = 0, steps = 0, bf16_floor = 0;
  int64_t bad = 0, past = 0;
  uint64_t seed = 1;
  for (const Gate& gate : kGates)
    for (const double correlation : kCorrelations) {
      const Problem p = make_problem(gate, correlation, seed++);
      const MemoryResult exact = definition(p, DType::f32), found = prefill(p, DType::f32, pool);
      raise(chunk, error(found, exact));
      raise(steps, error(decode(p, pool), exact));
      const MemoryResult in_bf16 = prefill(p, DType::bf16, pool);
      raise(bf16_floor, over_rounding_floor(in_bf16.out, definition(p, DType::bf16).out));
      bad += not_finite(found) + not_finite(in_bf16);
      past += changed_past(p, found, pool);
    }
  const std::string grid = ", worst of 4 gates and 3 key correlations";
  return {
      {"R1", "KDA in chunks of 64, f32: error beside the f64 recurrence" + grid, chunk, ClaimBound::at_most,
       1e-5, "the two forms are equal"},
      {"R1", "KDA token by token, f32: error beside the f64 recurrence" + grid, steps, ClaimBound::at_most,
       1e-5, ""},
      {"R1", "KDA in chunks of 64, bf16: error over that of rounding the output" + grid, bf16_floor,
       ClaimBound::at_most, 1.5, ""},
      {"R1", "results that are not finite", static_cast<double>(bad), ClaimBound::at_most, 0, ""},
      {"R1", "outputs that a changed future changed", static_cast<double>(past), ClaimBound::at_most, 0, ""}};
}

}  // namespace kl
