// The paper's claims that need neither a GPU nor training, measured with the operators of this library. Each
// function measures and returns rows for a table; a row that falls short says so and stays in the table.
#pragma once

#include <string>
#include <vector>

#include "base/parallel.h"
#include "model/config.h"

namespace kl {

enum class ClaimBound { at_most, at_least };

struct Claim {
  std::string id;    // of the group: "R1"
  std::string what;  // in words, with the sizes
  double measured = 0;
  ClaimBound bound = ClaimBound::at_most;
  double required = 0;
  std::string paper;  // what the paper says about it; empty: it gives no number

  // A measurement that is not a number has failed.
  bool pass() const { return bound == ClaimBound::at_most ? measured <= required : measured >= required; }
};

// R1: the chunkwise form of KDA is exact. Gates from none to -20 a step, equal and unequal keys, ragged and
// empty sequences, initial states; f32 and bf16 beside the f64 recurrence; the future does not touch the
// past.
std::vector<Claim> chunk_form_claims(ThreadPool*);

// R2: why a delta rule. 16 keys, each rewritten 4 times on average: which value does a memory return for a
// key?
std::vector<Claim> overwrite_claims(ThreadPool*);

// R3: the operators are what the paper says of each other: KDA with one gate per head is gated delta net, and
// so on. In f64 and f32.
std::vector<Claim> reduction_claims(ThreadPool*);

// R9: bytes of the hybrid state beside a latent cache in every layer.
std::vector<Claim> cache_claims(const Config&);
Config kimi_linear_48b_attention();  // what cache_claims() needs to know about Kimi-Linear-48B

// R18: 65,536 steps with a decay of 0.99992: gates have to stay in f32.
std::vector<Claim> long_run_claims(ThreadPool*);

// All of them, in this order.
std::vector<Claim> all_claims(ThreadPool*);

}  // namespace kl
