// The files of a random checkpoint.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "io/atomic_file.h"
#include "io/safetensors_writer.h"
#include "model/synth.h"

namespace kl {

using nlohmann::ordered_json;

namespace {

constexpr int64_t kBlock = int64_t{1} << 20;  // elements that are made before they are written
constexpr int64_t kGrain = int64_t{1} << 15;  // of one task

void write_text(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

// f32 as the shortest text that means the same number, so that 0.00001 does not become 9.999999747e-06.
double plain(float value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.7g", static_cast<double>(value));
  return std::strtod(text, nullptr);
}

std::vector<std::vector<SynthTensor>> make_shards(std::vector<SynthTensor> tensors, int64_t limit) {
  std::vector<std::vector<SynthTensor>> shards(1);
  int64_t bytes = 0;
  for (SynthTensor& t : tensors) {
    if (!shards.back().empty() && bytes + t.bytes() > limit) shards.emplace_back(), bytes = 0;
    bytes += t.bytes();
    shards.back().push_back(std::move(t));
  }
  return shards;
}

std::string shard_name(size_t i, size_t n) {
  if (n == 1) return "model.safetensors";
  char name[64];
  std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, n);
  return name;
}

class Writer {
 public:
  Writer(const std::string& directory, const SynthFileOptions& options, int64_t total)
      : directory_(directory), options_(options), total_(total) {}

  // What was begun and not finished goes away again.
  ~Writer() {
    std::error_code ignored;
    for (const std::string& path : unfinished_) std::filesystem::remove(path, ignored);
  }
  void finish() { unfinished_.clear(); }

  void shard(const std::string& name, const std::vector<SynthTensor>& tensors) {
    std::vector<SafetensorsWriter::Item> items;
    for (const SynthTensor& t : tensors) items.push_back({t.name, t.dtype, t.shape});
    unfinished_.push_back(directory_ + "/" + name);
    SafetensorsWriter writer(unfinished_.back(), items, {{"format", "pt"}});
    std::map<std::string, const SynthTensor*> by_name;
    for (const SynthTensor& t : tensors) by_name[t.name] = &t;
    for (const SafetensorsWriter::Item& item : writer.order()) tensor(writer, *by_name.at(item.name));
    writer.commit();
  }
  void text(const std::string& name, const std::string& content) {
    unfinished_.push_back(directory_ + "/" + name);
    write_text(unfinished_.back(), content);
  }

 private:
  void tensor(SafetensorsWriter& writer, const SynthTensor& t) {
    const int64_t size = size_of(t.dtype);
    block_.resize(static_cast<size_t>(kBlock * size));
    for (int64_t first = 0; first < t.numel(); first += kBlock) {
      const int64_t count = std::min(kBlock, t.numel() - first);
      parallel_for(options_.pool, count, kGrain, [&](int64_t begin, int64_t end) {
        synth_fill(t, options_.seed, first + begin, end - begin, block_.data() + begin * size);
      });
      writer.write(block_.data(), static_cast<size_t>(count * size));
      done_ += count * size;
      if (options_.on_progress) options_.on_progress(done_, total_);
    }
  }

  std::string directory_;
  const SynthFileOptions& options_;
  int64_t done_ = 0, total_;
  std::vector<char> block_;
  std::vector<std::string> unfinished_;
};

std::string index_json(const std::vector<std::vector<SynthTensor>>& shards, int64_t bytes) {
  ordered_json map = ordered_json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    for (const SynthTensor& t : shards[i]) map[t.name] = shard_name(i, shards.size());
  }
  return ordered_json({{"metadata", {{"total_size", bytes}}}, {"weight_map", map}}).dump(2) + "\n";
}

ordered_json token_ids(const Config& c) {
  ordered_json j = ordered_json::object();
  if (c.bos_token_id >= 0) j["bos_token_id"] = c.bos_token_id;
  if (c.eos_token_ids.size() == 1) j["eos_token_id"] = c.eos_token_ids[0];
  if (c.eos_token_ids.size() > 1) j["eos_token_id"] = c.eos_token_ids;
  if (c.pad_token_id >= 0) j["pad_token_id"] = c.pad_token_id;
  return j;
}

void make_empty_directory(const std::string& directory, int64_t bytes) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  KL_CHECK(!error, "cannot make ", directory, ": ", error.message());
  KL_CHECK(std::filesystem::is_directory(directory) && std::filesystem::is_empty(directory), directory,
           ": expected an empty directory or none");
  const std::filesystem::space_info space = std::filesystem::space(directory, error);
  KL_CHECK(error || space.available >= static_cast<uintmax_t>(bytes), directory, ": ", bytes,
           " bytes are to be written, there is room for ", space.available);
}

}  // namespace

std::string config_json(const Config& c, DType matrices) {
  const LinearAttnConfig& l = c.linear_attn_config;
  ordered_json j = {{"architectures", {"KimiLinearForCausalLM"}}, {"model_type", "kimi_linear"}};
  j["dtype"] = matrices == DType::bf16 ? "bfloat16" : matrices == DType::f16 ? "float16" : "float32";
  j.update(token_ids(c));
  j["vocab_size"] = c.vocab_size, j["hidden_size"] = c.hidden_size;
  j["num_hidden_layers"] = c.num_hidden_layers;
  if (c.intermediate_size > 0) j["intermediate_size"] = c.intermediate_size;
  j["hidden_act"] = "silu", j["rms_norm_eps"] = plain(c.rms_norm_eps), j["initializer_range"] = 0.02;
  j["num_attention_heads"] = c.num_attention_heads, j["num_key_value_heads"] = c.num_attention_heads;
  j["q_lora_rank"] = nullptr, j["kv_lora_rank"] = c.kv_lora_rank;
  j["qk_nope_head_dim"] = c.qk_nope_head_dim, j["qk_rope_head_dim"] = c.qk_rope_head_dim;
  j["v_head_dim"] = c.v_head_dim, j["mla_use_nope"] = true;
  if (c.model_max_length > 0) j["model_max_length"] = c.model_max_length;
  j["linear_attn_config"] = {{"head_dim", l.head_dim},
                             {"num_heads", l.num_heads},
                             {"short_conv_kernel_size", l.short_conv_kernel_size},
                             {"kda_layers", l.kda_layers},
                             {"full_attn_layers", l.full_attn_layers}};
  j["num_experts"] = c.num_experts;
  if (c.num_experts > 0) {
    j["num_experts_per_token"] = c.num_experts_per_token, j["num_shared_experts"] = c.num_shared_experts;
    j["moe_intermediate_size"] = c.moe_intermediate_size;
    j["first_k_dense_replace"] = c.first_k_dense_replace, j["moe_layer_freq"] = c.moe_layer_freq;
    j["moe_router_activation_func"] = c.moe_router_activation_func, j["moe_renormalize"] = c.moe_renormalize;
    j["routed_scaling_factor"] = plain(c.routed_scaling_factor), j["use_grouped_topk"] = true;
    j["num_expert_group"] = c.num_expert_group, j["topk_group"] = c.topk_group;
  }
  j["num_nextn_predict_layers"] = 0, j["tie_word_embeddings"] = c.tie_word_embeddings, j["use_cache"] = true;
  return j.dump(2) + "\n";
}

SynthResult write_synthetic_checkpoint(const std::string& directory, const Config& c,
                                       const SynthFileOptions& options) {
  KL_CHECK(
      options.matrices == DType::bf16 || options.matrices == DType::f16 || options.matrices == DType::f32,
      "synth: expected matrices of BF16, F16 or F32, found ", name_of(options.matrices));
  KL_CHECK(options.shard_bytes >= 1, "synth: expected at least 1 byte a file, found ", options.shard_bytes);
  std::vector<SynthTensor> tensors = synth_tensors(c, options.matrices);
  SynthResult result = {.tensors = static_cast<int64_t>(tensors.size())};
  for (const SynthTensor& t : tensors) result.parameters += t.numel(), result.bytes += t.bytes();
  const auto shards = make_shards(std::move(tensors), options.shard_bytes);
  result.files = static_cast<int64_t>(shards.size());

  make_empty_directory(directory, result.bytes);
  Writer writer(directory, options, result.bytes);
  for (size_t i = 0; i < shards.size(); ++i) writer.shard(shard_name(i, shards.size()), shards[i]);
  if (shards.size() > 1) writer.text("model.safetensors.index.json", index_json(shards, result.bytes));
  writer.text("generation_config.json", token_ids(c).dump(2) + "\n");
  writer.text("config.json", config_json(c, options.matrices));
  writer.finish();
  return result;
}

}  // namespace kl
