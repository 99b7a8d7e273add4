#include "load.h"

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <random>

#include "simd/isa.h"
#include "terminal.h"
#include "text/chat.h"

namespace kl::app {

using nlohmann::json;

namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// generation_config.json, or an empty object where there is none.
json generation_config(const std::string& directory) {
  const std::string path = directory + "/generation_config.json";
  if (!file_exists(path)) return json::object();
  json j = json::parse(read_text_file(path, size_t{1} << 20), nullptr, false);
  KL_CHECK(j.is_object(), path, ": not a JSON object");
  return j;
}

template <class T>
void take(const json& from, const char* key, T& value) {
  if (from.contains(key) && from[key].is_number()) value = from[key].get<T>();
}

}  // namespace

std::string model_directory(const std::string& model) {
  return resolve_model(model, {environment("HF_HUB_CACHE"), environment("HF_HOME"), environment("HOME")});
}

void choose_isa(const std::string& name) {
  if (name.empty()) return;
  std::string known;
  for (const Isa isa : kIsas) {
    if (name == name_of(isa)) return force_isa(isa);
    if (isa_supported(isa)) known += cat(known.empty() ? "" : ", ", name_of(isa));
  }
  detail::fail(cat("--isa: expected one of ", known, ", found ", name));
}

Model open_model(const ModelOptions& options) {
  choose_isa(options.isa);
  Progress progress("loading", "layers");
  Model model = load_model(model_directory(options.model),
                           [&](int done, int layers) { progress.update(done, layers); });
  model.config.hf_compat_router = options.hf_compat_router;
  if (options.kv_a_layernorm_eps) model.config.kv_a_layernorm_eps = *options.kv_a_layernorm_eps;
  return model;
}

EngineOptions engine_options(const ModelOptions& options) {
  return {.threads = options.threads,
          .context = options.context,
          .prefill_chunk = options.batch,
          .latent_dtype = options.cache_type == "bf16" ? DType::bf16 : DType::f32,
          .precision = options.precision == "bf16" ? Precision::bf16 : Precision::exact,
          .pin = options.pin};
}

ThreadPool make_pool(const ModelOptions& options) {
  return ThreadPool(options.threads > 0 ? options.threads : available_processors(), options.pin);
}

std::unique_ptr<Engine> open_engine(const ModelOptions& options) {
  return std::make_unique<Engine>(open_model(options), engine_options(options));
}

std::optional<Tokenizer> find_tokenizer(const std::string& directory, int vocab_size) {
  if (!file_exists(directory + "/tiktoken.model")) return std::nullopt;
  return Tokenizer::load(directory, vocab_size);
}

Tokenizer need_tokenizer(const std::string& directory, int vocab_size) {
  std::optional<Tokenizer> tokenizer = find_tokenizer(directory, vocab_size);
  KL_CHECK(tokenizer.has_value(), directory,
           " has no tokenizer (tiktoken.model); only token ids can go in and out (--ids)");
  return std::move(*tokenizer);
}

SampleParams sample_params(const SamplingOptions& options, const std::string& directory) {
  const json file = generation_config(directory);
  SampleParams p;
  p.temperature = file.contains("do_sample") && file["do_sample"] == false ? 0.f : 0.6f;
  take(file, "temperature", p.temperature);
  take(file, "top_k", p.top_k);
  take(file, "top_p", p.top_p);
  take(file, "min_p", p.min_p);
  take(file, "repetition_penalty", p.repetition_penalty);
  if (options.temperature) p.temperature = *options.temperature;
  if (options.top_k) p.top_k = *options.top_k;
  if (options.top_p) p.top_p = *options.top_p;
  if (options.min_p) p.min_p = *options.min_p;
  if (options.repetition_penalty) p.repetition_penalty = *options.repetition_penalty;
  if (options.presence_penalty) p.presence_penalty = *options.presence_penalty;
  if (options.frequency_penalty) p.frequency_penalty = *options.frequency_penalty;
  p.seed = options.seed ? *options.seed : std::random_device{}();
  check(p);
  return p;
}

std::vector<int32_t> stop_ids(const Model& model, const Tokenizer* tokenizer) {
  std::vector<int32_t> ids(model.config.eos_token_ids.begin(), model.config.eos_token_ids.end());
  const json file = generation_config(model.checkpoint.directory());
  const json eos = file.value("eos_token_id", json());
  for (const json& id : eos.is_array() ? eos : json::array({eos})) {
    if (id.is_number_integer()) ids.push_back(id.get<int32_t>());
  }
  if (tokenizer) {
    const std::vector<int32_t> named = stop_tokens(*tokenizer);
    ids.insert(ids.end(), named.begin(), named.end());
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

}  // namespace kl::app
