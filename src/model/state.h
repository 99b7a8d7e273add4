// The hybrid state of sequences: what bytes a sequence has. Who gets them is the engine's business.
//
// A KDA layer keeps a matrix per head and the last inputs of its convolutions, both of fixed size: a point in
// time that can be copied or restored, never rewound. An MLA layer keeps a latent row per token, in pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "model/config.h"

namespace kl {

struct StateOptions {
  int slots = 1;                    // sequences that can be open at once
  int64_t max_tokens = 4096;        // of one sequence
  int64_t pages = 0;                // of all sequences together; 0: enough for every slot to reach max_tokens
  int page_size = 64;               // tokens
  DType latent_dtype = DType::f32;  // f32 or bf16
  // Fills all memory with this byte pattern first, so that tests notice what is read before it is written. 0:
  // off.
  uint8_t poison = 0;
};

// Bytes that a sequence occupies.
struct StateBytes {
  int64_t kda = 0;     // recurrent states, f32
  int64_t conv = 0;    // convolution states, f32
  int64_t latent = 0;  // latent cache, whole pages
  int64_t total() const { return kda + conv + latent; }
};
StateBytes state_bytes(const Config&, int64_t tokens, const StateOptions& = {});

class State {
 public:
  State(const Config&, const StateOptions&);

  int open();            // a slot with an empty sequence; throws kl::Error if none is free
  void close(int slot);  // gives the slot and its pages back
  void reset(int slot);  // the empty sequence again
  // The sequence of `from` becomes that of `to` as well (both open); from then on they are independent.
  // Throws kl::Error, changing nothing, if no pages are left for it.
  void copy(int from, int to);

  int64_t length(int slot) const;  // tokens that have been through the model
  StateBytes bytes(int slot) const;
  int64_t free_pages() const { return static_cast<int64_t>(free_pages_.size()); }

  // Whether `slot`, once reset, could hold `tokens`. Throws kl::Error that says why not.
  void check_fits(int slot, int64_t tokens) const;
  // Takes pages so that `tokens` more fit. Throws kl::Error, changing nothing, if the sequence would pass
  // max_tokens or no pages are left.
  void reserve(int slot, int64_t tokens);
  void advance(int slot, int64_t tokens);  // after a forward pass has written them
  const std::vector<int32_t>& pages(int slot) const;
  // The bytes that make up a sequence, layer by layer: a KDA state and three convolution states, or the
  // latent rows in use. With the same length, another slot's have the same sizes in the same order.
  std::vector<std::span<std::byte>> memory(int slot) const;

  // Memory of layer i (counted from 0), for the operators.
  Tensor kda(int layer) const {
    return layers_[static_cast<size_t>(layer)].kda.tensor;
  }  // [slots, H, K, V] f32
  Tensor conv(int layer) const {
    return layers_[static_cast<size_t>(layer)].conv.tensor;
  }  // [3 (q, k, v), slots, P, W-1]
  Tensor latent(int layer) const {
    return layers_[static_cast<size_t>(layer)].latent.tensor;
  }  // [pages, page_size, R + P]

  const StateOptions& options() const { return options_; }

 private:
  struct Layer {
    OwnedTensor kda, conv, latent;
  };
  struct Sequence {
    bool open = false;
    int64_t length = 0;
    std::vector<int32_t> pages;
  };
  const Sequence& sequence(int slot) const;
  Sequence& sequence(int slot);

  Config config_;
  StateOptions options_;
  std::vector<Layer> layers_;
  std::vector<Sequence> sequences_;
  std::vector<int32_t> free_pages_;  // a stack
};

}  // namespace kl
