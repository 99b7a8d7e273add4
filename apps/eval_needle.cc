// kimi-linear eval needle: does the model find a pass key again that stands somewhere in a long text? The
// text is made up (or a file's), the key is random, the answer is greedy, and it counts if the key is in it.
#include <algorithm>
#include <cstdio>

#include "base/counter_random.h"
#include "commands.h"
#include "load.h"
#include "sample_text.h"
#include "table.h"
#include "terminal.h"
#include "text/chat.h"

namespace kl::app {

namespace {

constexpr const char* kQuestion = "What is the pass key?";

std::string needle(const std::string& key) { return "The pass key is " + key + ". Remember it. "; }

// Sentences without an end: of a file, again and again, or made up.
class Haystack {
 public:
  Haystack(const std::string& file, uint64_t seed) : made_up_(seed) {
    if (file.empty()) return;
    const std::string text = read_text_file(file, size_t{1} << 30);
    for (size_t begin = 0; begin < text.size();) {
      const size_t stop = text.find_first_of(".!?\n", begin);
      const size_t end = stop == std::string::npos ? text.size() : stop + 1;
      const std::string sentence = text.substr(begin, end - begin);
      if (sentence.find_first_not_of(" \t\r\n.!?") != std::string::npos) sentences_.push_back(sentence + " ");
      begin = end;
    }
    KL_CHECK(!sentences_.empty(), file, ": no sentences in it");
  }
  std::string next() {
    return sentences_.empty() ? made_up_.sentence() + " " : sentences_[at_++ % sentences_.size()];
  }

 private:
  SampleText made_up_;
  std::vector<std::string> sentences_;
  size_t at_ = 0;
};

class Examiner {
 public:
  Examiner(const NeedleOptions& options, Engine& engine, const Tokenizer& tokenizer)
      : options_(options), engine_(engine), tokenizer_(tokenizer) {
    const bool chat_model = tokenizer.special_id("<|im_end|>") && tokenizer.special_id("<|im_user|>");
    chat_ = chat_model && !options.raw;
    generation_.max_tokens = options.answer_tokens;
    generation_.stop_ids = stop_ids(engine.model(), &tokenizer);
    generation_.stop = &interrupted;
  }

  // Hides a key behind `depth` per cent of a text of so many tokens; true if it is found.
  bool trial(int64_t length, int depth, int number) {
    const CounterRandom random(options_.seed, cat(length, ' ', depth, ' ', number));
    const std::string key = std::to_string(10000 + random.below(0, 90000));
    const std::vector<int32_t> ids = prompt(length, depth, key, random.bits(1));
    Session session(engine_);
    session.feed(ids, {}, &interrupted);
    KL_CHECK(!interrupted, "interrupted");
    Sampler sampler({.temperature = 0});
    const GenerateResult result = generate(session, sampler, generation_, [](int32_t) {});
    KL_CHECK(!interrupted, "interrupted");
    const std::string answer = tokenizer_.decode(result.ids);
    if (options_.verbose) {
      std::fprintf(
          stderr, "%zu tokens, key %s at %d %%: %s\n", ids.size(), key.c_str(), depth,
          nlohmann::json(answer).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
    }
    return answer.find(key) != std::string::npos;
  }

 private:
  std::vector<int32_t> encode(const std::string& text) const {
    if (!chat_) return tokenizer_.encode(text + "\n" + kQuestion + " The pass key is");
    return encode_chat(tokenizer_, render_chat({{.role = "user", .content = text + kQuestion}}));
  }
  // As many sentences as fit.
  std::vector<int32_t> prompt(int64_t length, int depth, const std::string& key, uint64_t seed) const {
    Haystack haystack(options_.haystack, seed);
    const auto fixed_tokens = static_cast<int64_t>(encode(needle(key)).size());
    KL_CHECK(fixed_tokens <= length, "a context of ", length, " tokens: the question alone has ",
             fixed_tokens);
    std::vector<std::string> sentences;
    for (int64_t tokens = fixed_tokens;;) {
      sentences.push_back(haystack.next());
      tokens += static_cast<int64_t>(tokenizer_.encode(sentences.back()).size());
      if (tokens > length) break;
    }
    sentences.pop_back();
    for (;;) {  // sentence by sentence may come out a little shorter than all at once
      const size_t place = sentences.size() * static_cast<size_t>(depth) / 100;
      std::string text;
      for (size_t i = 0; i <= sentences.size(); ++i) {
        if (i == place) text += needle(key);
        if (i < sentences.size()) text += sentences[i];
      }
      std::vector<int32_t> ids = encode(text);
      if (static_cast<int64_t>(ids.size()) <= length || sentences.empty()) return ids;
      sentences.pop_back();
    }
  }

  const NeedleOptions& options_;
  Engine& engine_;
  const Tokenizer& tokenizer_;
  bool chat_;
  GenerateOptions generation_;
};

}  // namespace

int eval_needle(const NeedleOptions& options) {
  Model model = open_model(options.model);
  const Tokenizer tokenizer = need_tokenizer(model.checkpoint.directory(), model.config.vocab_size);
  std::vector<int64_t> lengths = options.lengths;
  if (lengths.empty()) {
    const int64_t longest = model.config.model_max_length > 0 ? model.config.model_max_length : 4096;
    for (int64_t n = 256; n <= std::min<int64_t>(4096, longest); n *= 2) lengths.push_back(n);
  }
  EngineOptions engine_settings = engine_options(options.model);
  engine_settings.context = *std::max_element(lengths.begin(), lengths.end()) + options.answer_tokens;
  Engine engine(std::move(model), engine_settings);
  Examiner examiner(options, engine, tokenizer);

  std::vector<Table::Column> columns = {{"context", 9}};
  for (const int depth : options.depths) columns.push_back({cat("at ", depth, " %"), 8});
  columns.push_back({"found", 9});
  columns.push_back({"% found", 8});
  Table table(table_format(options.format), columns);
  double work = 0, done = 0;  // tokens
  for (const int64_t length : lengths)
    work += static_cast<double>(length) * static_cast<double>(options.depths.size()) * options.trials;
  for (const int64_t length : lengths) {
    int all = 0;
    std::vector<Table::Cell> row = {length};
    {
      Progress progress("needle", "tokens");
      for (const int depth : options.depths) {
        int found = 0;
        for (int i = 0; i < options.trials; ++i) {
          found += examiner.trial(length, depth, i);
          progress.update(done += static_cast<double>(length), work);
        }
        row.push_back({found, cat(found, " / ", options.trials)});
        all += found;
      }
    }
    const int trials = options.trials * static_cast<int>(options.depths.size());
    row.push_back({all, cat(all, " / ", trials)});
    row.push_back({100. * all / trials, fixed(100. * all / trials, 1)});
    table.row(row);
  }
  table.finish();
  return 0;
}

}  // namespace kl::app
