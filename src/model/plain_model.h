// The model once more, for tests: f64, one token after another, straight from the equations, sharing no
// operator and no loader logic with the engine. Slow.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "testing/compare.h"
#include "testing/tiny_checkpoint.h"

namespace kl::testing {

class PlainModel {
 public:
  using Vector = std::vector<double>;

  // With `noise`, every weight is off by a random part of about that size.
  PlainModel(const TinyModel& shape, const std::map<std::string, OwnedTensor>& tensors, double noise = 0,
             uint64_t seed = 1)
      : m_(shape) {
    Random random(seed);
    for (const auto& [name, t] : tensors) {
      Vector& values = values_[name] = to_doubles(t.tensor);
      if (noise > 0)
        for (double& x : values) x *= 1 + noise * random.normal();
    }
    layers_.resize(m_.layers.size());
  }

  // Logits after each of the tokens.
  Vector run(const std::vector<int32_t>& ids) {
    Vector rows;
    for (const int32_t id : ids) {
      const Vector row = step(id);
      rows.insert(rows.end(), row.begin(), row.end());
    }
    return rows;
  }

  // Logits after one more token.
  Vector step(int id) {
    const auto D = static_cast<size_t>(m_.hidden_size);
    const Vector& table = at("model.embed_tokens.weight");
    Vector h(table.begin() + static_cast<int64_t>(D) * id,
             table.begin() + static_cast<int64_t>(D) * (id + 1));
    for (size_t i = 0; i < layers_.size(); ++i) {
      const std::string layer = cat("model.layers.", i, ".");
      Vector x = norm(h, at(layer + "input_layernorm.weight"), 1e-5);
      add(h, m_.layers[i] == 'K' ? kda(layer + "self_attn.", layers_[i], x)
                                 : mla(layer + "self_attn.", layers_[i], x));
      x = norm(h, at(layer + "post_attention_layernorm.weight"), 1e-5);
      const std::string moe_prefix = layer + "block_sparse_moe.";
      add(h, m_.is_moe(static_cast<int>(i)) ? moe(moe_prefix, x)
                                            : mlp(m_.transformers_names ? moe_prefix : layer + "mlp.", x));
    }
    h = norm(h, at("model.norm.weight"), 1e-5);
    return multiply(at(m_.tie ? "model.embed_tokens.weight" : "lm_head.weight"), h);
  }

  // The closest decision of a router so far: score of the last one chosen less that of the first one passed
  // over, among groups or experts. Within rounding of 0 another implementation may rightly choose otherwise.
  double closest_choice() const { return closest_choice_; }

 private:
  struct LayerState {
    std::map<char, std::vector<Vector>> inputs;  // of the convolutions
    std::vector<std::vector<Vector>> S;          // [H][K][V]
    std::vector<Vector> latents;
  };

  const Vector& at(const std::string& name) const { return values_.at(name); }
  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static double silu(double x) { return x * sigmoid(x); }
  static void add(Vector& x, const Vector& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }
  static double dot(const double* a, const double* b, size_t n) {
    return std::inner_product(a, a + n, b, 0.0);
  }
  static Vector multiply(const Vector& w, const Vector& x) {
    Vector y(w.size() / x.size());
    for (size_t o = 0; o < y.size(); ++o) y[o] = dot(&w[o * x.size()], x.data(), x.size());
    return y;
  }
  Vector project(const std::string& name, const Vector& x) const { return multiply(at(name + ".weight"), x); }
  static Vector norm(const Vector& x, const Vector& weight, double eps) {
    const double r = 1 / std::sqrt(dot(x.data(), x.data(), x.size()) / static_cast<double>(x.size()) + eps);
    Vector y(x.size());
    for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] * r * weight[i];
    return y;
  }

  Vector convolved(const std::string& attn, LayerState& s, char which, const Vector& x) {
    std::vector<Vector>& past = s.inputs[which];
    past.push_back(project(attn + which + "_proj", x));
    const Vector& taps = at(attn + which + "_conv1d.weight");
    const int W = m_.conv, newest = static_cast<int>(past.size()) - 1;
    Vector y(past.back().size());
    for (size_t c = 0; c < y.size(); ++c) {
      for (int j = 0; j < W; ++j) {
        const int t = newest - (W - 1) + j;
        if (t >= 0)
          y[c] += taps[c * static_cast<size_t>(W) + static_cast<size_t>(j)] * past[static_cast<size_t>(t)][c];
      }
      y[c] = silu(y[c]);
    }
    return y;
  }

  Vector kda(const std::string& attn, LayerState& s, const Vector& x) {
    const size_t H = static_cast<size_t>(m_.kda_heads), K = static_cast<size_t>(m_.kda_head_dim);
    Vector q = convolved(attn, s, 'q', x), k = convolved(attn, s, 'k', x);
    const Vector v = convolved(attn, s, 'v', x);
    const Vector z = project(attn + "f_b_proj", project(attn + "f_a_proj", x));
    const Vector gate = project(attn + "g_b_proj", project(attn + "g_a_proj", x));
    const Vector beta = project(attn + "b_proj", x);
    s.S.resize(H, std::vector<Vector>(K, Vector(K)));
    Vector y(H * K);
    for (size_t h = 0; h < H; ++h) {
      for (Vector* p : {&q, &k}) {
        double* a = &(*p)[h * K];
        const double r = 1 / std::sqrt(dot(a, a, K) + 1e-6);
        for (size_t i = 0; i < K; ++i) a[i] *= r;
      }
      std::vector<Vector>& S = s.S[h];
      for (size_t i = 0; i < K; ++i) {
        const double decay = std::exp(-std::exp(at(attn + "A_log")[h]) *
                                      std::log1p(std::exp(z[h * K + i] + at(attn + "dt_bias")[h * K + i])));
        for (double& value : S[i]) value *= decay;
      }
      for (size_t j = 0; j < K; ++j) {
        double predicted = 0;
        for (size_t i = 0; i < K; ++i) predicted += S[i][j] * k[h * K + i];
        const double delta = sigmoid(beta[h]) * (v[h * K + j] - predicted);
        double o = 0;
        for (size_t i = 0; i < K; ++i) {
          S[i][j] += k[h * K + i] * delta;
          o += S[i][j] * q[h * K + i];
        }
        y[h * K + j] = o / std::sqrt(static_cast<double>(K));
      }
      const double r = 1 / std::sqrt(dot(&y[h * K], &y[h * K], K) / static_cast<double>(K) + 1e-5);
      for (size_t i = 0; i < K; ++i)
        y[h * K + i] *= r * at(attn + "o_norm.weight")[i] * sigmoid(gate[h * K + i]);
    }
    return project(attn + "o_proj", y);
  }

  Vector mla(const std::string& attn, LayerState& s, const Vector& x) {
    const size_t A = static_cast<size_t>(m_.mla_heads), R = static_cast<size_t>(m_.kv_lora_rank),
                 N = static_cast<size_t>(m_.nope), P = static_cast<size_t>(m_.rope),
                 V = static_cast<size_t>(m_.v_head_dim);
    const Vector q = project(attn + "q_proj", x);
    const Vector raw = project(attn + "kv_a_proj_with_mqa", x);
    Vector row = norm(Vector(raw.begin(), raw.begin() + static_cast<int64_t>(R)),
                      at(attn + "kv_a_layernorm.weight"), 1e-6);
    row.insert(row.end(), raw.begin() + static_cast<int64_t>(R), raw.end());
    s.latents.push_back(row);
    const Vector& kv_b = at(attn + "kv_b_proj.weight");
    Vector y(A * V);
    for (size_t a = 0; a < A; ++a) {
      const double* query = &q[a * (N + P)];
      const double* up = &kv_b[a * (N + V) * R];
      Vector p;
      double sum = 0;
      for (const Vector& c : s.latents) {
        double score = dot(query + N, &c[R], P);
        for (size_t i = 0; i < N; ++i) score += query[i] * dot(up + i * R, c.data(), R);
        p.push_back(std::exp(score / std::sqrt(static_cast<double>(N + P))));
        sum += p.back();
      }
      for (size_t j = 0; j < V; ++j) {
        for (size_t t = 0; t < p.size(); ++t)
          y[a * V + j] += p[t] / sum * dot(up + (N + j) * R, s.latents[t].data(), R);
      }
    }
    return project(attn + "o_proj", y);
  }

  Vector ffn(const Vector& gate, const Vector& up, const Vector& down, const Vector& x) const {
    Vector g = multiply(gate, x);
    const Vector u = multiply(up, x);
    for (size_t i = 0; i < g.size(); ++i) g[i] = silu(g[i]) * u[i];
    return multiply(down, g);
  }
  Vector mlp(const std::string& p, const Vector& x) const {
    return ffn(at(p + "gate_proj.weight"), at(p + "up_proj.weight"), at(p + "down_proj.weight"), x);
  }

  Vector moe(const std::string& prefix, const Vector& x) {
    const size_t E = static_cast<size_t>(m_.experts), G = static_cast<size_t>(m_.groups), per = E / G;
    Vector s = project(prefix + "gate", x);
    if (m_.router == "softmax") {
      double sum = 0;
      for (double& v : s) sum += v = std::exp(v);
      for (double& v : s) v /= sum;
    } else {
      for (double& v : s) v = sigmoid(v);
    }
    Vector choice = s;
    add(choice, at(prefix + "gate.e_score_correction_bias"));
    std::vector<std::pair<double, size_t>> groups;
    for (size_t g = 0; g < G; ++g) {
      Vector scores(choice.begin() + static_cast<int64_t>(g * per),
                    choice.begin() + static_cast<int64_t>((g + 1) * per));
      std::sort(scores.rbegin(), scores.rend());
      groups.push_back({-(scores[0] + (per > 1 ? scores[1] : 0)), g});
    }
    std::sort(groups.begin(), groups.end());
    note_choice(groups, static_cast<size_t>(m_.topk_group));
    std::vector<std::pair<double, size_t>> candidates;
    for (int g = 0; g < m_.topk_group; ++g) {
      for (size_t e = groups[static_cast<size_t>(g)].second * per, end = e + per; e < end; ++e)
        candidates.push_back({-choice[e], e});
    }
    std::sort(candidates.begin(), candidates.end());
    note_choice(candidates, static_cast<size_t>(m_.top_k));
    candidates.resize(static_cast<size_t>(m_.top_k));
    double sum = 0;
    for (const auto& [score, e] : candidates) sum += s[e];
    Vector y(x.size());
    for (const auto& [score, e] : candidates) {
      const std::string expert = cat(prefix, "experts.", e, ".");
      const Vector out = ffn(at(expert + "w1.weight"), at(expert + "w3.weight"), at(expert + "w2.weight"), x);
      const double weight = s[e] / (m_.renormalize ? sum : 1) * m_.scaling;
      for (size_t i = 0; i < y.size(); ++i) y[i] += weight * out[i];
    }
    if (m_.shared > 0) add(y, mlp(prefix + "shared_experts.", x));
    return y;
  }

  void note_choice(const std::vector<std::pair<double, size_t>>& sorted, size_t chosen) {
    if (chosen < sorted.size()) {
      closest_choice_ = std::min(closest_choice_, sorted[chosen].first - sorted[chosen - 1].first);
    }
  }

  double closest_choice_ = 1;
  TinyModel m_;
  std::map<std::string, Vector> values_;
  std::vector<LayerState> layers_;
};

}  // namespace kl::testing
