// kimi-linear eval claims: the paper's claims that need neither a GPU nor training, measured here and now.
#include <cstdio>

#include "commands.h"
#include "eval/claims.h"
#include "load.h"
#include "table.h"
#include "terminal.h"

namespace kl::app {

namespace {

Table::Cell number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", value);
  return {value, text};
}

}  // namespace

int eval_claims(const ClaimsOptions& options) {
  choose_isa(options.isa);
  ThreadPool pool(options.threads > 0 ? options.threads : available_processors());
  Table table(table_format(options.format), {{"id", 4, true},
                                             {"what", 76, true},
                                             {"measured", 10},
                                             {"bound", 8, true},
                                             {"required", 9},
                                             {"verdict", 7, true},
                                             {"paper", 20, true}});
  bool good = true;
  const auto print_rows = [&](const std::vector<Claim>& claims) {
    KL_CHECK(!interrupted, "interrupted");
    for (const Claim& c : claims) {
      good &= c.pass();
      table.row({c.id, c.what, number(c.measured), c.bound == ClaimBound::at_most ? "at most" : "at least",
                 number(c.required), c.pass() ? "ok" : "MISS", c.paper});
    }
  };
  print_rows(chunk_form_claims(&pool));
  print_rows(overwrite_claims(&pool));
  print_rows(reduction_claims(&pool));
  print_rows(cache_claims(kimi_linear_48b_attention()));
  print_rows(long_run_claims(&pool));
  table.finish();
  return good ? 0 : 1;
}

}  // namespace kl::app
