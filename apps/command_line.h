// What the parts of the command line share: groups of flags, and the command that was chosen.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>

#include "commands.h"

namespace kl::app {

void model_flags(CLI::App* command, ModelOptions&);
void computing_flags(CLI::App* command, ModelOptions&);  // model_flags without the model and the threads
void model_name(CLI::App* command, std::string& model);
void context_flag(CLI::App* command, ModelOptions&);
void sampling_flags(CLI::App* command, SamplingOptions&);

// Runs after the line was read and found to be right.
using Chosen = std::function<int()>;

// A subcommand whose options live as long as its Chosen. Not chosen if one of its own subcommands is.
template <class Options>
Options& add_command(CLI::App& app, Chosen& chosen, const std::string& name, const std::string& help,
                     int (*entry)(const Options&), CLI::App*& command) {
  const auto options = std::make_shared<Options>();
  command = app.add_subcommand(name, help);
  command->callback([&chosen, command, options, entry] {
    if (command->get_subcommands().empty()) chosen = [options, entry] { return entry(*options); };
  });
  return *options;
}

void add_text_commands(CLI::App&, Chosen&);     // run, chat, inspect, tokenize, detokenize, logits
void add_measure_commands(CLI::App&, Chosen&);  // synth, verify, bench, eval

}  // namespace kl::app
