// kimi-linear eval ppl: perplexity of a text. The text is read in windows of `context` tokens that start
// `stride` tokens apart; of each window those tokens count that no window before it has counted, so that
// every token but the first counts once, and after the first window behind at least context - stride others.
#include <cmath>

#include "commands.h"
#include "load.h"
#include "statistics.h"
#include "table.h"
#include "terminal.h"

namespace kl::app {

namespace {

constexpr int64_t kLogits = int64_t{1} << 25;  // at a time: 128 MB

// -log p(next) for each row of logits [n, vocab].
void score_rows(ThreadPool& pool, const Tensor& logits, const int32_t* next, double* out) {
  const int64_t vocab = logits.size(1);
  parallel_for(&pool, logits.size(0), 1, [&](int64_t row, int64_t) {
    const float* x = logits.at<float>(row);
    double largest = -HUGE_VAL, sum = 0;
    for (int64_t j = 0; j < vocab; ++j) largest = std::max<double>(largest, x[j]);
    for (int64_t j = 0; j < vocab; ++j) sum += std::exp(x[j] - largest);
    out[row] = largest + std::log(sum) - x[next[row]];
  });
}

class Scorer {
 public:
  Scorer(const Model& model, const ModelOptions& options, int64_t context)
      : model_(model),
        pool_(make_pool(options)),
        state_(model.config, {.max_tokens = context, .latent_dtype = engine_options(options).latent_dtype}),
        chunk_(std::max<int64_t>(1, std::min<int64_t>(options.batch, kLogits / model.config.vocab_size))),
        slot_(state_.open()) {}

  // Appends -log p of ids[counted ...] given what stands before them in the window.
  template <class OnProgress>
  void window(std::span<const int32_t> ids, int64_t counted, std::vector<double>& nll,
              OnProgress&& progress) {
    state_.reset(slot_);
    const PinnedCaller pinned(pool_);
    Ctx ctx;
    ctx.pool = &pool_;
    // The last token's logits speak about a token outside.
    const auto last = static_cast<int64_t>(ids.size()) - 1;
    for (int64_t first = 0; first < last; first += chunk_) {
      KL_CHECK(!interrupted, "interrupted");
      const int64_t n = std::min(chunk_, last - first);
      Batch batch;
      batch.add(slot_, ids.subspan(static_cast<size_t>(first), static_cast<size_t>(n)), Batch::Logits::none);
      const int64_t from = std::max(first, counted - 1);  // row t is about token t + 1
      for (int64_t t = from; t < first + n; ++t) batch.logit_rows.push_back(static_cast<int32_t>(t - first));
      const Tensor logits = forward(ctx, model_, batch, state_, arena_);
      const size_t before = nll.size();
      nll.resize(before + batch.logit_rows.size());
      score_rows(pool_, logits, ids.data() + from + 1, nll.data() + before);
      progress(n);
    }
  }

 private:
  const Model& model_;
  ThreadPool pool_;
  State state_;
  Arena arena_;
  int64_t chunk_;
  int slot_;
};

struct Text {
  std::vector<int32_t> ids;
  std::optional<Tokenizer> tokenizer;
};

Text read_text(const PerplexityOptions& o, const Model& model) {
  Text text;
  const std::string content = read_text_file(o.file, size_t{1} << 32);
  if (o.ids) {
    text.ids = parse_ids(content);
  } else {
    text.tokenizer = need_tokenizer(model.checkpoint.directory(), model.config.vocab_size);
    text.ids = text.tokenizer->encode(content);
  }
  KL_CHECK(text.ids.size() >= 2, o.file, ": expected at least 2 tokens, found ", text.ids.size());
  return text;
}

}  // namespace

int eval_ppl(const PerplexityOptions& options) {
  const Model model = open_model(options.model);
  const Text text = read_text(options, model);
  const std::span<const int32_t> ids(text.ids);
  const auto N = static_cast<int64_t>(ids.size());
  int64_t context = options.model.context > 0 ? options.model.context : 2048;
  if (options.model.context == 0 && model.config.model_max_length > 0)
    context = std::min(context, model.config.model_max_length);
  const int64_t stride = options.stride > 0 ? options.stride : std::max<int64_t>(1, context / 2);
  KL_CHECK(context >= 2 && stride < context, "expected a stride below the context of ", context, ", found ",
           stride);

  std::vector<double> nll;
  {
    Scorer scorer(model, options.model, std::min(context, N));
    double work = 0, done = 0;  // tokens, counting those read again
    for (int64_t first = 0, end = 0; end < N; first += stride) {
      end = std::min(N, first + context);
      work += static_cast<double>(end - first - 1);
    }
    Progress progress("perplexity", "tokens");
    for (int64_t first = 0, end = 1; end < N; first += stride) {
      const int64_t counted = end - first;
      end = std::min(N, first + context);
      scorer.window(ids.subspan(static_cast<size_t>(first), static_cast<size_t>(end - first)), counted, nll,
                    [&](int64_t n) { progress.update(done += static_cast<double>(n), work); });
    }
  }

  const double average = mean(nll), total = average * static_cast<double>(nll.size());
  const double error = standard_deviation(nll) / std::sqrt(static_cast<double>(nll.size()));
  const double perplexity = std::exp(average);
  nlohmann::json bits;
  if (text.tokenizer) {
    size_t bytes = 0;
    for (const int32_t id : ids.subspan(1)) bytes += text.tokenizer->bytes_of(id).size();
    bits = total / std::log(2) / static_cast<double>(bytes);
  }
  Table table(table_format(options.format), {{"file", 24, true},
                                             {"tokens", 9},
                                             {"context", 8},
                                             {"stride", 7},
                                             {"nll", 9},
                                             {"perplexity", 12},
                                             {"standard error", 14},
                                             {"bits per byte", 13}});
  table.row({options.file,
             nll.size(),
             context,
             stride,
             {average, fixed(average, 5)},
             {perplexity, fixed(perplexity, 4)},
             {perplexity * error, fixed(perplexity * error, 4)},
             {bits, bits.is_null() ? "-" : fixed(bits.get<double>(), 4)}});
  table.finish();
  return 0;
}

}  // namespace kl::app
