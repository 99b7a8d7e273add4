// mla_append on the CPU, and where the rows of a sequence lie.
#include <cstring>

#include "ops/mla/mla_cpu.h"

namespace kl {
namespace {

constexpr int64_t kRowsPerTask = 64;  // some ten microseconds

template <class T>
void write_row(const float* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

}  // namespace

MlaRows mla_rows(const MlaCache& cache, int64_t sequence) {
  return {.rows = cache.rows.data,
          .dtype = cache.rows.dtype,
          .pages = cache.page_table.at<int32_t>(sequence),
          .page_size = cache.rows.size(1)};
}

void mla_append_cpu(Ctx& ctx, const MlaAppendArgs& a) {
  const int32_t* const cu = a.cu_seqlens.ptr<int32_t>();
  const int64_t width = a.latent.size(1), page_size = a.cache.rows.size(1);
  for (int64_t n = 0; n < a.cache.context.size(0); ++n) {
    const int32_t* const pages = a.cache.page_table.at<int32_t>(n);
    const int64_t context = *a.cache.context.at<int32_t>(n);
    parallel_for(ctx.pool, cu[n + 1] - cu[n], kRowsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t position = context + i, page = pages[position / page_size];
        const float* const latent = a.latent.at<float>(cu[n] + i);
        if (a.cache.rows.dtype == DType::f32)
          write_row(latent, width, a.cache.rows.at<float>(page, position % page_size));
        else
          write_row(latent, width, a.cache.rows.at<bf16>(page, position % page_size));
      }
    });
  }
}

}  // namespace kl
