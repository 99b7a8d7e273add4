// kimi-linear bench ops: single operators at the shapes of a model, with its weights and random activations.
// Bytes and operations are those that the operator states (Ctx::trace). The roofline is the larger of the
// times that the memory needs for the bytes and the multiply-add units for the operations; small operands
// that stay in a cache can pass it.
#include <algorithm>

#include "bench_cases.h"
#include "commands.h"
#include "load.h"
#include "simd/probe.h"
#include "statistics.h"
#include "table.h"
#include "terminal.h"

namespace kl::app {

namespace {

// Seconds of each call: at least five and as many as fit `seconds`.
std::vector<double> measure(const BenchCase& c, Ctx& ctx, double seconds) {
  std::vector<double> samples;
  c.run(ctx, 0);  // pages in, wakes up
  const double begin = now();
  for (int64_t call = 1; call <= 5 || now() - begin < seconds; ++call) {
    KL_CHECK(!interrupted, "interrupted");
    ctx.scratch->reset();
    const double start = now();
    c.run(ctx, call);
    samples.push_back(now() - start);
  }
  return samples;
}

}  // namespace

int bench_ops(const BenchOpsOptions& options) {
  const Model model = open_model(options.model);
  ThreadPool pool = make_pool(options.model);
  const PinnedCaller pinned(pool);
  const Roofline roofline = measure_roofline(pool);
  const BenchCases all = make_bench_cases(model);
  Table table(table_format(options.format), {{"operator", 22, true},
                                             {"shape", 40, true},
                                             {"median us", 10, false},
                                             {"spread %", 8, false},
                                             {"GFLOP/s", 9, false},
                                             {"GB/s", 7, false},
                                             {"% roofline", 10, false}});
  for (const BenchCase& c : all.cases) {
    if (c.name.find(options.only) == std::string::npos) continue;
    Arena scratch;
    Trace trace;
    Ctx ctx = {.pool = &pool, .scratch = &scratch, .trace = &trace};
    ctx.precision = engine_options(options.model).precision;
    c.run(ctx, 0);
    double bytes = 0, flops = 0;
    for (const auto& [name, entry] : trace.entries()) bytes += entry.bytes, flops += entry.flops;
    ctx.trace = nullptr;
    const std::vector<double> samples = measure(c, ctx, options.seconds);
    const double median = quantile(samples, 0.5);
    const double spread = 100 * (quantile(samples, 0.9) - quantile(samples, 0.1)) / median;
    const double least = std::max(bytes / roofline.bytes_per_second, flops / roofline.flops_per_second);
    const auto cell = [](double value, int digits) { return Table::Cell(value, fixed(value, digits)); };
    table.row({c.name, c.shape, cell(median * 1e6, 1), cell(spread, 0), cell(flops / median / 1e9, 1),
               cell(bytes / median / 1e9, 1), cell(100 * least / median, 1)});
  }
  table.finish();
  if (table_format(options.format) == TableFormat::md) {
    print(cat("\n", model.checkpoint.directory(), ", CPU ", name_of(active_isa()),
              options.model.precision == "bf16" ? " bf16, " : ", ", pool.threads(),
              pool.threads() == 1 ? " thread" : " threads",
              "; spread: from the 10th to the 90th percentile\n", "roofline, measured before: memory ",
              fixed(roofline.bytes_per_second / 1e9, 1), " GB/s, multiply-add ",
              fixed(roofline.flops_per_second / 1e9, 1), " GFLOP/s\n"));
  }
  return 0;
}

}  // namespace kl::app
