// The full-size model's checkpoint for tests: every name, type and shape of Kimi-Linear-48B-A3B in 20 shards,
// in sparse files that take no disk.
#pragma once

#include <sys/stat.h>
#include <unistd.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "testing/files.h"

namespace kl::testing {

struct Named {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;

  int64_t bytes() const {
    int64_t total = size_of(dtype);
    for (const int64_t n : shape) total *= n;
    return total;
  }
};

inline void add(std::vector<Named>& all, const std::string& prefix,
                std::initializer_list<std::pair<const char*, std::vector<int64_t>>> weights) {
  for (const auto& [name, shape] : weights) all.push_back({cat(prefix, name, ".weight"), DType::bf16, shape});
}

inline void add_kda(std::vector<Named>& all, const std::string& p) {
  add(all, p,
      {{"q_proj", {4096, 2304}},
       {"k_proj", {4096, 2304}},
       {"v_proj", {4096, 2304}},
       {"q_conv1d", {4096, 1, 4}},
       {"k_conv1d", {4096, 1, 4}},
       {"v_conv1d", {4096, 1, 4}},
       {"f_a_proj", {128, 2304}},
       {"f_b_proj", {4096, 128}},
       {"b_proj", {32, 2304}},
       {"g_a_proj", {128, 2304}},
       {"g_b_proj", {4096, 128}},
       {"o_norm", {128}},
       {"o_proj", {2304, 4096}}});
  all.push_back({p + "A_log", DType::f32, {1, 1, 32, 1}});
  all.push_back({p + "dt_bias", DType::f32, {4096}});
}

inline void add_mla(std::vector<Named>& all, const std::string& p) {
  add(all, p,
      {{"q_proj", {6144, 2304}},
       {"kv_a_proj_with_mqa", {576, 2304}},
       {"kv_a_layernorm", {512}},
       {"kv_b_proj", {8192, 512}},
       {"o_proj", {2304, 4096}}});
}

inline void add_moe(std::vector<Named>& all, const std::string& p) {
  add(all, p, {{"gate", {256, 2304}}});
  all.push_back({p + "gate.e_score_correction_bias", DType::bf16, {256}});
  for (int e = 0; e < 256; ++e) {
    add(all, cat(p, "experts.", e, "."), {{"w1", {1024, 2304}}, {"w2", {2304, 1024}}, {"w3", {1024, 2304}}});
  }
  add(all, p + "shared_experts.",
      {{"gate_proj", {1024, 2304}}, {"up_proj", {1024, 2304}}, {"down_proj", {2304, 1024}}});
}

inline std::vector<Named> kimi_linear_48b() {
  std::vector<Named> all;
  add(all, "", {{"model.embed_tokens", {163840, 2304}}, {"model.norm", {2304}}, {"lm_head", {163840, 2304}}});
  for (int i = 0; i < 27; ++i) {
    const std::string layer = cat("model.layers.", i, ".");
    add(all, layer, {{"input_layernorm", {2304}}, {"post_attention_layernorm", {2304}}});
    const bool mla = i % 4 == 3 || i == 26;
    (mla ? add_mla : add_kda)(all, layer + "self_attn.");
    if (i == 0) {
      add(all, layer + "mlp.",
          {{"gate_proj", {9216, 2304}}, {"up_proj", {9216, 2304}}, {"down_proj", {2304, 9216}}});
    } else {
      add_moe(all, layer + "block_sparse_moe.");
    }
  }
  return all;
}

// False if the file system cannot hold a file of this size that takes no room.
inline bool write_sparse(const std::string& path, const std::string& head, int64_t data_bytes) {
  write_file(path, head);
  struct stat info {};
  return truncate(path.c_str(), static_cast<off_t>(head.size()) + data_bytes) == 0 &&
         stat(path.c_str(), &info) == 0 && info.st_blocks * 512 < (int64_t{1} << 24);
}

inline bool write_48b_checkpoint(const TempDir& dir, const std::vector<Named>& all,
                                 const std::string& config) {
  constexpr size_t kShards = 20;
  std::string map;
  size_t next = 0;
  for (size_t s = 0; s < kShards; ++s) {
    const std::string name = cat("model-", 10000 + s, "-of-00020.safetensors");
    std::string header = R"({"__metadata__":{"format":"pt"})";
    int64_t offset = 0;
    for (; next < all.size() * (s + 1) / kShards; ++next) {
      const Named& t = all[next];
      std::string shape;
      for (const int64_t n : t.shape) shape += (shape.empty() ? "" : ",") + std::to_string(n);
      header += cat(",\"", t.name, R"(":{"dtype":")", name_of(t.dtype), R"(","shape":[)", shape,
                    R"(],"data_offsets":[)", offset, ",", offset + t.bytes(), "]}");
      offset += t.bytes();
      map += cat(map.empty() ? "" : ",\n    ", '"', t.name, "\": \"", name, '"');
    }
    header += '}';
    header.append((8 - header.size() % 8) % 8, ' ');
    if (!write_sparse(dir / name, little_endian(header.size()) + header, offset)) return false;
  }
  write_file(
      dir / "model.safetensors.index.json",
      "{\n  \"metadata\": {\"total_size\": 98245528576},\n  \"weight_map\": {\n    " + map + "\n  }\n}\n");
  write_file(dir / "config.json", config);
  return true;
}

}  // namespace kl::testing
