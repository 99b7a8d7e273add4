// The whole table.
#include "eval/claims.h"

namespace kl {

std::vector<Claim> all_claims(ThreadPool* pool) {
  std::vector<Claim> all;
  for (const std::vector<Claim>& group :
       {chunk_form_claims(pool), overwrite_claims(pool), reduction_claims(pool),
        cache_claims(kimi_linear_48b_attention()), long_run_claims(pool)})
    all.insert(all.end(), group.begin(), group.end());
  return all;
}

}  // namespace kl
