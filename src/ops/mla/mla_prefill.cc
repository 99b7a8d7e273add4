// mla_prefill on the CPU: a task is a head of a span of queries of one sequence. It expands every key that
// the span sees once and holds one block of them.
#include <algorithm>
#include <vector>

#include "ops/mla/mla_cpu.h"
#include "simd/scratch.h"

namespace kl {
namespace {

struct Span {
  int64_t sequence, row, queries;  // rows [row, row + queries) of the batch
};

// Expanding a key costs as much as 400 queries that look at it, so spans are long; shorter where that leaves
// threads without work. The result does not depend on them.
constexpr int64_t kLongestSpan = 2048, kShortestSpan = 256;

std::vector<Span> make_spans(const MlaArgs& a, int threads) {
  const int64_t tasks = 4 * threads;  // some per thread, because those with more keys take longer
  const int64_t longest = std::clamp(a.q.size(0) * a.q.size(1) / tasks, kShortestSpan, kLongestSpan);
  const int32_t* const cu = a.cu_seqlens.ptr<int32_t>();
  std::vector<Span> spans;
  for (int64_t n = 0; n < a.cache.context.size(0); ++n)
    for (int64_t row = cu[n]; row < cu[n + 1]; row += longest)
      spans.push_back({n, row, std::min<int64_t>(longest, cu[n + 1] - row)});
  return spans;
}

}  // namespace

int64_t mla_prefill_scratch_bytes(const MlaShape& s, int64_t T, int threads) {
  return threads * mla_prefill_memory(s, std::min(T, kLongestSpan)) * int64_t{sizeof(float)};
}

void mla_prefill_cpu(Ctx& ctx, const MlaArgs& a, const MlaShape& s) {
  const std::vector<Span> spans = make_spans(a, ctx.pool ? ctx.pool->threads() : 1);
  int64_t most = 0;
  for (const Span& span : spans) most = std::max(most, span.queries);
  const int32_t* const cu = a.cu_seqlens.ptr<int32_t>();
  Scratch scratch(ctx);
  for_each_with_scratch(
      ctx.pool, static_cast<int64_t>(spans.size()) * s.A, scratch, mla_prefill_memory(s, most),
      [&](int64_t task, float* memory) {
        const Span& span = spans[task / s.A];
        const int64_t head = task % s.A;
        const MlaPrefillHead job = {
            .shape = s,
            .q = a.q.at<float>(span.row, head),
            .q_stride = a.q.stride[0],
            .w = static_cast<const char*>(a.kv_b_proj.data) +
                 head * (s.Nk + s.V) * s.R * size_of(a.kv_b_proj.dtype),
            .w_dtype = a.kv_b_proj.dtype,
            .rows = mla_rows(a.cache, span.sequence),
            .first = *a.cache.context.at<int32_t>(span.sequence) + span.row - cu[span.sequence],
            .queries = span.queries,
            .out = a.out.at<float>(span.row, head),
            .out_stride = a.out.stride[0],
            .memory = memory};
        KL_ACTIVE_ISA(mla_prefill_head)(job);
      });
}

}  // namespace kl
