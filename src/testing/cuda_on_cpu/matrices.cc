// Matrix instructions of a warpgroup (machine.h).
#include <bit>

#include "testing/cuda_on_cpu/machine_state.h"

namespace kl::cuda_on_cpu {

namespace {

struct WgmmaOperands {
  float* d;
  uint32_t a[4];
  uint64_t b;
  int n;
  bool transposed_b;
};

float from_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

// Element (k, n) of the right operand, whose descriptor has 18 bits of addresses.
template <int kN>
void read_right(const Block& block, const Wgmma& w, float (&B)[16][kN]) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(w.b >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const bool swizzled = w.b >> 62 == 1;
  for (uint32_t k = 0; k < 16; ++k)
    for (uint32_t n = 0; n < kN; ++n) {
      uint32_t at = start;
      if (!swizzled)
        at += n / 8 * stride + k / 8 * leading + n % 8 * 16 + k % 8 * 2;
      else if (w.transposed_b)
        at += n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
      else
        at += n / 8 * stride + n % 8 * 128 + k * 2;
      if (swizzled) at ^= (at >> 7 & 7) << 4;
      uint16_t bits;
      std::memcpy(&bits, block.window + at, sizeof bits);
      B[k][n] = from_bf16(bits);
    }
}

template <int kN>
void perform(const Block& block, const Wgmma& w) {
  float A[16][16], B[16][kN];
  read_right(block, w, B);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e)
        A[lane / 4 + i % 2 * 8][2 * (lane % 4) + i / 2 * 8 + e] = from_bf16(w.a[lane][i] >> 16 * e & 0xffff);
  for (int row = 0; row < 16; ++row) {
    float sum[kN] = {};
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < kN; ++n) sum[n] += A[row][k] * B[k][n];
    for (int n = 0; n < kN; ++n) w.d[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2] += sum[n];
  }
}

// Products before that group take place; what they write is what it was, plus them.
void perform_products(const Block& block, Warp& w, int group) {
  size_t count = 0;
  while (count < w.products.size() && w.products[count].group < group) ++count;
  for (size_t i = 0; i < count; ++i) {
    const Wgmma& p = w.products[i];
    const auto under_way = std::find_if(w.accumulators.begin(), w.accumulators.end(),
                                        [&](const Accumulators& a) { return a.d[0] == p.d[0]; });
    if (under_way != w.accumulators.end()) {
      const float* from = under_way->before.data();
      for (float* d : under_way->d) {
        std::copy(from, from + under_way->count, d);
        from += under_way->count;
      }
      w.accumulators.erase(under_way);
    }
    switch (p.n) {
      case 32: perform<32>(block, p); break;
      case 64: perform<64>(block, p); break;
      default: perform<128>(block, p); break;
    }
  }
  w.products.erase(w.products.begin(), w.products.begin() + static_cast<std::ptrdiff_t>(count));
}

}  // namespace

void wgmma(float* d, int n, const uint32_t (&a)[4], uint64_t b, bool transposed_b) {
  WgmmaOperands own{d, {a[0], a[1], a[2], a[3]}, b, n, transposed_b};
  meet_with(0xffffffffu, "wgmma", own, [](Meeting& m) {
    const auto& first = *static_cast<const WgmmaOperands*>(m.brought[0]);
    Warp& w = *current->warp;
    Wgmma p{{}, {}, first.b, first.n, w.product_group, first.transposed_b};
    if (first.transposed_b && first.b >> 62 != 1)
      fail("a transposed operand without swizzle is not known here");
    for (int l = 0; l < 32; ++l) {
      const auto& lane = *static_cast<const WgmmaOperands*>(m.brought[l]);
      if (lane.b != first.b || lane.n != first.n) fail("lanes of a warp ask for different products");
      p.d[l] = lane.d;
      std::copy(std::begin(lane.a), std::end(lane.a), p.a[l]);
    }
    const bool under_way = std::any_of(w.products.begin(), w.products.end(),
                                       [&](const Wgmma& other) { return other.d[0] == p.d[0]; });
    if (!under_way) {
      Accumulators a{{}, p.n / 2, {}};
      for (int l = 0; l < 32; ++l) {
        a.d[l] = p.d[l];
        a.before.insert(a.before.end(), p.d[l], p.d[l] + a.count);
        std::fill_n(p.d[l], a.count, std::bit_cast<float>(0x7fffffffu));
      }
      w.accumulators.push_back(std::move(a));
    }
    w.products.push_back(p);
    ++w.products_issued;
  });
}
void wgmma_commit() {
  int none = 0;
  meet_with(0xffffffffu, "wgmma_commit", none, [](Meeting&) { ++current->warp->product_group; });
}
void wgmma_wait(int pending) {
  meet_with(0xffffffffu, "wgmma_wait", pending, [](Meeting& m) {
    Warp& w = *current->warp;
    perform_products(*current->block, w, w.product_group - *static_cast<const int*>(m.brought[0]));
  });
}

}  // namespace kl::cuda_on_cpu
