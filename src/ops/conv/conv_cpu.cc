// short_conv for f32 operands: a vector holds neighbouring channels, so taps and state, which lie channel by
// channel, are first laid out tap by tap. Every output goes through the same instructions wherever its inputs
// come from, so that cutting a sequence changes no bit.
#include "ops/conv/conv_cpu.h"

#include "simd/vec.h"

namespace kl::KL_ISA {
namespace {

// Inputs of one row: at[j] for tap j. All outputs of one row, the sum in order of the taps.
template <int W>
struct Row {
  const float* at[W];
  const float (*taps)[kConvChannels];

  template <class Load>
  Vec convolve(int64_t c, const Load& load_at) const {
    Vec sum = load_at(taps[0] + c) * load_at(at[0] + c);
    for (int j = 1; j < W; ++j) sum += load_at(taps[j] + c) * load_at(at[j] + c);
    return silu(max(broadcast(-__FLT_MAX__), sum));  // 0, not NaN, where the sum overflows to -inf
  }
  void run(float* out, int64_t channels) const {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes)
      store(out + c, convolve(c, [](const float* p) { return load(p); }));
    const int64_t rest = channels - c;
    if (rest > 0) store_part(out + c, convolve(c, [&](const float* p) { return load_part(p, rest); }), rest);
  }
};

template <int W>
struct Sequence {
  const ConvChannels& a;
  const float (*taps)[kConvChannels];  // [W][channels]
  int64_t begin, end;
  float* state;  // [channels, W - 1]; null: zeros, and nothing is kept
  float past[W - 1][kConvChannels];

  // The input W - 1 - i rows before the first, for i in [0, W - 1); rows of the sequence from there on.
  const float* input(int64_t i) const {
    return i < W - 1 ? past[i] : a.x + (begin + i - (W - 1)) * a.x_stride;
  }

  void load_past() {
    for (int64_t c = 0; c < a.channels; ++c)
      for (int i = 0; i < W - 1; ++i) past[i][c] = state ? state[c * (W - 1) + i] : 0.f;
  }
  void store_past() {
    const float* last[W - 1];
    for (int i = 0; i < W - 1; ++i) last[i] = input(end - begin + i);
    for (int64_t c = 0; c < a.channels; ++c)
      for (int i = 0; i < W - 1; ++i) state[c * (W - 1) + i] = last[i][c];
  }
  void run() {
    load_past();
    for (int64_t t = begin; t < end; ++t) {
      Row<W> row{{}, taps};
      for (int j = 0; j < W; ++j) row.at[j] = input(t - begin + j);
      row.run(a.out + t * a.out_stride, a.channels);
    }
    if (state) store_past();
  }
};

template <int W>
void all_sequences(const ConvChannels& a) {
  float taps[W][kConvChannels];
  for (int64_t c = 0; c < a.channels; ++c)
    for (int j = 0; j < W; ++j) taps[j][c] = a.weight[c * W + j];
  for (int64_t n = 0; n < a.N; ++n) {
    if (a.cu_seqlens[n] == a.cu_seqlens[n + 1]) continue;
    float* state = a.slot[n] < 0 ? nullptr : a.state + a.slot[n] * a.state_stride;
    Sequence<W> s{a, taps, a.cu_seqlens[n], a.cu_seqlens[n + 1], state, {}};
    s.run();
  }
}

}  // namespace

void conv_channels(const ConvChannels& a) {
  switch (a.W) {
    case 2: return all_sequences<2>(a);
    case 3: return all_sequences<3>(a);
    case 4: return all_sequences<4>(a);
  }
}

}  // namespace kl::KL_ISA
