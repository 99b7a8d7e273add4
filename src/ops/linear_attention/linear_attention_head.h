// The work of linear attention: one value head of one sequence.
#pragma once

#include "ops/linear_attention/linear_attention.h"

namespace kl::linear_attention {

using recurrence::Head;

template <class Real>
void recurrent_head(const LinearAttentionArgs&, const Head&);  // linear_attention_ref.cc; float or double
void chunk_head(const LinearAttentionArgs&, const Head&);      // linear_attention_chunk_ref.cc

recurrence::Problem problem_of(const LinearAttentionArgs&);

}  // namespace kl::linear_attention
