// The door to the engine: a loaded model, and sessions, each one mutable timeline of tokens. Speaks token ids
// only.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/forward.h"
#include "ops/sample/sample.h"

namespace kl {

struct EngineOptions {
  int threads = 0;          // 0: every processor this process may run on
  int64_t context = 0;      // tokens of one session; 0: what the model was made for, at most 32768
  int sessions = 1;         // that can be open at once
  int prefill_chunk = 512;  // tokens of a prompt that go through the model at a time
  DType latent_dtype = DType::f32;
  Precision precision = Precision::exact;  // of products with weights (base/context.h)
  bool pin = false;  // a processor of its own for each thread, while a step runs also for the caller
};

class Session;

// New tokens of one session.
struct Feed {
  Session* session;
  std::span<const int32_t> ids;
};

// A model and everything its sessions share. One forward pass at a time.
class Engine {
 public:
  Engine(Model model, const EngineOptions&);
  // Several engines over the same weights.
  Engine(std::shared_ptr<const Model> model, const EngineOptions&);

  // One forward pass over different sessions of this engine, at least one token each; afterwards the logits
  // of each session are those after its last token. Throws kl::Error, changing nothing, if one does not fit.
  void step(std::span<const Feed>, const ForwardOptions& = {});

  const Model& model() const { return *model_; }
  const EngineOptions& options() const { return options_; }  // with the defaults filled in
  int64_t context() const { return options_.context; }
  size_t activation_bytes() const { return arena_.peak(); }

 private:
  friend class Session;
  std::shared_ptr<const Model> model_;
  EngineOptions options_;
  ThreadPool pool_;
  Arena arena_;
  State state_;
};

// One sequence: the tokens that have been through the model and the logits after the last of them. The state
// cannot be rewound; to go back, reset() or copy a session beforehand.
class Session {
 public:
  explicit Session(Engine&);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  struct Progress {
    double done;    // tokens of this call; a chunk counts layer by layer
    int64_t total;  // tokens of this call
  };
  // Feeds tokens; afterwards logits() are those after the last one. Calls `on_progress` after every layer.
  // Looks at `stop` between chunks: when it is set, returns early (tokens() says how far it came). Throws
  // kl::Error if they do not fit the context.
  void feed(std::span<const int32_t> ids, const std::function<void(Progress)>& on_progress = {},
            const std::atomic<bool>* stop = nullptr);
  std::span<const float> logits() const { return logits_; }  // [vocab]; empty before the first token
  const std::vector<int32_t>& tokens() const { return tokens_; }

  int64_t room() const;  // tokens that still fit the context

  void reset();
  void copy_from(const Session& other);  // of the same engine
  StateBytes bytes() const;

  // A session file (model/session_file.h). `draws` is Sampler::draws() of who chose the tokens; restore()
  // gives it back. Both throw kl::Error; a session that cannot be restored stays what it was.
  void save(const std::string& path, uint64_t draws = 0) const;
  uint64_t restore(const std::string& path);

 private:
  friend class Engine;
  Engine& engine_;
  int slot_;
  std::vector<int32_t> tokens_;
  std::vector<float> logits_;
};

enum class Finish { stop, length, cancelled };

struct GenerateResult {
  std::vector<int32_t> ids;  // without the stop token
  int32_t stop_id = -1;      // the token that ended the answer, if Finish::stop
  Finish finish = Finish::length;
};

struct GenerateOptions {
  int64_t max_tokens = -1;        // < 0: as many as the context holds
  std::vector<int32_t> stop_ids;  // tokens that end the answer
  const std::atomic<bool>* stop = nullptr;
};

// Samples from the session's logits and feeds each token back. `on_token` gets every token but the stop token
// as it is chosen; the last token of the answer is not fed. The session must have logits.
GenerateResult generate(Session&, Sampler&, const GenerateOptions&,
                        const std::function<void(int32_t)>& on_token);

}  // namespace kl
