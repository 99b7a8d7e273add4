// What a chunk of KDA needs before it meets the state: the factors of its products. Only for x_cpu.cc files.
#pragma once

#include "ops/kda/kda_cpu.h"

namespace kl::KL_ISA {

class RowsAhead;

// Of up to C = kKdaChunk tokens; rows are kda_padded(K) wide, those of tokens that do not exist are zero.
struct KdaFactors {
  static constexpr int64_t C = kKdaChunk;

  float *q_in, *k_in;    // [C, K] decayed from the start of the chunk through the row
  float* k_out;          // [C, K] decayed from behind the row to the end of the chunk
  float* g;              // [C, K] scratch
  float *keep, *change;  // [K] decay of the state over the chunk, a Decay
  float Akk[C][C];       // below the diagonal
  float Aqk[C][C];       // on it too
  float beta[C];

  // Takes the rows out of `memory`, and moves it on.
  KdaFactors(int64_t K, float*& memory) {
    for (float** rows : {&q_in, &k_in, &k_out, &g}) *rows = memory, memory += C * kda_padded(K);
    for (float** row : {&keep, &change}) *row = memory, memory += kda_padded(K);
  }
};

// kda_factors_cpu.cc: tokens [begin, begin + n), n from 1 to C; beta is read as a logit. `rounded`: to a few
// 1e-6, for products of bf16. Takes kKdaFactorSteps steps of `ahead`.
void kda_factors(const KdaCpuHead&, int64_t begin, int64_t n, bool rounded, RowsAhead& ahead, KdaFactors&);
constexpr int64_t kKdaFactorSteps = 28;

}  // namespace kl::KL_ISA
