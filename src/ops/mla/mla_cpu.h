// What the doors of MLA call on the CPU, and the kernels behind it. The doors have checked the arguments.
#pragma once

#include "ops/mla/mla.h"
#include "simd/isa.h"

namespace kl {

MlaShape mla_shape(const MlaArgs&);  // mla.cc

void mla_append_cpu(Ctx&, const MlaAppendArgs&);              // mla_append.cc
void mla_prefill_cpu(Ctx&, const MlaArgs&, const MlaShape&);  // mla_prefill.cc
void mla_decode_cpu(Ctx&, const MlaArgs&, const MlaShape&);   // mla_decode.cc

// The cached rows of one sequence.
struct MlaRows {
  const void* rows;  // [pages, page_size, R + P]
  DType dtype;       // f32|bf16
  const int32_t* pages;
  int64_t page_size;
};
MlaRows mla_rows(const MlaCache&, int64_t sequence);  // mla_append.cc

// mla_cpu.cc: keys are taken in blocks that begin at multiples of kMlaKeys of the sequence and are added in
// that order, so that a query's result has the same bits whatever the batch, the split of a prompt and the
// page size.
constexpr int64_t kMlaKeys = 128;

// Some queries of one head, all keys: out = softmax-weighted sum of values.
struct MlaPrefillHead {
  MlaShape shape;
  const float* q;  // [queries, Nk + P], rows q_stride apart
  int64_t q_stride;
  const void* w;  // [Nk + V, R]: the head's rows of kv_b_proj
  DType w_dtype;
  MlaRows rows;
  int64_t first, queries;  // query i has position first + i
  float* out;              // [queries, V], rows out_stride apart
  int64_t out_stride;
  float* memory;  // mla_prefill_memory() floats
};
constexpr int64_t kMlaQueries = 48;  // at once: their scores and inputs stay in the first-level cache
constexpr int64_t mla_prefill_memory(const MlaShape& s, int64_t queries) {
  return kMlaKeys * (s.R + s.P + s.Nk + s.P + s.V) + kMlaQueries * kMlaKeys + 2 * queries;
}

// One query, all heads, the keys [begin, end): the parts of a softmax over more keys.
struct MlaPart {
  float* max;     // [A]     of the scaled scores
  float* sum;     // [A]     of weight_j = e^(score_j - max)
  float* latent;  // [A, R]  sum_j weight_j c_j
};
struct MlaDecodePart {
  MlaShape shape;
  const float* q;  // [A, R + P]: W_UKᵀ q_nope | q_pe
  MlaRows rows;
  int64_t begin, end;  // begin: a multiple of kMlaKeys
  MlaPart part;
  float* memory;  // [A, kMlaKeys]
};

// One head of one query: latent = sum_j softmax_j c_j from parts that lie A heads apart.
struct MlaJoin {
  MlaShape shape;
  MlaPart first;  // the head in the first part
  int64_t parts;
  float* latent;  // [R]
};

KL_DECLARE_PER_ISA(void mla_prefill_head(const MlaPrefillHead&); void mla_decode_part(const MlaDecodePart&);
                   void mla_join(const MlaJoin&);)

}  // namespace kl
