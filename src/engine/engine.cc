#include "engine/engine.h"

#include <algorithm>

#include "model/session_file.h"

namespace kl {

namespace {

constexpr int64_t kDefaultContext = 32768;

EngineOptions with_defaults(EngineOptions options, const Config& c) {
  if (options.threads <= 0) options.threads = available_processors();
  if (options.context <= 0) {
    options.context =
        c.model_max_length > 0 ? std::min(c.model_max_length, kDefaultContext) : kDefaultContext;
  }
  KL_CHECK(options.prefill_chunk >= 1, "prefill chunk: expected at least 1 token, found ",
           options.prefill_chunk);
  return options;
}

}  // namespace

Engine::Engine(Model model, const EngineOptions& options)
    : Engine(std::make_shared<const Model>(std::move(model)), options) {}

Engine::Engine(std::shared_ptr<const Model> model, const EngineOptions& options)
    : model_(std::move(model)),
      options_(with_defaults(options, model_->config)),
      pool_(options_.threads, options_.pin),
      state_(model_->config, {.slots = options_.sessions,
                              .max_tokens = options_.context,
                              .latent_dtype = options_.latent_dtype}) {}

void Engine::step(std::span<const Feed> feeds, const ForwardOptions& forward_options) {
  Batch batch;
  for (const Feed& feed : feeds) {
    Session& s = *feed.session;
    KL_CHECK(&s.engine_ == this, "engine: a session of another engine");
    KL_CHECK(!feed.ids.empty(), "engine: no tokens for a session");
    KL_CHECK(static_cast<int64_t>(feed.ids.size()) <= s.room(), "context is full: ", s.tokens_.size(),
             " tokens and ", feed.ids.size(), " more do not fit ", context(), " (choose a larger context)");
    batch.add(s.slot_, feed.ids, Batch::Logits::last);
  }
  if (feeds.empty()) return;
  const PinnedCaller pinned(pool_);
  Ctx ctx;
  ctx.pool = &pool_;
  ctx.precision = options_.precision;
  const Tensor logits = forward(ctx, *model_, batch, state_, arena_, forward_options);
  for (size_t n = 0; n < feeds.size(); ++n) {
    Session& s = *feeds[n].session;
    const float* row = logits.at<float>(n);
    s.logits_.assign(row, row + logits.size(1));
    s.tokens_.insert(s.tokens_.end(), feeds[n].ids.begin(), feeds[n].ids.end());
  }
}

Session::Session(Engine& engine) : engine_(engine), slot_(engine.state_.open()) {}
Session::~Session() { engine_.state_.close(slot_); }

void Session::feed(std::span<const int32_t> ids, const std::function<void(Progress)>& on_progress,
                   const std::atomic<bool>* stop) {
  const auto total = static_cast<int64_t>(ids.size());
  KL_CHECK(total <= room(), "context is full: ", tokens_.size(), " tokens and ", total, " more do not fit ",
           engine_.context(), " (choose a larger context)");
  for (int64_t done = 0; done < total;) {
    if (stop && stop->load()) return;
    const int64_t n = std::min<int64_t>(total - done, engine_.options_.prefill_chunk);
    ForwardOptions options;
    if (on_progress) {
      const double layers = engine_.model().config.num_hidden_layers;
      options.on_layer = [&on_progress, done, n, total, layers](int layer) {
        on_progress({static_cast<double>(done) + static_cast<double>(n) * layer / layers, total});
      };
    }
    const Feed chunk = {this, ids.subspan(static_cast<size_t>(done), static_cast<size_t>(n))};
    engine_.step({&chunk, 1}, options);
    done += n;
  }
}

void Session::reset() {
  engine_.state_.reset(slot_);
  tokens_.clear();
  logits_.clear();
}

void Session::copy_from(const Session& other) {
  KL_CHECK(&engine_ == &other.engine_, "session: cannot copy from a session of another engine");
  engine_.state_.copy(other.slot_, slot_);
  tokens_ = other.tokens_;
  logits_ = other.logits_;
}

int64_t Session::room() const { return engine_.context() - static_cast<int64_t>(tokens_.size()); }

StateBytes Session::bytes() const { return engine_.state_.bytes(slot_); }

void Session::save(const std::string& path, uint64_t draws) const {
  write_session_file(path, engine_.model(), engine_.state_, slot_, tokens_, logits_, draws);
}

uint64_t Session::restore(const std::string& path) {
  SavedSequence saved = read_session_file(path, engine_.model(), engine_.state_, slot_);
  tokens_ = std::move(saved.tokens);
  logits_ = std::move(saved.logits);
  return saved.draws;
}

GenerateResult generate(Session& session, Sampler& sampler, const GenerateOptions& options,
                        const std::function<void(int32_t)>& on_token) {
  KL_CHECK(!session.logits().empty(), "generate: the session is empty; feed it at least one token first");
  GenerateResult result;
  while (options.max_tokens < 0 || static_cast<int64_t>(result.ids.size()) < options.max_tokens) {
    if (options.stop && options.stop->load()) {
      result.finish = Finish::cancelled;
      break;
    }
    if (!result.ids.empty()) {
      if (session.room() == 0) break;  // Finish::length
      session.feed({&result.ids.back(), 1});
    }
    const int32_t id = sampler.sample(session.logits());
    if (std::find(options.stop_ids.begin(), options.stop_ids.end(), id) != options.stop_ids.end()) {
      result.stop_id = id;
      result.finish = Finish::stop;
      break;
    }
    sampler.see(id);
    result.ids.push_back(id);
    on_token(id);
  }
  return result;
}

}  // namespace kl
