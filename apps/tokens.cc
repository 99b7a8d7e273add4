// kimi-linear tokenize, detokenize: text <-> token ids.
#include "commands.h"
#include "load.h"
#include "terminal.h"

namespace kl::app {

namespace {

Tokenizer tokenizer_of(const std::string& model) {
  const std::string directory = model_directory(model);
  return need_tokenizer(directory, load_config(directory).vocab_size);
}

}  // namespace

int tokenize(const TokenizeOptions& options) {
  const Tokenizer tokenizer = tokenizer_of(options.model);
  const std::vector<int32_t> ids =
      tokenizer.encode(options.text ? *options.text : read_stdin(), options.parse_special);
  std::string out;
  if (options.count) {
    out = std::to_string(ids.size());
  } else if (options.pieces) {
    for (const int32_t id : ids) out += cat(id, "\t", tokenizer.bytes_of(id), "\n");
    if (!out.empty()) out.pop_back();
  } else {
    for (const int32_t id : ids) out += (out.empty() ? "" : " ") + std::to_string(id);
  }
  print(out + "\n");
  return 0;
}

int detokenize(const DetokenizeOptions& options) {
  const Tokenizer tokenizer = tokenizer_of(options.model);
  print(tokenizer.decode(parse_ids(options.ids ? *options.ids : read_stdin())) + "\n");
  return 0;
}

}  // namespace kl::app
