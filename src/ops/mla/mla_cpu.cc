// Attention of MLA: softmax over blocks of keys with a running maximum and sum, so that no query's scores are
// ever held for all keys.
#include "ops/mla/mla_cpu.h"

#include "simd/gemm.h"
#include "simd/vec.h"

namespace kl::KL_ISA {
namespace {

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

float scale_of(const MlaShape& s) { return 1 / __builtin_sqrtf(static_cast<float>(s.Nk + s.P)); }

// x *= factor
void scale_row(float* x, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load(x + i) * factor);
  if (i < n) store_part(x + i, load_part(x + i, n - i) * factor, n - i);
}

// Turns the scores of a block into weights e^(scale · score - max) with the running maximum, adds them to the
// running sum, and returns what everything summed before has to be multiplied with. Begins with max = -inf.
float softmax_block(float* scores, int64_t n, float scale, float& max_so_far, float& sum_so_far) {
  constexpr float kNone = -__builtin_inff();
  const int64_t whole = n / kLanes * kLanes;
  Vec best = n > whole ? load_part(scores + whole, n - whole, kNone) : broadcast(kNone);
  for (int64_t i = 0; i < whole; i += kLanes) best = max(load(scores + i), best);
  const float old_max = max_so_far, block_max = scale * max(best);
  max_so_far = block_max > old_max ? block_max : old_max;

  Vec sums{};
  const auto weigh = [&](Vec score) {
    const Vec weight = exp(scale * score - max_so_far);
    sums += weight;
    return weight;
  };
  for (int64_t i = 0; i < whole; i += kLanes) store(scores + i, weigh(load(scores + i)));
  if (n > whole) store_part(scores + whole, weigh(load_part(scores + whole, n - whole, kNone)), n - whole);
  const float factor = exp(broadcast(old_max - max_so_far))[0];
  sum_so_far = sum_so_far * factor + sum(sums);
  return factor;
}

// f(row, position, n) for runs of n keys of [begin, end) that lie in one page.
template <class F>
void for_each_run(const MlaRows& rows, int64_t width, int64_t begin, int64_t end, F&& f) {
  for (int64_t position = begin; position < end;) {
    const int64_t in_page = position % rows.page_size, n = min(end - position, rows.page_size - in_page);
    const int64_t row = rows.pages[position / rows.page_size] * rows.page_size + in_page;
    f(static_cast<const char*>(rows.rows) + row * width * size_of(rows.dtype), position, n);
    position += n;
  }
}

template <class T>
void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store_part(to + i, load_part(from + i, n - i), n - i);
}

void widen(const void* from, DType dtype, int64_t n, float* to) {
  dtype == DType::f32 ? widen(static_cast<const float*>(from), n, to)
                      : widen(static_cast<const bf16*>(from), n, to);
}

// A block of keys of one head, expanded.
struct Expanded {
  float* rows;    // [kMlaKeys, R + P] as in the cache
  float* keys;    // [kMlaKeys, Nk + P]
  float* values;  // [kMlaKeys, V]
};

void expand(const MlaPrefillHead& h, int64_t begin, int64_t n, const Expanded& to) {
  const MlaShape& s = h.shape;
  const int64_t width = s.R + s.P, key_width = s.Nk + s.P;
  for_each_run(h.rows, width, begin, begin + n, [&](const void* row, int64_t position, int64_t count) {
    widen(row, h.rows.dtype, count * width, to.rows + (position - begin) * width);
  });
  Gemm g = {.a = to.rows,
            .lda = width,
            .b = h.w,
            .b_dtype = h.w_dtype,
            .ldb = s.R,
            .c = to.keys,
            .ldc = key_width,
            .m = n,
            .n = s.Nk,
            .k = s.R};
  gemm_nt(g);
  g.b = static_cast<const char*>(h.w) + s.Nk * s.R * size_of(h.w_dtype);
  g.c = to.values, g.ldc = s.V, g.n = s.V;
  gemm_nt(g);
  for (int64_t j = 0; j < n; ++j) widen(to.rows + j * width + s.R, s.P, to.keys + j * key_width + s.Nk);
}

// Queries [q, q + m) of the span against n keys from position `begin`; every query sees the first of them.
void attend(const MlaPrefillHead& h, int64_t q, int64_t m, int64_t begin, int64_t n, const Expanded& block,
            float* scores, float* max, float* sum) {
  const MlaShape& s = h.shape;
  const float scale = scale_of(s);
  gemm_nt({.a = h.q + q * h.q_stride,
           .lda = h.q_stride,
           .b = block.keys,
           .b_dtype = DType::f32,
           .ldb = s.Nk + s.P,
           .c = scores,
           .ldc = kMlaKeys,
           .m = m,
           .n = n,
           .k = s.Nk + s.P});
  for (int64_t i = 0; i < m; ++i) {
    const int64_t visible = min(n, h.first + q + i - begin + 1);
    const float factor = softmax_block(scores + i * kMlaKeys, visible, scale, max[q + i], sum[q + i]);
    if (begin > 0) scale_row(h.out + (q + i) * h.out_stride, s.V, factor);
  }
  Gemm weighted = {.a = scores,
                   .lda = kMlaKeys,
                   .b = block.values,
                   .b_dtype = DType::f32,
                   .ldb = s.V,
                   .c = h.out + q * h.out_stride,
                   .ldc = h.out_stride,
                   .m = m,
                   .n = s.V,
                   .k = n,
                   .accumulate = begin > 0};
  if (h.first + q - begin + 1 >= n) return gemm_nn(weighted);
  // On the diagonal each query has its own number of keys. A weight of 0 for the others would do for numbers,
  // but not for the NaN of a later token.
  weighted.m = 1;
  for (int64_t i = 0; i < m; ++i) {
    weighted.k = min(n, h.first + q + i - begin + 1);
    gemm_nn(weighted);
    weighted.a += kMlaKeys, weighted.c += h.out_stride;
  }
}

}  // namespace

void mla_prefill_head(const MlaPrefillHead& h) {
  const MlaShape& s = h.shape;
  float* memory = h.memory;
  const auto take = [&](int64_t n) { return (memory += n) - n; };
  const Expanded block = {.rows = take(kMlaKeys * (s.R + s.P)),
                          .keys = take(kMlaKeys * (s.Nk + s.P)),
                          .values = take(kMlaKeys * s.V)};
  float* const scores = take(kMlaQueries * kMlaKeys);
  float* const max = take(h.queries);
  float* const sum = take(h.queries);
  for (int64_t i = 0; i < h.queries; ++i) max[i] = -__builtin_inff(), sum[i] = 0;

  for (int64_t begin = 0; begin < h.first + h.queries; begin += kMlaKeys) {
    const int64_t n = min(kMlaKeys, h.first + h.queries - begin);
    expand(h, begin, n, block);
    for (int64_t q = begin > h.first ? begin - h.first : 0; q < h.queries; q += kMlaQueries)
      attend(h, q, min(kMlaQueries, h.queries - q), begin, n, block, scores, max, sum);
  }
  for (int64_t i = 0; i < h.queries; ++i) scale_row(h.out + i * h.out_stride, s.V, 1 / sum[i]);
}

void mla_decode_part(const MlaDecodePart& d) {
  const MlaShape& s = d.shape;
  const int64_t width = s.R + s.P;
  const float scale = scale_of(s);
  for (int64_t h = 0; h < s.A; ++h) d.part.max[h] = -__builtin_inff(), d.part.sum[h] = 0;
  for (int64_t begin = d.begin; begin < d.end; begin += kMlaKeys) {
    const int64_t end = min(begin + kMlaKeys, d.end);
    for_each_run(d.rows, width, begin, end, [&](const void* rows, int64_t position, int64_t n) {
      gemm_nt({.a = d.q,
               .lda = width,
               .b = rows,
               .b_dtype = d.rows.dtype,
               .ldb = width,
               .c = d.memory + position - begin,
               .ldc = kMlaKeys,
               .m = s.A,
               .n = n,
               .k = width});
    });
    for (int64_t h = 0; h < s.A; ++h) {
      const float factor =
          softmax_block(d.memory + h * kMlaKeys, end - begin, scale, d.part.max[h], d.part.sum[h]);
      if (begin > d.begin) scale_row(d.part.latent + h * s.R, s.R, factor);
    }
    for_each_run(d.rows, width, begin, end, [&](const void* rows, int64_t position, int64_t n) {
      gemm_nn({.a = d.memory + position - begin,
               .lda = kMlaKeys,
               .b = rows,
               .b_dtype = d.rows.dtype,
               .ldb = width,
               .c = d.part.latent,
               .ldc = s.R,
               .m = s.A,
               .n = s.R,
               .k = n,
               .accumulate = position > d.begin});
    });
  }
}

void mla_join(const MlaJoin& j) {
  const MlaShape& s = j.shape;
  float top = -__builtin_inff(), sum = 0;
  for (int64_t p = 0; p < j.parts; ++p) top = j.first.max[p * s.A] > top ? j.first.max[p * s.A] : top;
  const auto weight = [&](int64_t p) { return exp(broadcast(j.first.max[p * s.A] - top))[0]; };
  for (int64_t p = 0; p < j.parts; ++p) sum += weight(p) * j.first.sum[p * s.A];
  for (int64_t r = 0; r < s.R; ++r) j.latent[r] = 0;
  for (int64_t p = 0; p < j.parts; ++p) {
    const float w = weight(p) / sum;
    const float* const latent = j.first.latent + p * s.A * s.R;
    for (int64_t r = 0; r < s.R; ++r) j.latent[r] += w * latent[r];
  }
}

}  // namespace kl::KL_ISA
