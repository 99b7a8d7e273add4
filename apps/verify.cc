// kimi-linear verify: the engine's promises, tried on the user's own checkpoint.
//
//   warm = cold       memory that was used before and a copied prefix: the same bits as a fresh start
//   chunked = whole   a prompt in pieces: the same up to rounding (short pieces take another algorithm)
//   batched = alone   sequences computed together: the same bits as each by itself
//   saved = kept      a session written to disk and read by another engine: the same bits
//   threads = one     any number of threads: the same bits
//   rounded = exact   with --precision bf16: what rounding the activations costs
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "commands.h"
#include "load.h"
#include "sample_text.h"
#include "terminal.h"

namespace kl::app {

namespace {

using Ids = std::span<const int32_t>;
using Rows = std::vector<std::vector<float>>;  // logits after a prompt and after each token behind it

// Logits of the shipped model move by 2e-3 to 4e-2 where activations are rounded to bf16, half of them by
// less than 4e-3; the perplexity moves by 2e-4 of itself.
constexpr double kRoundedTolerance = 3e-2;

void add_row(Rows& rows, const Session& session) {
  rows.emplace_back(session.logits().begin(), session.logits().end());
}

struct Difference {
  bool identical = true;
  double median = 0, worst = 0;  // of the rows: root mean square of the difference over that of the logits
};

Difference compare(const Rows& a, const Rows& b) {
  KL_CHECK(a.size() == b.size(), "verify: ", a.size(), " rows against ", b.size());
  Difference d;
  std::vector<double> rows;
  for (size_t i = 0; i < a.size(); ++i) {
    double error = 0, norm = 0;
    for (size_t j = 0; j < a[i].size(); ++j) {
      const double x = a[i][j], y = b[i][j];
      error += (x - y) * (x - y), norm += y * y;
    }
    const bool same = a[i] == b[i];  // not so if a value is not a number
    d.identical &= same;
    rows.push_back(same ? 0 : norm > 0 ? std::sqrt(error / norm) : HUGE_VAL);
    if (std::isnan(rows.back())) rows.back() = HUGE_VAL;
  }
  std::sort(rows.begin(), rows.end());
  d.median = rows[rows.size() / 2], d.worst = rows.back();
  return d;
}

class Verification {
 public:
  Verification(const VerifyOptions& options, std::shared_ptr<const Model> model, Ids prompt, Ids rest)
      : options_(options), model_(std::move(model)), prompt_(prompt), rest_(rest) {
    base_ = engine_options(options.model);
    base_.context = static_cast<int64_t>(prompt.size() + rest.size());
  }

  // Runs a check that feeds `prompts` times the prompt and `rests` times the tokens after it, about.
  Difference run(Difference (Verification::*check)(), const char* name, double prompts, double rests) {
    Progress progress(name, "tokens");
    progress_ = &progress, done_ = 0;
    total_ = prompts * static_cast<double>(prompt_.size()) + rests * static_cast<double>(rest_.size());
    return (this->*check)();
  }

  Difference warm_and_cold() {
    const size_t half = prompt_.size() / 2;
    Engine cold = engine(), warm = engine([](EngineOptions&o) { o.sessions = 2; });
    Rows expected, found;
    {
      Session session(cold);
      feed(session, prompt_.first(half));
      feed(session, prompt_.subspan(half));
      follow(session, expected);
    }
    const std::vector<int32_t> other(prompt_.rbegin(), prompt_.rend());
    Session prefix(warm), session(warm);
    feed(prefix, other), feed(session, other);
    prefix.reset();
    feed(prefix, prompt_.first(half));
    session.copy_from(prefix);
    feed(prefix, prompt_.first(1));  // the copy does not notice
    feed(session, prompt_.subspan(half));
    follow(session, found);
    return compare(found, expected);
  }

  Difference chunked_and_whole() {
    const auto length = static_cast<int>(prompt_.size());
    Rows expected, found, whole;
    {
      Engine e = engine([&](EngineOptions& o) { o.prefill_chunk = length; });
      Session session(e);
      feed(session, prompt_);
      follow(session, whole);
    }
    for (const int chunk : {7, 61, length / 2 + 1}) {
      Engine e = engine([&](EngineOptions& o) { o.prefill_chunk = chunk; });
      Session session(e);
      feed(session, prompt_);
      follow(session, found);
      expected.insert(expected.end(), whole.begin(), whole.end());
    }
    return compare(found, expected);
  }

  Difference batched_and_alone() {
    // Prompts of different lengths, each past what would change its algorithm.
    const std::vector<Ids> prompts = {prompt_, prompt_.first(prompt_.size() / 2), prompt_.subspan(1),
                                      prompt_.last(prompt_.size() / 3 + 9)};
    Rows expected, found;
    Engine together = engine([&](EngineOptions&o) { o.sessions = static_cast<int>(prompts.size()); }),
           alone = engine([&](EngineOptions&o) { o.prefill_chunk = static_cast<int>(prompt_.size()); });
    std::vector<std::unique_ptr<Session>> sessions;
    std::vector<Feed> feeds;
    for (const Ids ids : prompts) {
      sessions.push_back(std::make_unique<Session>(together));
      feeds.push_back({sessions.back().get(), ids});
    }
    for (size_t i = 0; i <= rest_.size(); ++i) {
      together.step(feeds);
      for (Feed& f : feeds) {
        count(f.ids.size());
        add_row(found, *f.session);
        if (i < rest_.size()) f.ids = rest_.subspan(i, 1);
      }
    }
    Rows one;
    for (const Ids ids : prompts) {
      Session session(alone);
      feed(session, ids);
      follow(session, one);
    }
    for (size_t i = 0; i <= rest_.size(); ++i) {  // the order of the batch: step by step
      for (size_t n = 0; n < prompts.size(); ++n) expected.push_back(one[n * (rest_.size() + 1) + i]);
    }
    return compare(found, expected);
  }

  Difference saved_and_kept() {
    std::string path = (std::filesystem::temp_directory_path() / "kimi-linear-verify-XXXXXX").string();
    const int fd = mkstemp(path.data());
    KL_CHECK(fd >= 0, "cannot make a temporary file ", path);
    close(fd);
    Rows expected, found;
    try {
      Engine one = engine(), another = engine();
      Session kept(one), saved(another);
      feed(kept, prompt_);
      kept.save(path);
      saved.restore(path);
      follow(kept, expected);
      follow(saved, found);
    } catch (...) {
      unlink(path.c_str());
      throw;
    }
    unlink(path.c_str());
    return compare(found, expected);
  }

  Difference rounded_and_exact() {
    Rows rows[2];
    for (const int i : {0, 1}) {
      Engine e = engine([&](EngineOptions& o) { o.precision = i == 0 ? Precision::bf16 : Precision::exact; });
      Session session(e);
      feed(session, prompt_);
      follow(session, rows[i]);
    }
    return compare(rows[0], rows[1]);
  }

  Difference threads_and_one() {
    Rows rows[2];
    for (const int i : {0, 1}) {
      Engine e = engine([&](EngineOptions& o) { o.threads = i == 0 ? std::max(2, several_threads()) : 1; });
      Session session(e);
      feed(session, prompt_);
      follow(session, rows[i]);
    }
    return compare(rows[0], rows[1]);
  }

 private:
  void count(size_t tokens) {
    KL_CHECK(!interrupted, "interrupted");
    done_ += static_cast<double>(tokens);
    progress_->update(std::min(done_, total_), total_);
  }
  void feed(Session& session, Ids ids) {
    session.feed(ids, {}, &interrupted);
    count(ids.size());
  }
  // The tokens after the prompt, one by one.
  void follow(Session& session, Rows& rows) {
    add_row(rows, session);
    for (size_t i = 0; i < rest_.size(); ++i) {
      feed(session, rest_.subspan(i, 1));
      add_row(rows, session);
    }
  }
  int several_threads() const {
    return options_.model.threads > 0 ? options_.model.threads : available_processors();
  }
  template <class Change = void (*)(EngineOptions&)>
  Engine engine(Change change = [](EngineOptions&) {}) const {
    EngineOptions o = base_;
    change(o);
    return Engine(model_, o);
  }

  const VerifyOptions& options_;
  std::shared_ptr<const Model> model_;
  Ids prompt_, rest_;
  EngineOptions base_;
  Progress* progress_ = nullptr;  // of the check that runs
  double done_ = 0, total_ = 0;   // tokens
};

std::string scientific(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1e", value);
  return text;
}

std::string padded(std::string text, size_t width) {
  text.resize(std::max(text.size() + 1, width), ' ');
  return text;
}

// Prints the verdict; true if it is good. Tolerance 0: the same bits.
bool report(const char* name, const Difference& d, double tolerance) {
  const bool good = d.identical || (tolerance > 0 && d.median <= tolerance);
  const std::string found =
      d.identical ? "the same bits"
                  : cat("differs by ", scientific(d.median), " (worst row ", scientific(d.worst), ")");
  const std::string wanted = tolerance > 0 ? "at most " + scientific(tolerance) : "the same bits";
  print(padded(good ? "ok" : "FAIL", 6) + padded(name, 18) + padded(found, 42) + "expected: " + wanted +
        "\n");
  return good;
}

}  // namespace

int verify(const VerifyOptions& options) {
  const auto model = std::make_shared<const Model>(open_model(options.model));
  const std::optional<Tokenizer> tokenizer =
      find_tokenizer(model->checkpoint.directory(), model->config.vocab_size);
  const int64_t prompt = options.tokens, rest = options.steps;
  const std::vector<int32_t> ids =
      sample_ids(tokenizer ? &*tokenizer : nullptr, model->config.vocab_size, prompt + rest, options.seed);
  const Ids all(ids);
  Verification v(options, model, all.first(static_cast<size_t>(prompt)),
                 all.subspan(static_cast<size_t>(prompt)));
  // Rounded activations: a last bit of f32 may round one to the other neighbour, 2^-8 away.
  const bool rounded = options.model.precision == "bf16";
  const double split = options.tolerance.value_or(rounded ? kRoundedTolerance : 1e-4);
  struct Check {
    const char* name;
    Difference (Verification::*run)();
    double tolerance, prompts, rests;
  };
  std::vector<Check> checks = {{"warm = cold", &Verification::warm_and_cold, 0, 4, 2},
                               {"chunked = whole", &Verification::chunked_and_whole, split, 4, 4},
                               {"batched = alone", &Verification::batched_and_alone, 0, 5.7, 8},
                               {"saved = kept", &Verification::saved_and_kept, 0, 1, 2},
                               {"threads = one", &Verification::threads_and_one, 0, 2, 2}};
  if (rounded)
    checks.push_back({"rounded = exact", &Verification::rounded_and_exact, kRoundedTolerance, 2, 2});
  print(cat("Logits after ", prompt, " tokens of ", tokenizer ? "text" : "random ids", " and after each of ",
            rest, " that follow\n"));
  bool good = true;
  for (const Check& check : checks) {
    good &= report(check.name, v.run(check.run, check.name, check.prompts, check.rests), check.tolerance);
  }
  return good ? 0 : 1;
}

}  // namespace kl::app
