// The hybrid state as a container: slots, pages, copies, bytes.
#include "model/state.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstring>
#include <set>

#include "base/check.h"
#include "testing/compare.h"
#include "testing/tiny_checkpoint.h"

namespace kl {
namespace {

Config config(const std::string& layers) {
  return parse_config(testing::config_json(testing::TinyModel{.layers = layers}), "config.json");
}

bool all_zero(const Tensor& t) {
  const std::vector<double> v = testing::to_doubles(t);
  return std::all_of(v.begin(), v.end(), [](double x) { return x == 0; });
}

TEST(State, OpenGivesZeroedStatesFromPoisonedMemory) {
  State state(config("KMK"), {.slots = 2, .max_tokens = 100, .poison = 0x3e});
  EXPECT_FALSE(all_zero(state.kda(0)));
  const int slot = state.open();
  for (const int layer : {0, 2}) {
    EXPECT_TRUE(all_zero(state.kda(layer)[slot]));
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(all_zero(state.conv(layer)[i][slot]));
    EXPECT_FALSE(all_zero(state.kda(layer)[1 - slot]));  // the other slot is not touched
  }
}

TEST(State, SlotsAndPagesAreLimited) {
  State state(config("KM"), {.slots = 2, .max_tokens = 100, .pages = 3, .page_size = 32});
  const int a = state.open(), b = state.open();
  EXPECT_THROW(state.open(), Error);
  state.reserve(a, 64);
  EXPECT_EQ(state.free_pages(), 1);
  EXPECT_THROW(state.reserve(b, 33), Error);
  EXPECT_EQ(state.free_pages(), 1);  // nothing was taken
  state.reserve(b, 32);
  EXPECT_THROW(state.reserve(a, 101), Error);
  EXPECT_THROW(state.advance(a, 65), Error);
  state.advance(a, 60);
  EXPECT_EQ(state.length(a), 60);
  state.close(a);
  EXPECT_THROW(state.length(a), Error);
  EXPECT_EQ(state.free_pages(), 2);
  EXPECT_EQ(state.open(), a);
  EXPECT_EQ(state.length(a), 0);
  EXPECT_THROW(state.length(7), Error);
}

TEST(State, BytesOfThePublishedShape) {
  // spec: 40 MiB of KDA states; 20 layers of 3 x 4096 x 3 convolution inputs; 7 layers of 576 values a token.
  testing::TinyModel m{.layers = "KKKMKKKMKKKMKKKMKKKMKKKMKKM",
                       .kda_heads = 32,
                       .kda_head_dim = 128,
                       .kv_lora_rank = 512,
                       .rope = 64};
  const Config c = parse_config(testing::config_json(m), "config.json");
  const StateBytes b = state_bytes(c, 1 << 20, {.latent_dtype = DType::bf16});
  EXPECT_EQ(b.kda, 40 << 20);
  EXPECT_EQ(b.conv, 20 * 3 * 4096 * 3 * 4);
  EXPECT_EQ(b.latent, int64_t{8455716864});
}

TEST(State, CopyIsDeep) {
  State state(config("KM"), {.slots = 2, .max_tokens = 64, .page_size = 4, .poison = 0x3e});
  const int a = state.open(), b = state.open();
  testing::Random random(1);
  testing::fill_normal(state.kda(0)[a], random);
  state.reserve(a, 10);
  state.advance(a, 10);
  for (const int32_t page : state.pages(a)) testing::fill_normal(state.latent(1)[page], random);
  state.reserve(b, 30);  // what b held goes away
  state.copy(a, b);
  EXPECT_EQ(state.length(b), 10);
  EXPECT_EQ(state.pages(b).size(), 3u);
  EXPECT_TRUE(testing::same_bits(state.kda(0)[a], state.kda(0)[b]));
  for (size_t p = 0; p < 3; ++p) {
    EXPECT_NE(state.pages(a)[p], state.pages(b)[p]);
    EXPECT_TRUE(testing::same_bits(state.latent(1)[state.pages(a)[p]], state.latent(1)[state.pages(b)[p]]));
  }
  EXPECT_EQ(state.bytes(a).total(), state.bytes(b).total());
}

// A copy that the free pages do not hold leaves the sequence that it would have replaced.
TEST(State, CopyWithoutPagesChangesNothing) {
  State state(config("KM"), {.slots = 2, .max_tokens = 64, .pages = 7, .page_size = 4});
  const int a = state.open(), b = state.open();
  state.reserve(a, 20), state.advance(a, 20);  // 5 pages: more than the two that `b` has or finds free
  state.reserve(b, 3), state.advance(b, 3);
  testing::Random random(1);
  testing::fill_normal(state.kda(0)[b], random);
  const OwnedTensor before = make_tensor(DType::f32, {2, 8, 8});
  ASSERT_EQ(before.tensor.bytes(), state.kda(0)[b].bytes());
  std::memcpy(before.tensor.data, state.kda(0)[b].data, static_cast<size_t>(before.tensor.bytes()));
  EXPECT_THROW(state.copy(a, b), Error);
  EXPECT_EQ(state.length(b), 3);
  EXPECT_EQ(state.pages(b).size(), 1u);
  EXPECT_TRUE(testing::same_bits(state.kda(0)[b], before.tensor));
  EXPECT_THROW(state.check_fits(b, 9), Error);
  EXPECT_NO_THROW(state.check_fits(b, 8));
  EXPECT_THROW(state.check_fits(b, 65), Error);
}

// Whatever is opened, grown, copied and closed: no page is lost and none has two owners.
RC_GTEST_PROP(State, PagesAreNeitherLostNorShared, ()) {
  constexpr int kSlots = 4, kPages = 20;
  State state(config("MK"), {.slots = kSlots, .max_tokens = 60, .pages = kPages, .page_size = 4});
  std::set<int> open;
  for (int step = 0; step < 60; ++step) {
    const int action = *rc::gen::inRange(0, 5), slot = *rc::gen::inRange(0, kSlots),
              other = *rc::gen::inRange(0, kSlots);
    try {
      if (action == 0) open.insert(state.open());
      if (action == 1) state.close(slot), open.erase(slot);
      if (action == 2) {
        const int n = *rc::gen::inRange(0, 30);
        state.reserve(slot, n), state.advance(slot, n);
      }
      if (action == 3) state.reset(slot);
      if (action == 4) state.copy(slot, other);
    } catch (const Error&) {
    }
    std::set<int32_t> owned;
    size_t count = 0;
    for (const int s : open) {
      owned.insert(state.pages(s).begin(), state.pages(s).end());
      count += state.pages(s).size();
      RC_ASSERT(static_cast<int64_t>(state.pages(s).size()) * 4 >= state.length(s));
    }
    RC_ASSERT(owned.size() == count);
    RC_ASSERT(static_cast<int64_t>(count) + state.free_pages() == kPages);
  }
}

TEST(State, OptionsAreChecked) {
  EXPECT_THROW(State(config("K"), {.slots = 0}), Error);
  EXPECT_THROW(State(config("K"), {.max_tokens = 0}), Error);
  EXPECT_THROW(State(config("K"), {.page_size = 0}), Error);
  EXPECT_THROW(State(config("M"), {.latent_dtype = DType::i32}), Error);
}

}  // namespace
}  // namespace kl
