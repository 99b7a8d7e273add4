// Sessions: feeding in chunks, generating, stopping, copying, limits.
#include "engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "simd/gemm_bf16.h"
#include "testing/compare.h"
#include "testing/golden.h"
#include "testing/tiny_checkpoint.h"

namespace kl {
namespace {

using nlohmann::json;

json golden(const char* name) {
  json j;
  std::ifstream(testing::golden_path("demo_golden.json")) >> j;
  return j[name];
}

Engine make_engine(EngineOptions options = {}) { return Engine(load_model(testing::demo_model()), options); }

SampleParams greedy() { return {.temperature = 0}; }

std::vector<int32_t> generate_greedy(Session& session, const GenerateOptions& options) {
  Sampler sampler(greedy());
  return generate(session, sampler, options, [](int32_t) {}).ids;
}

double negative_log_likelihood(std::span<const float> logits, int32_t id) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
  return top + std::log(sum) - static_cast<double>(logits[static_cast<size_t>(id)]);
}

TEST(Engine, GreedyAnswersAreTheGoldenOnes) {
  Engine engine = make_engine({.context = 2048, .prefill_chunk = 100});
  for (const char* name : {"passkey", "prose", "one_token"}) {
    const json c = golden(name);
    Session session(engine);
    session.feed(c["ids"].get<std::vector<int32_t>>());
    const auto expected = c["greedy"].get<std::vector<int32_t>>();
    EXPECT_EQ(generate_greedy(session, {.max_tokens = static_cast<int64_t>(expected.size())}), expected)
        << name;
  }
}

// Emulated on the golden prompts, rounding moves logits by 2e-3 to 4e-2 (rel-RMS) and the mean negative
// log-likelihood by up to 2.4e-4.
TEST(Engine, RoundedActivationsStayWithinTheirBudget) {
  for (const char* name : {"prose_129", "codes"}) {
    const auto ids = golden(name)["ids"].get<std::vector<int32_t>>();
    double nll[2] = {};
    std::vector<double> logits[2];
    for (const Precision precision : {Precision::exact, Precision::bf16}) {
      const auto i = static_cast<size_t>(precision);
      Engine engine = make_engine({.context = 256, .precision = precision});
      Session session(engine);
      for (const int32_t id : ids) {
        if (!session.logits().empty()) nll[i] += negative_log_likelihood(session.logits(), id);
        session.feed({&id, 1});
        logits[i].insert(logits[i].end(), session.logits().begin(), session.logits().end());
      }
    }
    // A token: what rounding does to one has either sign, and these texts' own 0.2 nats a token are nothing
    // to measure it by.
    EXPECT_NEAR((nll[1] - nll[0]) / static_cast<double>(ids.size() - 1), 0, 1e-3) << name;
    EXPECT_LT(testing::rel_rms(logits[1], logits[0]), 3e-2) << name;
    EXPECT_EQ(logits[1] == logits[0], !has_gemm_bf16()) << name;  // the option arrives, where it can
  }
}

TEST(Engine, StopTokensEndTheAnswerAndStayOut) {
  Engine engine = make_engine({.context = 512});
  const json c = golden("codes");
  auto expected = c["greedy"].get<std::vector<int32_t>>();
  const int32_t stop = expected.back();
  expected.pop_back();
  Session session(engine);
  session.feed(c["ids"].get<std::vector<int32_t>>());
  Sampler sampler(greedy());
  std::vector<int32_t> streamed;
  const GenerateResult result =
      generate(session, sampler, {.stop_ids = {stop}}, [&](int32_t id) { streamed.push_back(id); });
  EXPECT_EQ(result.finish, Finish::stop);
  EXPECT_EQ(result.stop_id, stop);
  EXPECT_EQ(result.ids, expected);
  EXPECT_EQ(streamed, expected);
}

TEST(Engine, ProgressCountsUpToTheTotal) {
  Engine engine = make_engine({.context = 512, .prefill_chunk = 30});
  Session session(engine);
  double last = 0;
  session.feed(golden("prose_129")["ids"].get<std::vector<int32_t>>(), [&](Session::Progress p) {
    EXPECT_GT(p.done, last);
    EXPECT_EQ(p.total, 129);
    last = p.done;
  });
  EXPECT_EQ(last, 129);
}

TEST(Engine, StopsBetweenChunksAndGoesOnLater) {
  Engine engine = make_engine({.context = 512, .sessions = 2, .prefill_chunk = 30});
  const auto ids = golden("prose_129")["ids"].get<std::vector<int32_t>>();
  Session whole(engine), cut(engine);
  whole.feed(ids);
  std::atomic<bool> stop{false};
  cut.feed(
      ids, [&](Session::Progress p) { stop = p.done > 40; }, &stop);
  EXPECT_EQ(cut.tokens().size(), 60u);
  cut.feed(std::span(ids).subspan(60));
  EXPECT_TRUE(std::equal(whole.logits().begin(), whole.logits().end(), cut.logits().begin()));
}

TEST(Engine, TheContextIsALimitNotACrash) {
  Engine engine = make_engine({.context = 20});
  Session session(engine);
  const auto ids = golden("prose_129")["ids"].get<std::vector<int32_t>>();
  EXPECT_THROW(session.feed(ids), Error);
  EXPECT_TRUE(session.tokens().empty());
  session.feed(std::span(ids).first(15));
  Sampler sampler(greedy());
  const GenerateResult result = generate(session, sampler, {}, [](int32_t) {});
  EXPECT_EQ(result.finish, Finish::length);
  EXPECT_EQ(result.ids.size(), 6u);  // five that fit, and one that need not be fed
  session.reset();
  EXPECT_EQ(session.room(), 20);
  EXPECT_THROW(generate(session, sampler, {}, [](int32_t) {}), Error);
}

TEST(Engine, CopiedSessionsGoSeparateWays) {
  Engine engine = make_engine({.context = 256, .sessions = 2});
  const auto ids = golden("prose")["ids"].get<std::vector<int32_t>>();
  Session a(engine), b(engine);
  EXPECT_THROW(Session(static_cast<Engine&>(engine)), Error);  // two sessions, no third
  a.feed(ids);
  b.copy_from(a);
  const std::vector<int32_t> first = generate_greedy(a, {.max_tokens = 10});
  EXPECT_EQ(generate_greedy(b, {.max_tokens = 10}), first);
  EXPECT_EQ(a.bytes().total(), b.bytes().total());
}

TEST(Engine, SavedSessionsGoOnAsIfTheyHadNotBeen) {
  const testing::TempDir folder;
  const std::string path = folder.path() + "/session";
  Engine engine = make_engine({.context = 256});
  Session kept(engine);
  EXPECT_THROW(kept.save(path), Error);  // nothing to save yet
  kept.feed(golden("prose_129")["ids"].get<std::vector<int32_t>>());
  kept.save(path);
  Engine another = make_engine({.threads = 1, .context = 160});
  Session restored(another);
  restored.restore(path);
  EXPECT_EQ(restored.tokens(), kept.tokens());
  EXPECT_EQ(restored.room(), 160 - 129);
  EXPECT_EQ(generate_greedy(restored, {.max_tokens = 20}), generate_greedy(kept, {.max_tokens = 20}));
  EXPECT_TRUE(std::equal(kept.logits().begin(), kept.logits().end(), restored.logits().begin()));

  Engine narrow = make_engine({.context = 128});
  Session untouched(narrow);
  untouched.feed(std::vector<int32_t>{1, 2, 3});
  EXPECT_THROW(untouched.restore(path), Error);
  EXPECT_EQ(untouched.tokens(), (std::vector<int32_t>{1, 2, 3}));
}

TEST(Engine, DrawsGoOnFromASavedSession) {
  const testing::TempDir folder;
  const std::string path = folder.path() + "/session";
  const auto prompt = golden("prose")["ids"].get<std::vector<int32_t>>();
  // Penalties too: they look at the tokens, which are in the file.
  const SampleParams params = {
      .temperature = 1, .top_p = 0.95f, .repetition_penalty = 1.1f, .frequency_penalty = 0.1f, .seed = 7};
  const auto choose = [](Session& session, Sampler& sampler, int64_t n) {
    return generate(session, sampler, {.max_tokens = n}, [](int32_t) {}).ids;
  };
  const auto sampler_for = [](const SampleParams& p, const std::vector<int32_t>& seen) {
    Sampler sampler(p);
    for (const int32_t id : seen) sampler.see(id);
    return sampler;
  };
  Engine engine = make_engine({.context = 256});
  std::vector<int32_t> whole;
  {
    Session session(engine);
    session.feed(prompt);
    Sampler sampler = sampler_for(params, prompt);
    whole = choose(session, sampler, 60);
    EXPECT_EQ(sampler.draws(), 60u);
  }
  {
    Session session(engine);
    session.feed(prompt);
    Sampler sampler = sampler_for(params, prompt);
    const std::vector<int32_t> first = choose(session, sampler, 25);
    session.feed({&first.back(), 1});
    session.save(path, sampler.draws());
  }
  const auto go_on = [&](const SampleParams& p, bool from_there) {
    Session session(engine);
    const uint64_t draws = session.restore(path);
    EXPECT_EQ(draws, 25u);
    Sampler sampler = sampler_for(p, session.tokens());
    if (from_there) sampler.continue_after(draws);
    return choose(session, sampler, 35);
  };
  const std::vector<int32_t> rest(whole.begin() + 25, whole.end());
  EXPECT_EQ(go_on(params, true), rest);
  EXPECT_NE(go_on(params, false), rest);  // what the number is there for
  SampleParams other = params;
  other.seed = 8;
  EXPECT_NE(go_on(other, true), rest);
}

TEST(Engine, PinnedThreadsGiveTheSameBits) {
  const auto ids = golden("prose_129")["ids"].get<std::vector<int32_t>>();
  const int before = available_processors();
  Engine free = make_engine({.context = 256}), pinned = make_engine({.context = 256, .pin = true});
  Session a(free), b(pinned);
  a.feed(ids), b.feed(ids);
  EXPECT_TRUE(std::equal(a.logits().begin(), a.logits().end(), b.logits().begin()));
  EXPECT_EQ(available_processors(), before);  // the calling thread is free again
  EXPECT_THROW(make_engine({.threads = 4096, .pin = true}), Error);
}

TEST(Engine, SessionsOfOneStepDoNotSeeEachOther) {
  Engine engine = make_engine({.context = 256, .sessions = 4});
  Engine alone = make_engine({.context = 256});
  const auto a = golden("prose")["ids"].get<std::vector<int32_t>>(),
             b = golden("passkey")["ids"].get<std::vector<int32_t>>();
  const auto begin = [](const std::vector<int32_t>& ids, size_t n) { return std::span(ids).first(n); };
  // Short, long and very long ones in turn: they take different forms of the operators.
  Session x(engine), y(engine), z(engine), w(engine);
  const std::vector<Feed> all = {
      {&x, begin(a, 12)}, {&y, begin(b, 220)}, {&z, begin(b, 3)}, {&w, begin(b, 90)}};
  engine.step(all);
  for (const auto& [session, ids] : all) {
    Session single(alone);
    single.feed(ids);
    EXPECT_EQ(session->tokens(), single.tokens());
    EXPECT_TRUE(std::equal(single.logits().begin(), single.logits().end(), session->logits().begin()));
  }
  const std::vector<Feed> too_long = {{&x, begin(a, 3)}, {&y, begin(b, 37)}};
  EXPECT_THROW(engine.step(too_long), Error);
  EXPECT_EQ(x.tokens().size(), 12u);  // nothing has happened
  const std::vector<Feed> stranger = {{&x, {}}};
  EXPECT_THROW(engine.step(stranger), Error);
}

TEST(Engine, CancellationKeepsWhatWasGenerated) {
  Engine engine = make_engine({.context = 256});
  Session session(engine);
  session.feed(golden("prose")["ids"].get<std::vector<int32_t>>());
  std::atomic<bool> stop{false};
  Sampler sampler(greedy());
  int count = 0;
  const GenerateResult result =
      generate(session, sampler, {.stop = &stop}, [&](int32_t) { stop = ++count == 3; });
  EXPECT_EQ(result.finish, Finish::cancelled);
  EXPECT_EQ(result.ids.size(), 3u);
}

}  // namespace
}  // namespace kl
