// What `bench ops` measures: each operator at the shapes that a model gives it.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/context.h"
#include "model/model.h"

namespace kl::app {

// One operator at one shape: `run` calls it once; call i may use other weights than call i - 1, so that
// caches hold no more than in the model.
struct BenchCase {
  std::string name, shape;
  std::function<void(Ctx&, int64_t call)> run;
};

struct BenchCases {
  std::vector<OwnedTensor> operands;
  std::vector<BenchCase> cases;  // valid as long as the model and the operands
};
BenchCases make_bench_cases(const Model&);

}  // namespace kl::app
