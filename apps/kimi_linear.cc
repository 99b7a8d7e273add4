// kimi-linear: reads the command line, runs the command, turns errors into messages and exit codes (0: done,
// 1: failed, 2: the command line is wrong).
#include <CLI/CLI.hpp>
#include <cstdio>
#include <new>

#include "base/check.h"
#include "command_line.h"
#include "terminal.h"

namespace {

constexpr int kUsage = 2;

int dispatch(int argc, char** argv) {
  CLI::App app("Kimi Linear: run, talk to, look into, measure and make checkpoints");
  app.require_subcommand(1);
  app.set_version_flag("--version", KL_VERSION);
  app.set_help_all_flag("--help-all", "help of every command");
  kl::app::Chosen chosen;
  kl::app::add_text_commands(app, chosen);
  kl::app::add_measure_commands(app, chosen);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : kUsage;
  }
  return chosen();
}

}  // namespace

int main(int argc, char** argv) {
  kl::app::install_signal_handlers();
  try {
    return dispatch(argc, argv);
  } catch (const std::bad_alloc&) {
    std::fputs("error: out of memory\n", stderr);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "error: %s\n", e.what());
  }
  return 1;
}
