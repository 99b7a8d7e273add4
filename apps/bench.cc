// kimi-linear bench: tokens per second in the manner of llama-bench. pp: reading a prompt; tg: generating;
// pp+tg: one after the other; @ d: behind a context of d tokens; x n: n sequences together. Tokenisation and
// sampling are not part of it.
//
// The roofline is measured in the same run. Generation is held against the memory's bandwidth: what a step
// has to read is the active weights (for several sequences the experts that even routing would touch), the
// recurrent and convolution states and the latents of the context. Prompts are held against the multiply-add
// peak: what they have to do are the products with the active weights, without the head; attention and the
// recurrence are not counted, so the figure is rather too low.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>

#include "commands.h"
#include "load.h"
#include "sample_text.h"
#include "simd/probe.h"
#include "statistics.h"
#include "table.h"
#include "terminal.h"

namespace kl::app {

namespace {

struct Test {
  int64_t prompt = 0, generate = 0, depth = 0;
  std::string name(int sequences) const {
    std::string s = prompt > 0 ? cat("pp", prompt) : "";
    if (generate > 0) s += cat(s.empty() ? "" : "+", "tg", generate);
    if (sequences > 1) s += cat(" x ", sequences);
    return depth > 0 ? cat(s, " @ d", depth) : s;
  }
};

std::vector<Test> make_tests(const BenchOptions& o) {
  std::vector<Test> tests;
  for (const int64_t depth : o.depths) {
    for (const int64_t n : o.prompts)
      if (n > 0) tests.push_back({.prompt = n, .depth = depth});
    for (const int64_t n : o.generates)
      if (n > 0) tests.push_back({.generate = n, .depth = depth});
    for (const std::string& pair : o.pairs) {
      const std::vector<int32_t> lengths = parse_ids(pair);
      KL_CHECK(lengths.size() == 2 && lengths[0] > 0 && lengths[1] > 0,
               "--pg: expected the length of a prompt and of a generation, such as 512,128; found ", pair);
      tests.push_back({lengths[0], lengths[1], depth});
    }
  }
  KL_CHECK(!tests.empty(), "nothing to measure: give -p, -n or -pg");
  return tests;
}

// What a step has to read and do.
class Cost {
 public:
  Cost(const Model& model, DType latent) : model_(model), latent_(latent) {
    for (const LayerWeights& layer : model.weights.layers) {
      for (const ExpertWeights& e : layer.moe.experts)
        experts_ += static_cast<double>(e.w1.bytes() + e.w2.bytes() + e.w3.bytes());
    }
  }
  double read_by_step(int sequences, double context) const {
    const Config& c = model_.config;
    const double share =
        c.num_experts > 0 ? static_cast<double>(c.num_experts_per_token) / c.num_experts : 0.;
    const double touched = 1 - std::pow(1 - share, sequences);
    const StateBytes fixed = state_bytes(c, 0);
    const double state = static_cast<double>(fixed.total()) + context * c.mla_layer_count() * c.latent_dim() *
                                                                  static_cast<double>(size_of(latent_));
    return static_cast<double>(model_.weights.active_bytes) + (touched - share) * experts_ +
           sequences * state;
  }
  double flops_by_token() const {
    const Weights& w = model_.weights;
    return 2. * static_cast<double>(w.active_parameters - w.lm_head.numel());
  }

 private:
  const Model& model_;
  DType latent_;
  double experts_ = 0;  // bytes of all routed experts
};

// One engine, and its sessions: one that holds the context of the current depth, the others to measure with.
class Machine {
 public:
  Machine(std::shared_ptr<const Model> model, const EngineOptions& options)
      : engine_(std::move(model), options), context_(engine_) {
    for (int i = 1; i < options.sessions; ++i) sessions_.push_back(std::make_unique<Session>(engine_));
    random_ = sample_ids(nullptr, engine_.model().config.vocab_size, options.context, 1);
  }

  // The seconds that a test takes.
  double run(const Test& test) {
    set_depth(test.depth);
    for (const auto& session : sessions_) {
      session->reset();
      if (test.depth > 0) session->copy_from(context_);
    }
    const double start = now();
    for (int64_t done = 0; done < test.prompt;) {
      const int64_t n = std::min<int64_t>(test.prompt - done, engine_.options().prefill_chunk);
      step(test.depth + done, n);
      done += n;
    }
    for (int64_t i = 0; i < test.generate; ++i) step(test.depth + test.prompt + i, 1);
    return now() - start;
  }

 private:
  void set_depth(int64_t depth) {
    if (static_cast<int64_t>(context_.tokens().size()) > depth) context_.reset();
    const auto have = static_cast<int64_t>(context_.tokens().size());
    if (have == depth) return;
    Progress progress("reading the context", "tokens");
    context_.feed(
        tokens(have, depth - have),
        [&](Session::Progress p) { progress.update(p.done, static_cast<double>(p.total)); }, &interrupted);
    KL_CHECK(!interrupted, "interrupted");
  }
  void step(int64_t first, int64_t count) {
    KL_CHECK(!interrupted, "interrupted");
    std::vector<Feed> feeds;
    for (const auto& session : sessions_) feeds.push_back({session.get(), tokens(first, count)});
    engine_.step(feeds);
  }
  std::span<const int32_t> tokens(int64_t first, int64_t count) const {
    return std::span(random_).subspan(static_cast<size_t>(first), static_cast<size_t>(count));
  }

  Engine engine_;
  Session context_;
  std::vector<std::unique_ptr<Session>> sessions_;
  std::vector<int32_t> random_;
};

std::vector<Table::Column> columns() {
  using C = Table::Column;
  return {{"model", 14, true},
          {"size", 10, false},
          {"params", 9, false},
          {"backend", 12, true},
          {"threads", 7, false},
          {"n_batch", 0, false, C::data},
          {"cache_type", 0, false, C::data},
          {"precision", 0, false, C::data},
          {"n_parallel", 0, false, C::data},
          {"n_prompt", 0, false, C::data},
          {"n_gen", 0, false, C::data},
          {"n_depth", 0, false, C::data},
          {"test", 18, false},
          {"t/s", 18, false, C::shown},
          {"% roofline", 17, false, C::shown},
          {"avg_ts", 0, false, C::data},
          {"stddev_ts", 0, false, C::data},
          {"samples_ts", 0, false, C::data},
          {"roofline_percent", 0, false, C::data},
          {"roofline_of", 0, false, C::data},
          {"memory_bytes_per_second", 0, false, C::data},
          {"peak_flops_per_second", 0, false, C::data}};
}

struct Context {  // of a row
  const BenchOptions& options;
  const Model& model;
  int threads;
  Roofline roofline;
};

void print_row(Table& table, const Context& x, const Test& test, const std::vector<double>& seconds) {
  const BenchOptions& o = x.options;
  const double tokens = static_cast<double>(o.parallel * (test.prompt + test.generate));
  std::vector<double> rates;
  for (const double s : seconds) rates.push_back(tokens / s);
  const double rate = mean(rates), deviation = standard_deviation(rates);

  const DType latent = o.model.cache_type == "bf16" ? DType::bf16 : DType::f32;
  const Cost cost(x.model, latent);
  double percent = NAN;  // a prompt with its generation has no single roofline
  const char* of = "";
  if (test.generate == 0) {
    percent = 100 * rate * cost.flops_by_token() / x.roofline.flops_per_second, of = "compute";
  } else if (test.prompt == 0) {
    const double context = static_cast<double>(test.depth) + static_cast<double>(test.generate) / 2;
    const double steps = rate / o.parallel;
    percent = 100 * steps * cost.read_by_step(o.parallel, context) / x.roofline.bytes_per_second,
    of = "memory";
  }
  const auto size = static_cast<double>(x.model.weights.bytes);
  const auto parameters = static_cast<double>(x.model.weights.parameters);
  const std::string name =
      std::filesystem::path(x.model.checkpoint.directory() + "/.").parent_path().filename();
  table.row({name,
             {x.model.weights.bytes, human_bytes(size)},
             {x.model.weights.parameters, human_count(parameters)},
             cat("CPU ", name_of(active_isa()), o.model.precision == "bf16" ? " bf16" : ""),
             x.threads,
             o.model.batch,
             o.model.cache_type,
             o.model.precision,
             o.parallel,
             test.prompt,
             test.generate,
             test.depth,
             test.name(o.parallel),
             cat(fixed(rate, 2), " ± ", fixed(deviation, 2)),
             std::isnan(percent) ? "-" : cat(fixed(percent, 1), " of ", of),
             rate,
             deviation,
             rates,
             {std::isnan(percent) ? nlohmann::json() : nlohmann::json(percent), ""},
             of,
             x.roofline.bytes_per_second,
             x.roofline.flops_per_second});
}

}  // namespace

int bench(const BenchOptions& options) {
  const std::vector<Test> tests = make_tests(options);
  const auto model = std::make_shared<const Model>(open_model(options.model));
  int64_t longest = 0;
  for (const Test& t : tests) longest = std::max(longest, t.depth + t.prompt + t.generate);
  std::vector<int> threads = options.threads;
  if (threads.empty()) threads = {available_processors()};
  Table table(table_format(options.format), columns());
  std::string closing;
  for (const int t : threads) {
    Roofline roofline;
    {
      ThreadPool pool(t, options.model.pin);
      const PinnedCaller pinned(pool);
      roofline = measure_roofline(pool);
    }
    EngineOptions engine = engine_options(options.model);
    engine.threads = t, engine.context = longest, engine.sessions = 1 + options.parallel;
    Machine machine(model, engine);
    for (const Test& test : tests) {
      if (!options.no_warmup)
        machine.run({std::min<int64_t>(test.prompt, 512), std::min<int64_t>(test.generate, 1), test.depth});
      std::vector<double> seconds;
      for (int i = 0; i < options.repetitions; ++i) seconds.push_back(machine.run(test));
      print_row(table, {options, *model, t, roofline}, test, seconds);
    }
    closing += cat("\nroofline of ", t, t == 1 ? " thread" : " threads", ", measured before: memory ",
                   fixed(roofline.bytes_per_second / 1e9, 1), " GB/s, multiply-add ",
                   fixed(roofline.flops_per_second / 1e9, 1), " GFLOP/s");
  }
  table.finish();
  if (table_format(options.format) == TableFormat::md) print(closing + "\n");
  return 0;
}

}  // namespace kl::app
