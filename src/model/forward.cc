// The forward pass in the order of the paper's figure: embedding; layers of token mixing (KDA or MLA) and
// channel mixing (MoE or dense), each behind a norm and added to the residual stream; final norm; head.
// Prefill and decode are the same text.
#include "model/forward.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "model/activations.h"
#include "ops/act/act.h"
#include "ops/conv/conv.h"
#include "ops/kda/kda.h"
#include "ops/linear/linear.h"
#include "ops/mla/mla.h"
#include "ops/moe/moe.h"
#include "ops/norm/norm.h"

namespace kl {

namespace {

// Up to this many new tokens a sequence, the step-by-step recurrence does less work than the chunkwise form.
constexpr int kRecurrentTokens = 8;

// Up to this many new tokens absorbed attention does less arithmetic than expanding the keys and values of
// the whole context: with n queries over c tokens, n · c · (2R - Nk - V) against c · R · (Nk + V)
// multiplications a head (170 queries at the 48B's sizes).
int64_t absorbed_tokens(const Config& c) {
  const int64_t expanded_width = c.qk_nope_head_dim + c.v_head_dim;
  const int64_t more = 2 * int64_t{c.kv_lora_rank} - expanded_width;
  return more > 0 ? c.kv_lora_rank * expanded_width / more : std::numeric_limits<int64_t>::max();
}

// Neighbouring sequences that take the same form of an operator. A sequence's form depends on its own number
// of tokens alone: company in the batch neither changes its bits nor makes it take the form that is slow for
// it.
struct Run {
  int64_t first, end;  // sequences
  int64_t row, last;   // their rows of the batch: [row, last)
  Tensor cu_seqlens;   // [end - first + 1] i32, from 0
  bool short_form;

  Tensor rows(const Tensor& t) const { return t.slice(0, row, last); }
  Tensor sequences(const Tensor& t) const { return t.slice(0, first, end); }
};

// Runs of the sequences with up to `most` new tokens and of those with more.
std::vector<Run> make_runs(Arena& arena, const Batch& batch, int64_t most) {
  std::vector<Run> runs;
  const auto row = [&](int64_t n) { return int64_t{batch.cu_seqlens[static_cast<size_t>(n)]}; };
  for (int64_t n = 0; n < batch.sequences(); ++n) {
    const bool short_form = row(n + 1) - row(n) <= most;
    if (runs.empty() || runs.back().short_form != short_form)
      runs.push_back({.first = n, .row = row(n), .short_form = short_form});
    runs.back().end = n + 1, runs.back().last = row(n + 1);
  }
  for (Run& run : runs) {
    run.cu_seqlens = arena.alloc(DType::i32, {run.end - run.first + 1});
    for (int64_t n = run.first; n <= run.end; ++n)
      *run.cu_seqlens.at<int32_t>(n - run.first) = static_cast<int32_t>(row(n) - run.row);
  }
  return runs;
}

struct Pass {  // what every layer of one pass shares
  Ctx& ctx;
  const Config& config;
  const Activations& a;
  State& state;
  std::vector<Run> kda_runs, mla_runs;
};

void embed(const Pass& p, const Tensor& table, const Batch& batch) {
  const int64_t D = p.config.hidden_size;
  dispatch_float(table.dtype, [&]<class T>() {
    for (int64_t t = 0; t < batch.tokens(); ++t) {
      const T* row = table.at<T>(batch.ids[static_cast<size_t>(t)]);
      std::copy(row, row + D, p.a.hidden.at<float>(t));
    }
  });
}

// h += W_o · gated_norm(KDA(conv(W_q x), conv(W_k x), conv(W_v x), gates of x))
void kda_layer(const Pass& p, const KdaWeights& w, int layer) {
  Ctx& ctx = p.ctx;
  const Activations& a = p.a;
  const Tensor& x = a.normed;
  const int64_t T = x.size(0), H = p.config.linear_attn_config.num_heads,
                K = p.config.linear_attn_config.head_dim, P = H * K;
  const Tensor projections[] = {w.q_proj, w.k_proj, w.v_proj}, taps[] = {w.q_conv1d, w.k_conv1d, w.v_conv1d};
  Tensor mixed[3];  // q, k, v after the convolution: [T, H, K], rows 3P apart
  for (int i = 0; i < 3; ++i) {
    const Tensor before = a.qkv.slice(1, i * P, (i + 1) * P), after = a.qkv_conv.slice(1, i * P, (i + 1) * P);
    linear(ctx, {.x = x, .w = projections[i], .out = before});
    short_conv(ctx, {.x = before,
                     .weight = taps[i],
                     .cu_seqlens = a.cu_seqlens,
                     .state = p.state.conv(layer)[i],
                     .slot = a.slots,
                     .out = after});
    mixed[i] = after;
    mixed[i].rank = 3;
    mixed[i].shape = {T, H, K};
    mixed[i].stride = {3 * P, K, 1};
  }
  linear(ctx, {.x = x, .w = w.f_a_proj, .out = a.f_a});
  linear(ctx, {.x = a.f_a, .w = w.f_b_proj, .out = a.f});
  linear(ctx, {.x = x, .w = w.b_proj, .out = a.beta});

  KdaArgs kda;
  kda.q = mixed[0], kda.k = mixed[1], kda.v = mixed[2];
  kda.g = a.f.view({T, H, K});
  kda.beta = a.beta;
  kda.out = a.o.view({T, H, K});
  kda.state = p.state.kda(layer);
  kda.gate = {.kind = KdaGateKind::softplus, .A_log = w.A_log, .dt_bias = w.dt_bias};
  for (const Run& run : p.kda_runs) {
    KdaArgs part = kda;
    part.q = run.rows(kda.q), part.k = run.rows(kda.k), part.v = run.rows(kda.v);
    part.g = run.rows(kda.g), part.beta = run.rows(kda.beta), part.out = run.rows(kda.out);
    part.cu_seqlens = run.cu_seqlens, part.slot = run.sequences(a.slots);
    run.short_form ? kda_decode(ctx, part) : kda_prefill(ctx, part);
  }

  linear(ctx, {.x = x, .w = w.g_a_proj, .out = a.g_a});
  linear(ctx, {.x = a.g_a, .w = w.g_b_proj, .out = a.g});
  rms_norm_gated(ctx, {.x = kda.out,
                       .gate = a.g.view({T, H, K}),
                       .weight = w.o_norm,
                       .out = kda.out,
                       .eps = p.config.rms_norm_eps});
  linear(ctx, {.x = a.o, .w = w.o_proj, .out = a.hidden, .accumulate = true});
}

// h += W_o · MLA(W_q x, [norm(c) | p] = W_kva x)
void mla_layer(const Pass& p, const MlaWeights& w, int layer) {
  Ctx& ctx = p.ctx;
  const Activations& a = p.a;
  const Config& c = p.config;
  const int64_t T = a.normed.size(0);
  linear(ctx, {.x = a.normed, .w = w.q_proj, .out = a.mla_q.view({T, -1})});
  linear(ctx, {.x = a.normed, .w = w.kv_a_proj_with_mqa, .out = a.latent});
  const Tensor latent = a.latent.slice(1, 0, c.kv_lora_rank);
  rms_norm(ctx, {.x = latent, .weight = w.kv_a_layernorm, .out = latent, .eps = c.kv_a_layernorm_eps});

  const MlaCache cache = {.rows = p.state.latent(layer), .page_table = a.page_table, .context = a.context};
  mla_append(ctx, {.latent = a.latent, .cu_seqlens = a.cu_seqlens, .cache = cache});
  const Tensor out = a.mla_o.view({T, c.num_attention_heads, c.v_head_dim});
  for (const Run& run : p.mla_runs) {
    const MlaArgs mla = {.q = run.rows(a.mla_q),
                         .kv_b_proj = w.kv_b_proj,
                         .cu_seqlens = run.cu_seqlens,
                         .cache = {.rows = cache.rows,
                                   .page_table = run.sequences(a.page_table),
                                   .context = run.sequences(a.context)},
                         .out = run.rows(out)};
    run.short_form ? mla_decode(ctx, mla) : mla_prefill(ctx, mla);
  }
  linear(ctx, {.x = a.mla_o, .w = w.o_proj, .out = a.hidden, .accumulate = true});
}

// h += W_down( silu(W_gate x) · W_up x )
void mlp_layer(const Pass& p, const MlpWeights& w) {
  const int64_t width = w.gate_proj.size(0);
  const Tensor gate = p.a.ffn_gate.slice(1, 0, width), up = p.a.ffn_up.slice(1, 0, width);
  linear(p.ctx, {.x = p.a.normed, .w = w.gate_proj, .out = gate});
  linear(p.ctx, {.x = p.a.normed, .w = w.up_proj, .out = up});
  silu_mul(p.ctx, {.gate = gate, .up = up, .out = gate});
  linear(p.ctx, {.x = gate, .w = w.down_proj, .out = p.a.hidden, .accumulate = true});
}

// h += sum of the chosen experts, weighted, + the shared expert
void moe_layer(const Pass& p, const MoeWeights& w) {
  const Config& c = p.config;
  const Activations& a = p.a;
  linear(p.ctx, {.x = a.normed, .w = w.gate, .out = a.router_logits});
  moe_route(p.ctx,
            {.logits = a.router_logits,
             .bias = w.e_score_correction_bias,
             .experts = a.experts,
             .weights = a.weights,
             .score = c.moe_router_activation_func == "softmax" ? MoeScore::softmax : MoeScore::sigmoid,
             .n_group = c.num_expert_group,
             .topk_group = c.topk_group,
             .renormalize = c.moe_renormalize,
             .scaling = c.routed_scaling_factor,
             .bias_in_weights = c.hf_compat_router});
  moe_experts(
      p.ctx,
      {.x = a.normed, .experts = a.experts, .weights = a.weights, .weights_of = w.experts, .out = a.hidden});
  if (c.num_shared_experts > 0) mlp_layer(p, w.shared_experts);
}

Tensor head(const Pass& p, const Weights& w, const Batch& batch, const ForwardOptions& options) {
  const Activations& a = p.a;
  const size_t row_bytes = static_cast<size_t>(p.config.hidden_size) * sizeof(float);
  const auto norm = [&](const Tensor& x, const Tensor& out) {
    rms_norm(p.ctx, {.x = x, .weight = w.norm, .out = out, .eps = p.config.rms_norm_eps});
  };
  if (options.on_hidden) {
    norm(a.hidden, a.normed);
    options.on_hidden(p.config.num_hidden_layers, a.normed);
  }
  for (size_t i = 0; i < batch.logit_rows.size(); ++i) {
    std::memcpy(a.logit_hidden.at<float>(i), a.hidden.at<float>(batch.logit_rows[i]), row_bytes);
  }
  norm(a.logit_hidden, a.logit_hidden);
  linear(p.ctx, {.x = a.logit_hidden, .w = w.lm_head, .out = a.logits});
  return a.logits;
}

void check_batch(const Batch& batch, const Config& c) {
  KL_CHECK(batch.cu_seqlens.size() == batch.slots.size() + 1 && batch.cu_seqlens.front() == 0 &&
               batch.cu_seqlens.back() == batch.tokens() &&
               std::is_sorted(batch.cu_seqlens.begin(), batch.cu_seqlens.end()),
           "batch: cu_seqlens does not divide ", batch.tokens(), " tokens among ", batch.slots.size(),
           " sequences");
  for (const int32_t id : batch.ids) {
    KL_CHECK(id >= 0 && id < c.vocab_size, "token id ", id, " is outside the vocabulary of ", c.vocab_size);
  }
  for (const int32_t row : batch.logit_rows) {
    KL_CHECK(row >= 0 && row < batch.tokens(), "batch: logits of row ", row, " of ", batch.tokens());
  }
  std::vector<int32_t> slots = batch.slots;
  std::sort(slots.begin(), slots.end());
  KL_CHECK(std::adjacent_find(slots.begin(), slots.end()) == slots.end(),
           "batch: two sequences share a slot");
}

}  // namespace

int64_t forward_bytes(const Config& c, int64_t tokens, int threads) {
  Batch batch;
  batch.add(0, std::vector<int32_t>(static_cast<size_t>(tokens)), Batch::Logits::last);
  State state(c, {.max_tokens = tokens});
  state.reserve(state.open(), tokens);
  Arena arena;  // of address space: nothing touches its pages
  make_activations(arena, c, batch, state);

  int64_t scratch = 0;
  const auto taken = [&](int64_t bytes) { scratch = std::max(scratch, bytes); };
  if (c.kda_layer_count() > 0) {
    const int64_t K = c.linear_attn_config.head_dim;
    taken(kda_scratch_bytes(K, K, threads));
  }
  if (c.mla_layer_count() > 0) {
    const MlaShape mla = {.A = c.num_attention_heads,
                          .Nk = c.qk_nope_head_dim,
                          .P = c.qk_rope_head_dim,
                          .R = c.kv_lora_rank,
                          .V = c.v_head_dim};
    taken(tokens > absorbed_tokens(c) ? mla_prefill_scratch_bytes(mla, tokens, threads)
                                      : mla_decode_scratch_bytes(mla, tokens, threads));
  }
  if (c.num_experts > 0)
    taken(moe_experts_scratch_bytes(tokens, c.num_experts_per_token, c.hidden_size, c.moe_intermediate_size));
  return static_cast<int64_t>(arena.used()) + scratch;
}

Tensor forward(Ctx& outer, const Model& model, const Batch& batch, State& state, Arena& arena,
               const ForwardOptions& options) {
  const Config& c = model.config;
  const Weights& w = model.weights;
  check_batch(batch, c);
  const auto length = [&](size_t n) { return batch.cu_seqlens[n + 1] - batch.cu_seqlens[n]; };
  for (size_t n = 0; n < batch.slots.size(); ++n) state.reserve(batch.slots[n], length(n));
  arena.reset();
  Ctx ctx = outer;
  ctx.scratch = &arena;
  const Activations a = make_activations(arena, c, batch, state);
  const Pass p = {ctx,
                  c,
                  a,
                  state,
                  make_runs(arena, batch, kRecurrentTokens),
                  make_runs(arena, batch, absorbed_tokens(c))};
  const auto norm = [&](const Tensor& weight) {
    rms_norm(ctx, {.x = a.hidden, .weight = weight, .out = a.normed, .eps = c.rms_norm_eps});
  };

  embed(p, w.embed_tokens, batch);
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    const LayerWeights& layer = w.layers[static_cast<size_t>(i)];
    if (options.on_hidden) options.on_hidden(i, a.hidden);
    norm(layer.input_layernorm);
    c.is_kda(i) ? kda_layer(p, layer.kda, i) : mla_layer(p, layer.mla, i);
    norm(layer.post_attention_layernorm);
    c.is_moe(i) ? moe_layer(p, layer.moe) : mlp_layer(p, layer.mlp);
    if (options.on_layer) options.on_layer(i + 1);
  }
  const Tensor logits = head(p, w, batch, options);
  for (size_t n = 0; n < batch.slots.size(); ++n) state.advance(batch.slots[n], length(n));
  return logits;
}

}  // namespace kl
