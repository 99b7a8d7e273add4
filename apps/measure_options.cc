// The command line of the commands that make, check and measure models: synth, verify, bench, eval.
#include "command_line.h"

namespace kl::app {

namespace {

void add_verify(CLI::App& app, Chosen& chosen) {
  CLI::App* command = nullptr;
  VerifyOptions& o =
      add_command(app, chosen, "verify",
                  "try the engine's promises on a checkpoint; exit code 1 if one fails", verify, command);
  model_flags(command, o.model);
  command->add_option("-n,--tokens", o.tokens, "tokens of the prompt (default 256)")
      ->check(CLI::Range(32, 1 << 20));
  command->add_option("--steps", o.steps, "tokens after it, one at a time (default 16)")
      ->check(CLI::Range(1, 1 << 16));
  command
      ->add_option("--tolerance", o.tolerance,
                   "of chunked = whole: relative difference of the logits (default 1e-4)")
      ->check(CLI::PositiveNumber);
  command->add_option("-s,--seed", o.seed, "of the text or the ids (default 1)");
}

}  // namespace

void add_measure_commands(CLI::App& app, Chosen& chosen) { add_verify(app, chosen); }

}  // namespace kl::app
