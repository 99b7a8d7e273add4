// Prefill of long sequences in segments that run side by side: the exact scan. A segment acts on the state in
// front of it as S -> M S + C, whatever the gates. Three steps, each parallel:
//
//   1. of every segment but the last: C, the recurrence from S = 0; M, the recurrence on K columns from S = I
//      with all values 0. Both by the chunk kernel, without outputs.
//   2. of every head: the states in front of its segments, S_{j+1} = M_j S_j + C_j.
//   3. of every segment: the outputs, by the chunk kernel from S_j.
//
// Memory: K (K + V) floats for each segment and head.
#include "ops/kda/kda_heads.h"
#include "simd/gemm.h"
#include "simd/scratch.h"

namespace kl::kda {
namespace {

struct Segment {
  int64_t sequence, begin, end;
  bool last;  // of its sequence
};

std::vector<Segment> segments_of(const KdaArgs& args) {
  std::vector<Segment> all;
  for (int64_t n = 0; n + 1 < args.cu_seqlens.size(0); ++n) {
    int64_t begin = index_at(args.cu_seqlens, n);
    const int64_t end = index_at(args.cu_seqlens, n + 1);
    do {
      const int64_t next = std::min(begin + args.segment, end);
      all.push_back({n, begin, next, next == end});
      begin = next;
    } while (begin < end);
  }
  return all;
}

// Of every segment and head.
class Scan {
 public:
  Scan(Ctx& ctx, const KdaArgs& args, KdaProducts products)
      : ctx_(ctx),
        products_(products),
        args_(args),
        segments_(segments_of(args)),
        Hv_(args.v.size(1)),
        K_(args.q.size(2)),
        V_(args.v.size(2)),
        scratch_(ctx),
        M_(scratch_.f32(count() * Hv_ * K_ * K_)),
        S_(scratch_.f32(count() * Hv_ * V_ * K_)),
        first_(scratch_.f32((args.cu_seqlens.size(0) - 1) * Hv_ * V_ * K_)),
        zeros_(static_cast<size_t>(std::max(K_, V_))) {}

  void run() {
    each(2 * count() * Hv_, [&](int64_t item, float* memory) {
      item % 2 ? transition(item / 2, memory) : contribution(item / 2, memory);
    });
    each(Hv_, [&](int64_t head, float*) { chain(head); });
    each(count() * Hv_, [&](int64_t item, float* memory) { outputs(item, memory); });
  }

 private:
  int64_t count() const { return static_cast<int64_t>(segments_.size()); }
  const Segment& segment(int64_t item) const { return segments_[static_cast<size_t>(item / Hv_)]; }
  Head head(int64_t item) const { return head_of(args_, segment(item).sequence, item % Hv_); }
  float* M(int64_t item) const { return M_ + item * K_ * K_; }  // [K, K]
  // [V, K]: C of the segment, then the state behind it.
  float* S(int64_t item) const { return S_ + item * V_ * K_; }
  // [V, K]: the state in front of the segment.
  float* before(int64_t item) const {
    const Segment& s = segment(item);
    const bool first = item < Hv_ || segment(item - Hv_).sequence != s.sequence;
    return first ? first_ + (s.sequence * Hv_ + item % Hv_) * V_ * K_ : S(item - Hv_);
  }

  void each(int64_t items, const std::function<void(int64_t, float*)>& body) {
    Scratch scratch(ctx_);
    const int64_t width = std::max(K_, V_);
    for_each_with_scratch(ctx_.pool, items, scratch, kda_panels_size(K_, width) + prefill_memory(K_, width),
                          body);
  }
  void run_rows(const Head& h, const KdaCpuHead& rows, const Segment& s, KdaProducts products,
                float* panels) const {
    prefill_rows(h, rows, s.begin, s.end, products, panels, panels + kda_panels_size(K_, rows.V));
  }

  void contribution(int64_t item, float* panels) const;
  void transition(int64_t item, float* panels) const;
  void chain(int64_t head) const;
  void outputs(int64_t item, float* panels) const;

  Ctx& ctx_;
  const KdaProducts products_;  // of the outputs; what is chained is f32
  const KdaArgs& args_;
  const std::vector<Segment> segments_;
  const int64_t Hv_, K_, V_;
  Scratch scratch_;
  float* const M_;
  float* const S_;
  float* const first_;
  const std::vector<float> zeros_;
};

// Checkpoints are for the third step: the first two know no true state.
Head without_checkpoints(const Head& h, const KdaArgs& args) {
  return {.args = args,
          .head = h.head,
          .qk_head = h.qk_head,
          .begin = h.begin,
          .end = h.end,
          .read_slot = h.read_slot,
          .write_slot = h.write_slot,
          .K = h.K,
          .V = h.V,
          .scale = h.scale};
}

void Scan::contribution(int64_t item, float* panels) const {
  const Segment& s = segment(item);
  if (s.last) return;
  KdaArgs args = args_;
  args.checkpoint_row = {};
  const Head h = without_checkpoints(head(item), args);
  const HeadGate<float> gate(args.gate, h.head, K_);
  KdaCpuHead rows = cpu_head(h, gate);
  rows.out.data = nullptr;
  load_panels(h, -1, panels);
  run_rows(h, rows, s, KdaProducts::f32, panels);
  for (int64_t i = 0; i < V_; ++i)
    for (int64_t d = 0; d < K_; ++d) S(item)[i * K_ + d] = panels[panel_index(K_, d, i)];
}

void Scan::transition(int64_t item, float* panels) const {
  const Segment& s = segment(item);
  if (s.last) return;
  KdaArgs args = args_;
  args.checkpoint_row = {};
  const Head h = without_checkpoints(head(item), args);
  const HeadGate<float> gate(args.gate, h.head, K_);
  KdaCpuHead rows = cpu_head(h, gate);
  rows.out.data = nullptr;
  rows.V = K_;
  rows.v = {reinterpret_cast<char*>(const_cast<float*>(zeros_.data())), DType::f32, 0};  // only read
  std::fill(panels, panels + kda_panels_size(K_, K_), 0.f);
  for (int64_t d = 0; d < K_; ++d) panels[panel_index(K_, d, d)] = 1;
  run_rows(h, rows, s, KdaProducts::f32, panels);
  for (int64_t d = 0; d < K_; ++d)
    for (int64_t i = 0; i < K_; ++i) M(item)[d * K_ + i] = panels[panel_index(K_, d, i)];
}

void Scan::chain(int64_t value_head) const {
  for (int64_t item = value_head; item < count() * Hv_; item += Hv_) {
    const Segment& s = segment(item);
    const Head h = head(item);
    float* const S_before = before(item);
    if (s.begin == h.begin) {
      std::fill(S_before, S_before + V_ * K_, 0.f);
      if (h.read_slot >= 0)
        for_each_of_state(h, h.read_slot, [&](auto x, int64_t d, int64_t i) {
          S_before[i * K_ + d] = static_cast<float>(x);
        });
    }
    if (!s.last) KL_ACTIVE_ISA(gemm_nt)
    ({.a = S_before,
      .lda = K_,
      .b = M(item),
      .b_dtype = DType::f32,
      .ldb = K_,
      .c = S(item),
      .ldc = K_,
      .m = V_,
      .n = K_,
      .k = K_,
      .accumulate = true});
  }
}

// All states in front have been read: what is written here may lie in a slot that one of them came from.
void Scan::outputs(int64_t item, float* panels) const {
  const Segment& s = segment(item);
  const Head h = head(item);
  if (h.begin == h.end && h.read_slot == h.write_slot) return;
  const HeadGate<float> gate(args_.gate, h.head, K_);
  const float* const S_before = before(item);
  std::fill(panels, panels + kda_panels_size(K_, V_), 0.f);
  for (int64_t i = 0; i < V_; ++i)
    for (int64_t d = 0; d < K_; ++d) panels[panel_index(K_, d, i)] = S_before[i * K_ + d];
  run_rows(h, cpu_head(h, gate), s, products_, panels);
  if (s.last) store_panels(h, panels, h.write_slot);
}

}  // namespace

void prefill_segments(Ctx& ctx, const KdaArgs& args, KdaProducts products) {
  Scan(ctx, args, products).run();
}

}  // namespace kl::kda
