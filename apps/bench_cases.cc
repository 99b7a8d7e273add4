#include "bench_cases.h"

#include <algorithm>
#include <cmath>

#include "base/counter_random.h"
#include "ops/conv/conv.h"
#include "ops/kda/kda.h"
#include "ops/kda/kda_sweeps.h"
#include "ops/linear/linear.h"
#include "ops/mla/mla.h"
#include "ops/norm/norm.h"

namespace kl::app {

namespace {

constexpr int64_t kPrompt = 512;    // tokens of a long call
constexpr int64_t kContext = 4096;  // of attention in generation
constexpr int kPageSize = 64;

class Maker {
 public:
  explicit Maker(const Model& model) : model_(model), config_(model.config) {
    for (const int64_t T : {int64_t{1}, int64_t{8}, kPrompt}) add_linears(T);
    for (const LayerWeights& layer : model.weights.layers) {
      if (!kda_ && layer.kda.A_log) kda_ = &layer.kda;
      if (!mla_ && layer.mla.kv_b_proj) mla_ = &layer.mla;
      if (!layer.moe.experts.empty()) moe_.push_back(&layer.moe);
    }
    if (kda_) add_kda();
    if (mla_) add_mla();
    if (!moe_.empty()) {
      for (const int64_t T : {int64_t{1}, int64_t{8}, kPrompt}) add_moe(T);
    }
    add_norm();
  }
  BenchCases take() { return {std::move(owned_), std::move(cases_)}; }

 private:
  Tensor zeros(DType dtype, std::initializer_list<int64_t> dims) {
    owned_.push_back(make_tensor(dtype, dims));
    return owned_.back().tensor;
  }
  Tensor random(std::initializer_list<int64_t> dims) {  // f32, -1 .. 1
    const Tensor t = zeros(DType::f32, dims);
    const CounterRandom numbers(1, owned_.size());
    for (int64_t i = 0; i < t.numel(); ++i)
      t.ptr<float>()[i] = static_cast<float>(2 * numbers.uniform(static_cast<uint64_t>(i)) - 1);
    return t;
  }
  Tensor i32(const std::vector<int32_t>& values) {
    const Tensor t = zeros(DType::i32, {static_cast<int64_t>(values.size())});
    std::copy(values.begin(), values.end(), t.ptr<int32_t>());
    return t;
  }
  // cu_seqlens of N sequences of T tokens; slots 0 .. N - 1.
  Tensor lengths(int64_t N, int64_t T) {
    std::vector<int32_t> cu;
    for (int64_t n = 0; n <= N; ++n) cu.push_back(static_cast<int32_t>(n * T));
    return i32(cu);
  }
  Tensor slots(int64_t N) {
    std::vector<int32_t> s;
    for (int64_t n = 0; n < N; ++n) s.push_back(static_cast<int32_t>(n));
    return i32(s);
  }

  // Every shape once, under the name of the first weight that has it, with all weights that do.
  void add_linears(int64_t T) {
    struct Shape {
      std::string name;
      std::vector<Tensor> weights;
    };
    std::vector<Shape> shapes;
    const auto take = [&](const char* name, const Tensor& w) {
      if (!w) return;
      const auto same = [&](const Shape& s) {
        const Tensor& x = s.weights[0];
        return x.size(0) == w.size(0) && x.size(1) == w.size(1) && x.dtype == w.dtype;
      };
      const auto it = std::find_if(shapes.begin(), shapes.end(), same);
      if (it == shapes.end()) {
        shapes.push_back({name, {w}});
      } else {
        it->weights.push_back(w);
      }
    };
    for (const LayerWeights& l : model_.weights.layers) {
      take("kda.q_proj", l.kda.q_proj), take("kda.k_proj", l.kda.k_proj), take("kda.v_proj", l.kda.v_proj);
      take("kda.f_a_proj", l.kda.f_a_proj), take("kda.f_b_proj", l.kda.f_b_proj);
      take("kda.g_a_proj", l.kda.g_a_proj), take("kda.g_b_proj", l.kda.g_b_proj);
      take("kda.b_proj", l.kda.b_proj), take("kda.o_proj", l.kda.o_proj);
      take("mla.q_proj", l.mla.q_proj), take("mla.kv_a_proj", l.mla.kv_a_proj_with_mqa);
      take("mla.o_proj", l.mla.o_proj);
      take("mlp.gate_proj", l.mlp.gate_proj), take("mlp.up_proj", l.mlp.up_proj);
      take("mlp.down_proj", l.mlp.down_proj);
      take("moe.gate", l.moe.gate);
      take("shared.gate_proj", l.moe.shared_experts.gate_proj);
      take("shared.down_proj", l.moe.shared_experts.down_proj);
    }
    if (T <= 8) take("lm_head", model_.weights.lm_head);  // a prompt needs one row of it
    for (Shape& s : shapes) {
      const int64_t out = s.weights[0].size(0), in = s.weights[0].size(1);
      const Tensor x = random({T, in}), y = zeros(DType::f32, {T, out});
      cases_.push_back({"linear " + s.name, cat("[", T, ", ", in, "] x [", out, ", ", in, "]"),
                        [x, y, weights = std::move(s.weights)](Ctx& ctx, int64_t call) {
                          const size_t i = static_cast<size_t>(call) % weights.size();
                          linear(ctx, {.x = x, .w = weights[i], .out = y});
                        }});
    }
  }

  void add_kda() {
    const int64_t H = config_.linear_attn_config.num_heads, K = config_.linear_attn_config.head_dim;
    const struct {
      int64_t N, T;
      bool decode;
    } sizes[] = {{1, 1024, false}, {1, 1, true}, {8, 1, true}};
    for (const auto& s : sizes) {
      const int64_t T = s.N * s.T;
      KdaArgs a;
      a.q = random({T, H, K}), a.k = random({T, H, K}), a.v = random({T, H, K}), a.g = random({T, H, K});
      a.beta = random({T, H}), a.cu_seqlens = lengths(s.N, s.T), a.out = zeros(DType::f32, {T, H, K});
      a.state = zeros(DType::f32, {s.N, H, K, K}), a.slot = slots(s.N);
      a.gate = {.kind = KdaGateKind::softplus, .A_log = kda_->A_log, .dt_bias = kda_->dt_bias};
      cases_.push_back(
          {s.decode ? "kda_decode" : "kda_prefill", cat(s.N, " x ", s.T, " tokens, ", H, " heads of ", K),
           [a, decode = s.decode](Ctx& ctx, int64_t) { decode ? kda_decode(ctx, a) : kda_prefill(ctx, a); }});
    }
    add_kda_yardstick(H, K);
    const int64_t P = H * K, W = config_.linear_attn_config.short_conv_kernel_size;
    for (const int64_t T : {int64_t{1}, kPrompt}) {
      const ShortConvArgs a = {.x = random({T, P}),
                               .weight = kda_->q_conv1d,
                               .cu_seqlens = lengths(1, T),
                               .state = zeros(DType::f32, {1, P, W - 1}),
                               .slot = slots(1),
                               .out = zeros(DType::f32, {T, P})};
      cases_.push_back({"short_conv", cat("[", T, ", ", P, "], ", W, " taps"),
                        [a](Ctx& ctx, int64_t) { short_conv(ctx, a); }});
    }
  }

  // The plain loop over tokens, with what it takes ready: normalised q and k, log-decays, strengths. Beside
  // it prefill with the same q, k and g (its beta is a logit).
  void add_kda_yardstick(int64_t H, int64_t K) {
    constexpr int64_t T = 1024;
    const std::string shape = cat("1 x ", T, " tokens, ", H, " heads of ", K, ", gates ready");
    const auto times = [](const Tensor& t, double factor, double offset) {
      for (int64_t i = 0; i < t.numel(); ++i)
        t.ptr<float>()[i] = static_cast<float>(factor * t.ptr<float>()[i] + offset);
      return t;
    };
    const double unit = std::sqrt(3. / static_cast<double>(K));  // of uniform values
    KdaArgs a;
    a.q = times(random({T, H, K}), unit, 0), a.k = times(random({T, H, K}), unit, 0);
    a.v = random({T, H, K}), a.g = times(random({T, H, K}), 0.5, -0.5), a.beta = random({T, H});
    a.cu_seqlens = lengths(1, T), a.slot = slots(1), a.out = zeros(DType::f32, {T, H, K});
    a.state = zeros(DType::f32, {1, H, K, K}), a.gate.kind = KdaGateKind::log_decay, a.l2norm = false;
    cases_.push_back({"kda_prefill", shape, [a](Ctx& ctx, int64_t) { kda_prefill(ctx, a); }});
    const Tensor strength = times(random({T, H}), 0.5, 0.5);
    const double states = static_cast<double>(T * H * K * K);
    cases_.push_back({"kda three-sweep loop (yardstick)", shape, [=](Ctx& ctx, int64_t) {
                        const TraceScope trace(ctx.trace, "kda_three_sweeps",
                                               static_cast<double>(5 * a.q.bytes()), 7 * states);
                        parallel_for(ctx.pool, H, 1, [&](int64_t h, int64_t) {
                          const auto rows = [h](const Tensor& t) {
                            return KdaSweeps::Rows{t.ptr<float>() + h * t.stride[1], t.stride[0]};
                          };
                          KL_ACTIVE_ISA(kda_three_sweeps)
                          ({.q = rows(a.q),
                            .k = rows(a.k),
                            .g = rows(a.g),
                            .v = rows(a.v),
                            .out = rows(a.out),
                            .beta = rows(strength),
                            .T = T,
                            .K = K,
                            .V = K,
                            .state = a.state.at<float>(0, h)});
                        });
                      }});
  }

  void add_mla() {
    const int64_t A = config_.num_attention_heads;
    const struct {
      int64_t N, T, context;
      bool decode;
    } sizes[] = {{1, kPrompt, 0, false},
                 {1, kPrompt, kContext, false},
                 {1, 1, kContext, true},
                 {8, 1, kContext, true}};
    for (const auto& s : sizes) {
      const int64_t T = s.N * s.T, pages = (s.context + s.T + kPageSize - 1) / kPageSize;
      const Tensor table = zeros(DType::i32, {s.N, pages});
      for (int64_t i = 0; i < s.N * pages; ++i) table.ptr<int32_t>()[i] = static_cast<int32_t>(i);
      const MlaArgs a = {.q = random({T, A, config_.qk_head_dim()}),
                         .kv_b_proj = mla_->kv_b_proj,
                         .cu_seqlens = lengths(s.N, s.T),
                         .cache = {.rows = random({s.N * pages, kPageSize, config_.latent_dim()}),
                                   .page_table = table,
                                   .context = i32(std::vector<int32_t>(static_cast<size_t>(s.N),
                                                                       static_cast<int32_t>(s.context)))},
                         .out = zeros(DType::f32, {T, A, config_.v_head_dim})};
      cases_.push_back(
          {s.decode ? "mla_decode" : "mla_prefill",
           cat(s.N, " x ", s.T, " tokens behind ", s.context, ", ", A, " heads"),
           [a, decode = s.decode](Ctx& ctx, int64_t) { decode ? mla_decode(ctx, a) : mla_prefill(ctx, a); }});
    }
  }

  void add_moe(int64_t T) {
    const int64_t D = config_.hidden_size, E = config_.num_experts, top_k = config_.num_experts_per_token;
    const MoeRouteArgs route = {.logits = random({T, E}),
                                .experts = zeros(DType::i32, {T, top_k}),
                                .weights = zeros(DType::f32, {T, top_k})};
    cases_.push_back({"moe_route", cat(T, " tokens, ", top_k, " of ", E),
                      [route](Ctx& ctx, int64_t) { moe_route(ctx, route); }});
    Ctx here;
    moe_route(here, route);
    MoeExpertsArgs experts = {.x = random({T, D}),
                              .experts = route.experts,
                              .weights = route.weights,
                              .out = zeros(DType::f32, {T, D})};
    cases_.push_back(
        {"moe_experts",
         cat(T, " tokens, ", top_k, " of ", E, " x [", config_.moe_intermediate_size, ", ", D, "]"),
         [experts, layers = moe_](Ctx& ctx, int64_t call) {
           MoeExpertsArgs a = experts;
           a.weights_of = layers[static_cast<size_t>(call) % layers.size()]->experts;
           moe_experts(ctx, a);
         }});
  }

  void add_norm() {
    const int64_t D = config_.hidden_size;
    const RmsNormArgs a = {
        .x = random({kPrompt, D}), .weight = model_.weights.norm, .out = zeros(DType::f32, {kPrompt, D})};
    cases_.push_back(
        {"rms_norm", cat("[", kPrompt, ", ", D, "]"), [a](Ctx& ctx, int64_t) { rms_norm(ctx, a); }});
  }

  const Model& model_;
  const Config& config_;
  const KdaWeights* kda_ = nullptr;
  const MlaWeights* mla_ = nullptr;
  std::vector<const MoeWeights*> moe_;
  std::vector<OwnedTensor> owned_;
  std::vector<BenchCase> cases_;
};

}  // namespace

BenchCases make_bench_cases(const Model& model) { return Maker(model).take(); }

}  // namespace kl::app
