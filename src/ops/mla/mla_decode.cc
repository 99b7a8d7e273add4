// mla_decode on the CPU: W_UK moves to the queries, the cache is read in parts that threads share, all heads
// of a query together, then the parts are joined and W_UV applied.
#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/mla/mla_cpu.h"
#include "simd/gemm.h"
#include "simd/scratch.h"

namespace kl {
namespace {

// A query's keys are split by their number alone, so that the result depends on nothing else.
constexpr int64_t kMostParts = 32, kSmallestPart = 2 * kMlaKeys;
constexpr int64_t kPartsAtOnce = 256;  // bounds the scratch: 16 MiB with 32 heads and latents of 512

struct Query {
  int64_t row, sequence, keys, part_keys, first_part;
  int64_t parts() const { return (keys + part_keys - 1) / part_keys; }
};

int64_t keys_per_part(int64_t keys) {
  const int64_t even = (keys + kMostParts - 1) / kMostParts;
  return std::max(kSmallestPart, (even + kMlaKeys - 1) / kMlaKeys * kMlaKeys);
}

std::vector<Query> make_queries(const MlaArgs& a) {
  const int32_t* const cu = a.cu_seqlens.ptr<int32_t>();
  std::vector<Query> queries;
  for (int64_t n = 0; n < a.cache.context.size(0); ++n)
    for (int64_t row = cu[n]; row < cu[n + 1]; ++row) {
      const int64_t keys = *a.cache.context.at<int32_t>(n) + row - cu[n] + 1;
      queries.push_back({row, n, keys, keys_per_part(keys), 0});
    }
  return queries;
}

// Row `row` of head `head` of kv_b_proj: rows [0, Nk) are W_UK, [Nk, Nk + V) W_UV.
const void* head_weight(const MlaArgs& a, const MlaShape& s, int64_t head, int64_t row) {
  return static_cast<const char*>(a.kv_b_proj.data) +
         (head * (s.Nk + s.V) + row) * s.R * size_of(a.kv_b_proj.dtype);
}

// absorbed [T, A, R + P] = W_UKᵀ q_nope | q_pe
void absorb(Ctx& ctx, const MlaArgs& a, const MlaShape& s, float* absorbed) {
  const int64_t T = a.q.size(0), width = s.R + s.P;
  parallel_for(ctx.pool, s.A, 1, [&](int64_t head, int64_t) {
    float* const to = absorbed + head * width;
    const Gemm g = {.a = a.q.at<float>(0, head),
                    .lda = a.q.stride[0],
                    .b = head_weight(a, s, head, 0),
                    .b_dtype = a.kv_b_proj.dtype,
                    .ldb = s.R,
                    .c = to,
                    .ldc = s.A * width,
                    .m = T,
                    .n = s.R,
                    .k = s.Nk};
    KL_ACTIVE_ISA(gemm_nn)(g);
    for (int64_t t = 0; t < T; ++t)
      std::memcpy(to + t * s.A * width + s.R, a.q.at<float>(t, head, s.Nk),
                  static_cast<size_t>(s.P) * sizeof(float));
  });
}

// out = W_UV latent, latent [T, A, R]
void project(Ctx& ctx, const MlaArgs& a, const MlaShape& s, const float* latent) {
  parallel_for(ctx.pool, s.A, 1, [&](int64_t head, int64_t) {
    const Gemm g = {.a = latent + head * s.R,
                    .lda = s.A * s.R,
                    .b = head_weight(a, s, head, s.Nk),
                    .b_dtype = a.kv_b_proj.dtype,
                    .ldb = s.R,
                    .c = a.out.at<float>(0, head),
                    .ldc = a.out.stride[0],
                    .m = a.q.size(0),
                    .n = s.V,
                    .k = s.R};
    KL_ACTIVE_ISA(gemm_nt)(g);
  });
}

// The parts of several queries, each with maxima and sums of all heads and their latents.
struct Parts {
  const MlaShape& s;
  float *max, *sum, *latent;
  Parts(const MlaShape& shape, int64_t n, Scratch& scratch)
      : s(shape), max(scratch.f32(n * s.A)), sum(scratch.f32(n * s.A)), latent(scratch.f32(n * s.A * s.R)) {}
  MlaPart at(int64_t part, int64_t head) const {
    const int64_t i = part * s.A + head;
    return {.max = max + i, .sum = sum + i, .latent = latent + i * s.R};
  }
};

// latent [T, A, R] of queries [begin, end).
void attend(Ctx& ctx, const MlaArgs& a, const MlaShape& s, const float* absorbed, const Query* begin,
            const Query* end, float* latent) {
  std::vector<const Query*> query_of;
  for (const Query* q = begin; q < end; ++q) query_of.insert(query_of.end(), q->parts(), q);
  const int64_t n = static_cast<int64_t>(query_of.size());
  Scratch scratch(ctx);
  const Parts parts(s, n, scratch);
  for_each_with_scratch(ctx.pool, n, scratch, s.A * kMlaKeys, [&](int64_t part, float* memory) {
    const Query& q = *query_of[part];
    const int64_t first = (part - (q.first_part - begin->first_part)) * q.part_keys;
    const MlaDecodePart job = {.shape = s,
                               .q = absorbed + q.row * s.A * (s.R + s.P),
                               .rows = mla_rows(a.cache, q.sequence),
                               .begin = first,
                               .end = std::min(q.keys, first + q.part_keys),
                               .part = parts.at(part, 0),
                               .memory = memory};
    KL_ACTIVE_ISA(mla_decode_part)(job);
  });
  parallel_for(ctx.pool, (end - begin) * s.A, 8, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      const Query& q = begin[i / s.A];
      const MlaJoin job = {.shape = s,
                           .first = parts.at(q.first_part - begin->first_part, i % s.A),
                           .parts = q.parts(),
                           .latent = latent + (q.row * s.A + i % s.A) * s.R};
      KL_ACTIVE_ISA(mla_join)(job);
    }
  });
}

}  // namespace

int64_t mla_decode_scratch_bytes(const MlaShape& s, int64_t T, int threads) {
  const int64_t floats =
      T * s.A * (s.R + s.P) + T * s.A * s.R + kPartsAtOnce * s.A * (s.R + 2) + threads * s.A * kMlaKeys;
  return floats * int64_t{sizeof(float)};
}

void mla_decode_cpu(Ctx& ctx, const MlaArgs& a, const MlaShape& s) {
  std::vector<Query> queries = make_queries(a);
  Scratch scratch(ctx);
  float* const absorbed = scratch.f32(a.q.size(0) * s.A * (s.R + s.P));
  float* const latent = scratch.f32(a.q.size(0) * s.A * s.R);
  absorb(ctx, a, s, absorbed);
  int64_t parts = 0;
  for (Query& q : queries) q.first_part = parts, parts += q.parts();
  const Query* const end = queries.data() + queries.size();
  for (const Query *first = queries.data(), *last; first < end; first = last) {
    for (last = first + 1;
         last < end && last->first_part + last->parts() - first->first_part <= kPartsAtOnce;)
      ++last;
    attend(ctx, a, s, absorbed, first, last, latent);
  }
  project(ctx, a, s, latent);
}

}  // namespace kl
