// The doors of MLA: what must fit together, and which back-end runs.
#include <algorithm>

#include "ops/mla/mla_cpu.h"

namespace kl {
namespace {

void check_operand(const std::string& name, const Tensor& t, std::initializer_list<DType> dtypes,
                   Device device) {
  check_dtype(name, t, dtypes);
  check_device(name, t, device);
  check_rows(name, t);
}

void check_cache(const std::string& op, const MlaCache& c, const Tensor& cu_seqlens, int64_t width,
                 Device device) {
  check_shape(op + ": cu_seqlens", cu_seqlens, {-1});
  const int64_t N = cu_seqlens.size(0) - 1;
  KL_CHECK(N >= 0, op, ": cu_seqlens: expected at least one element, found none");
  check_shape(op + ": cache.rows", c.rows, {-1, -1, width});
  check_shape(op + ": cache.page_table", c.page_table, {N, -1});
  check_shape(op + ": cache.context", c.context, {N});
  check_operand(op + ": cu_seqlens", cu_seqlens, {DType::i32}, device);
  check_operand(op + ": cache.rows", c.rows, {DType::f32, DType::bf16}, device);
  check_operand(op + ": cache.page_table", c.page_table, {DType::i32}, device);
  check_operand(op + ": cache.context", c.context, {DType::i32}, device);
  KL_CHECK(c.rows.is_contiguous(), op, ": cache.rows: expected a contiguous tensor");
  KL_CHECK(c.rows.size(1) >= 1, op, ": cache.rows: expected pages of at least one row, found none");
}

void check_pages(const std::string& op, const MlaCache& c, int64_t n, int64_t rows) {
  const int64_t page_size = c.rows.size(1), needed = (rows + page_size - 1) / page_size;
  KL_CHECK(needed <= c.page_table.size(1), op, ": sequence ", n, ": ", rows, " rows need ", needed,
           " pages of ", page_size, ", but the page table has room for ", c.page_table.size(1));
  for (int64_t i = 0; i < needed; ++i) {
    const int32_t page = *c.page_table.at<int32_t>(n, i);
    KL_CHECK(page >= 0 && page < c.rows.size(0), op, ": page_table[", n, ", ", i, "]: expected 0 to ",
             c.rows.size(0) - 1, ", found ", page);
  }
}

// What is in the index tensors; only where the host can read them. A sequence without rows in this batch may
// have anything in its page table.
void check_sequences(const std::string& op, const MlaCache& c, const Tensor& cu_seqlens, int64_t T) {
  const int64_t N = c.context.size(0);
  const int32_t* const cu = cu_seqlens.ptr<int32_t>();
  KL_CHECK(cu[0] == 0 && cu[N] == T, op, ": cu_seqlens: expected to run from 0 to ", T, ", found ", cu[0],
           " to ", cu[N]);
  for (int64_t n = 0; n < N; ++n) {
    KL_CHECK(cu[n] <= cu[n + 1], op, ": cu_seqlens: expected ascending numbers, found ", cu[n], " before ",
             cu[n + 1]);
    const int64_t length = cu[n + 1] - cu[n], context = *c.context.at<int32_t>(n);
    KL_CHECK(context >= 0, op, ": context[", n, "]: expected at least 0, found ", context);
    if (length > 0) check_pages(op, c, n, context + length);
  }
}

void check_args(const std::string& op, const MlaArgs& a, Device device) {
  check_shape(op + ": q", a.q, {-1, -1, -1});
  const int64_t T = a.q.size(0), A = a.q.size(1);
  KL_CHECK(A >= 1, op, ": q: expected at least one head, found none");
  check_shape(op + ": out", a.out, {T, A, -1});
  check_shape(op + ": kv_b_proj", a.kv_b_proj, {-1, -1});
  const MlaShape s = mla_shape(a);
  KL_CHECK(s.V >= 1 && s.R >= 1 && s.Nk + s.P >= 1, op,
           ": expected values, latents and keys of at least one ", "element, found ", s.V, ", ", s.R, " and ",
           s.Nk + s.P);
  KL_CHECK(s.Nk >= 0 && s.P >= 0 && a.kv_b_proj.size(0) == A * (s.Nk + s.V), op, ": kv_b_proj: expected ", A,
           " heads of ", s.V, " value rows and up to ", s.Nk + s.P, " key rows, found ", a.kv_b_proj.size(0),
           " rows");
  check_operand(op + ": q", a.q, {DType::f32}, device);
  check_operand(op + ": out", a.out, {DType::f32}, device);
  check_operand(op + ": kv_b_proj", a.kv_b_proj, {DType::f32, DType::bf16, DType::f16}, device);
  KL_CHECK(a.kv_b_proj.is_contiguous(), op, ": kv_b_proj: expected a contiguous tensor");
  KL_CHECK(a.out.numel() == 0 || a.out.data != a.q.data, op, ": out: expected other memory than that of q");
  check_cache(op, a.cache, a.cu_seqlens, s.R + s.P, device);
}

// What a call has to do, summed over its sequences.
struct Work {
  double keys = 0;   // rows of the cache
  double pairs = 0;  // queries times the keys that they see
};

Work work_of(const MlaCache& c, const Tensor& cu_seqlens) {
  Work work;
  for (int64_t n = 0; n < c.context.size(0); ++n) {
    const double length = cu_seqlens.ptr<int32_t>()[n + 1] - cu_seqlens.ptr<int32_t>()[n];
    const double context = *c.context.at<int32_t>(n);
    if (length == 0) continue;
    work.keys += context + length, work.pairs += length * (context + (length + 1) / 2);
  }
  return work;
}

double bytes_of(const MlaArgs& a, const Work& work) {
  const double row = static_cast<double>(a.cache.rows.size(2) * size_of(a.cache.rows.dtype));
  return static_cast<double>(a.q.bytes() + a.kv_b_proj.bytes() + a.out.bytes()) + row * work.keys;
}

void prefill_on_cpu(Ctx& ctx, const MlaArgs& a) {
  check_sequences("mla_prefill", a.cache, a.cu_seqlens, a.q.size(0));
  const MlaShape s = mla_shape(a);
  const Work work = work_of(a.cache, a.cu_seqlens);
  const double flops = work.keys * static_cast<double>(2 * s.R * (s.Nk + s.V)) +
                       work.pairs * static_cast<double>(2 * (s.Nk + s.P + s.V));
  const TraceScope trace(ctx.trace, "mla_prefill", bytes_of(a, work), static_cast<double>(s.A) * flops);
  mla_prefill_cpu(ctx, a, s);
}

void decode_on_cpu(Ctx& ctx, const MlaArgs& a) {
  check_sequences("mla_decode", a.cache, a.cu_seqlens, a.q.size(0));
  const MlaShape s = mla_shape(a);
  const Work work = work_of(a.cache, a.cu_seqlens);
  const double flops = static_cast<double>(a.q.size(0)) * static_cast<double>(2 * s.R * (s.Nk + s.V)) +
                       work.pairs * static_cast<double>(2 * (s.R + s.P + s.R));
  const TraceScope trace(ctx.trace, "mla_decode", bytes_of(a, work), static_cast<double>(s.A) * flops);
  mla_decode_cpu(ctx, a, s);
}

}  // namespace

MlaShape mla_shape(const MlaArgs& a) {
  const int64_t A = a.q.size(1), V = a.out.size(2), Nk = a.kv_b_proj.size(0) / A - V;
  return {.A = A, .Nk = Nk, .P = a.q.size(2) - Nk, .R = a.kv_b_proj.size(1), .V = V};
}

void mla_append(Ctx& ctx, const MlaAppendArgs& a) {
  check_shape("mla_append: latent", a.latent, {-1, -1});
  check_operand("mla_append: latent", a.latent, {DType::f32}, ctx.device);
  check_cache("mla_append", a.cache, a.cu_seqlens, a.latent.size(1), ctx.device);
  if (ctx.device == Device::cpu) check_sequences("mla_append", a.cache, a.cu_seqlens, a.latent.size(0));
  const double row = static_cast<double>(4 + size_of(a.cache.rows.dtype));
  const TraceScope trace(ctx.trace, "mla_append", row * static_cast<double>(a.latent.numel()), 0);
  switch (ctx.device) {
    case Device::cpu: return mla_append_cpu(ctx, a);
    case Device::cuda: KL_CHECK(false, "mla_append: asked to run on cuda, where it has no kernel");
  }
}

void mla_prefill(Ctx& ctx, const MlaArgs& a) {
  check_args("mla_prefill", a, ctx.device);
  switch (ctx.device) {
    case Device::cpu: return prefill_on_cpu(ctx, a);
    case Device::cuda: KL_CHECK(false, "mla_prefill: asked to run on cuda, where it has no kernel");
  }
}

void mla_decode(Ctx& ctx, const MlaArgs& a) {
  check_args("mla_decode", a, ctx.device);
  switch (ctx.device) {
    case Device::cpu: return decode_on_cpu(ctx, a);
    case Device::cuda: KL_CHECK(false, "mla_decode: asked to run on cuda, where it has no kernel");
  }
}

}  // namespace kl
