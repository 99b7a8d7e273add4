#include "model/state.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kl {

namespace {

int64_t pages_for(int64_t tokens, int page_size) { return (tokens + page_size - 1) / page_size; }

void copy_bytes(const Tensor& to, const Tensor& from) {
  std::memcpy(to.data, from.data, static_cast<size_t>(from.bytes()));
}

void zero(const Tensor& t) { std::memset(t.data, 0, static_cast<size_t>(t.bytes())); }

}  // namespace

StateBytes state_bytes(const Config& c, int64_t tokens, const StateOptions& options) {
  const int64_t K = c.linear_attn_config.head_dim, W = c.linear_attn_config.short_conv_kernel_size;
  constexpr int64_t f32 = sizeof(float);
  StateBytes b;
  b.kda = c.kda_layer_count() * c.kda_dim() * K * f32;
  b.conv = c.kda_layer_count() * 3 * c.kda_dim() * (W - 1) * f32;
  b.latent = c.mla_layer_count() * pages_for(tokens, options.page_size) * options.page_size * c.latent_dim() *
             size_of(options.latent_dtype);
  return b;
}

State::State(const Config& c, const StateOptions& options) : config_(c), options_(options) {
  KL_CHECK(options.slots >= 1, "state: expected at least one slot, found ", options.slots);
  KL_CHECK(options.page_size >= 1, "state: expected a page size of at least 1, found ", options.page_size);
  KL_CHECK(options.max_tokens >= 1 && options.max_tokens <= (int64_t{1} << 31) - options.page_size,
           "state: expected a context of 1 to 2^31 tokens, found ", options.max_tokens);
  KL_CHECK(options.latent_dtype == DType::f32 || options.latent_dtype == DType::bf16,
           "state: expected a latent cache of F32 or BF16, found ", name_of(options.latent_dtype));
  if (options_.pages == 0) options_.pages = options.slots * pages_for(options.max_tokens, options.page_size);

  const int64_t slots = options_.slots, H = c.linear_attn_config.num_heads, K = c.linear_attn_config.head_dim;
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    Layer layer;
    if (c.is_kda(i)) {
      layer.kda = make_tensor(DType::f32, {slots, H, K, K});
      layer.conv =
          make_tensor(DType::f32, {3, slots, H * K, c.linear_attn_config.short_conv_kernel_size - 1});
    } else {
      layer.latent = make_tensor(options_.latent_dtype, {options_.pages, options_.page_size, c.latent_dim()});
    }
    if (options_.poison) {
      for (const OwnedTensor* t : {&layer.kda, &layer.conv, &layer.latent}) {
        if (t->tensor) std::memset(t->tensor.data, options_.poison, static_cast<size_t>(t->tensor.bytes()));
      }
    }
    layers_.push_back(std::move(layer));
  }
  sequences_.resize(static_cast<size_t>(slots));
  for (int64_t page = options_.pages - 1; page >= 0; --page)
    free_pages_.push_back(static_cast<int32_t>(page));
}

const State::Sequence& State::sequence(int slot) const {
  KL_CHECK(slot >= 0 && slot < options_.slots && sequences_[static_cast<size_t>(slot)].open, "state: slot ",
           slot, " is not open (there are ", options_.slots, ")");
  return sequences_[static_cast<size_t>(slot)];
}
State::Sequence& State::sequence(int slot) {
  return const_cast<Sequence&>(std::as_const(*this).sequence(slot));
}

int State::open() {
  for (int slot = 0; slot < options_.slots; ++slot) {
    if (sequences_[static_cast<size_t>(slot)].open) continue;
    sequences_[static_cast<size_t>(slot)].open = true;
    reset(slot);
    return slot;
  }
  detail::fail(cat("state: all ", options_.slots, " slots are in use"));
}

void State::close(int slot) {
  Sequence& s = sequence(slot);
  free_pages_.insert(free_pages_.end(), s.pages.rbegin(), s.pages.rend());
  s = Sequence{};
}

void State::reset(int slot) {
  Sequence& s = sequence(slot);
  free_pages_.insert(free_pages_.end(), s.pages.rbegin(), s.pages.rend());
  s.pages.clear();
  s.length = 0;
  for (const Layer& layer : layers_) {
    if (!layer.kda.tensor) continue;
    zero(layer.kda.tensor[slot]);
    for (int i = 0; i < 3; ++i) zero(layer.conv.tensor[i][slot]);
  }
}

void State::copy(int from, int to) {
  const Sequence& source = sequence(from);
  if (from == to) return;
  check_fits(to, source.length);
  reset(to);
  reserve(to, source.length);
  Sequence& target = sequence(to);
  target.length = source.length;
  for (const Layer& layer : layers_) {
    if (layer.kda.tensor) {
      copy_bytes(layer.kda.tensor[to], layer.kda.tensor[from]);
      for (int i = 0; i < 3; ++i) copy_bytes(layer.conv.tensor[i][to], layer.conv.tensor[i][from]);
    } else {
      for (size_t p = 0; p < target.pages.size(); ++p) {
        copy_bytes(layer.latent.tensor[target.pages[p]], layer.latent.tensor[source.pages[p]]);
      }
    }
  }
}

int64_t State::length(int slot) const { return sequence(slot).length; }
const std::vector<int32_t>& State::pages(int slot) const { return sequence(slot).pages; }

std::vector<std::span<std::byte>> State::memory(int slot) const {
  const Sequence& s = sequence(slot);
  std::vector<std::span<std::byte>> parts;
  const auto add = [&](const Tensor& t) {
    parts.emplace_back(static_cast<std::byte*>(t.data), static_cast<size_t>(t.bytes()));
  };
  for (const Layer& layer : layers_) {
    if (layer.kda.tensor) {
      add(layer.kda.tensor[slot]);
      for (int i = 0; i < 3; ++i) add(layer.conv.tensor[i][slot]);
      continue;
    }
    for (int64_t first = 0; first < s.length; first += options_.page_size) {
      const int32_t page = s.pages[static_cast<size_t>(first / options_.page_size)];
      const int64_t rows = std::min<int64_t>(options_.page_size, s.length - first);
      add(layer.latent.tensor[page].slice(0, 0, rows));
    }
  }
  return parts;
}

StateBytes State::bytes(int slot) const {
  return state_bytes(config_, static_cast<int64_t>(sequence(slot).pages.size()) * options_.page_size,
                     options_);
}

void State::check_fits(int slot, int64_t tokens) const {
  const Sequence& s = sequence(slot);
  KL_CHECK(tokens >= 0 && tokens <= options_.max_tokens, "context is full: ", tokens, " tokens do not fit ",
           options_.max_tokens);
  if (config_.mla_layer_count() == 0) return;
  const int64_t needed = pages_for(tokens, options_.page_size);
  const int64_t there = free_pages() + static_cast<int64_t>(s.pages.size());
  KL_CHECK(needed <= there, "latent cache is full: ", needed, " pages of ", options_.page_size,
           " tokens are needed, ", there, " are free");
}

void State::reserve(int slot, int64_t tokens) {
  Sequence& s = sequence(slot);
  KL_CHECK(tokens >= 0 && s.length + tokens <= options_.max_tokens, "context is full: ", s.length,
           " tokens and ", tokens, " more do not fit ", options_.max_tokens);
  if (config_.mla_layer_count() == 0) return;
  const int64_t more =
      pages_for(s.length + tokens, options_.page_size) - static_cast<int64_t>(s.pages.size());
  KL_CHECK(more <= free_pages(), "latent cache is full: ", more, " more pages of ", options_.page_size,
           " tokens are needed, ", free_pages(), " are free");
  for (int64_t i = 0; i < more; ++i) {
    s.pages.push_back(free_pages_.back());
    free_pages_.pop_back();
  }
}

void State::advance(int slot, int64_t tokens) {
  Sequence& s = sequence(slot);
  const auto room = static_cast<int64_t>(s.pages.size()) * options_.page_size;
  KL_CHECK(config_.mla_layer_count() == 0 || s.length + tokens <= room, "state: ", tokens,
           " tokens were not reserved");
  s.length += tokens;
}

}  // namespace kl
