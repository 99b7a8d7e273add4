// The work of DPLR: one head of one sequence.
#pragma once

#include "ops/dplr/dplr.h"

namespace kl::dplr {

using recurrence::Head;

template <class Real>
void recurrent_head(const DplrArgs&, const Head&);  // dplr_ref.cc; float or double
void chunk_head(const DplrArgs&, const Head&);      // dplr_chunk_ref.cc

recurrence::Problem problem_of(const DplrArgs&);

}  // namespace kl::dplr
