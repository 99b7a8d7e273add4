// R18: a long sequence under a weak decay. The largest bf16 below 1 is 0.996, so a decay of 0.99992 that is
// kept in bf16 is 1: nothing is forgotten any more except by overwriting.
#include "eval/claims.h"
#include "eval/memory_case.h"
#include "ops/kda/kda.h"

namespace kl {
namespace {

using namespace eval;

constexpr int64_t kLongTokens = 65536, kLongDim = 32;
constexpr double kAlpha = 0.99992;

// The state after the whole sequence; `alpha` in all channels of all tokens.
template <class F>
Values final_state(const MemoryCase& m, const Values& beta, double alpha, bool f64, F&& kda) {
  const MemoryTypes types{DType::f32, f64 ? DType::f64 : DType::f32, DType::f32};
  const OwnedTensor strength = to_tensor(DType::f32, {kLongTokens, 1}, beta);
  OwnedTensor g =
      to_tensor(f64 ? DType::f64 : DType::f32, {1, 1, kLongDim}, Values(kLongDim, std::log(alpha)));
  g.tensor.shape[0] = kLongTokens, g.tensor.stride[0] = 0;  // one row for all tokens
  return run<KdaArgs>(m, types,
                      [&](KdaArgs& args) {
                        args.g = g.tensor, args.gate.kind = KdaGateKind::log_decay,
                        args.beta = strength.tensor;
                        kda(args);
                      })
      .state;
}

}  // namespace

std::vector<Claim> long_run_claims(ThreadPool* pool) {
  Random random(18);
  MemoryCase m{.lengths = {kLongTokens}, .H = 1, .K = kLongDim, .V = kLongDim};
  m.q = normal_values(kLongTokens * kLongDim, random), m.k = normal_values(kLongTokens * kLongDim, random);
  m.v = normal_values(kLongTokens * kLongDim, random), m.state.resize(kLongDim * kLongDim);
  const Values beta = normal_values(kLongTokens, random);
  const auto steps = [&](const KdaArgs& args) {
    Ctx ctx{.pool = pool};
    kda_decode(ctx, args);
  };
  const auto chunks = [&](const KdaArgs& args) {
    Ctx ctx{.pool = pool};
    kda_prefill(ctx, args);
  };

  const Values exact = final_state(m, beta, kAlpha, true,
                                   [](const KdaArgs& args) { kda_recurrent_ref(args, KdaPrecision::f64); });
  const double in_f32 = relative_error(final_state(m, beta, kAlpha, false, steps), exact);
  const double in_chunks = relative_error(final_state(m, beta, kAlpha, false, chunks), exact);
  const double rounded_alpha = bf16(static_cast<float>(kAlpha));
  const double in_bf16 = relative_error(final_state(m, beta, rounded_alpha, false, steps), exact);
  const std::string run = "state after 65,536 tokens with a decay of 0.99992, ";
  return {
      {"R18", run + "gate in f32, token by token: error", in_f32, ClaimBound::at_most, 1e-5, ""},
      {"R18", run + "gate in f32, in chunks: error", in_chunks, ClaimBound::at_most, 1e-5, ""},
      {"R18", run + "gate in bf16: error over that of f32", in_bf16 / in_f32, ClaimBound::at_least, 100, ""}};
}

}  // namespace kl
