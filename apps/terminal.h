// What the commands share of the outside world: signals, progress on a terminal, whole-file input, output
// that is checked.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kl::app {

// Set by SIGINT and SIGTERM. A second signal before it is cleared ends the program at once.
extern std::atomic<bool> interrupted;
void install_signal_handlers();

// Prints to stdout at once. Throws kl::Error if it cannot be written (a full disk, a closed pipe).
void print(std::string_view text);
// Prints a line to stderr if stderr is a terminal.
void note(const std::string& line);
bool stderr_is_terminal();
bool stdin_is_terminal();

// One line on stderr, rewritten in place: "prompt  1536 / 4096 tokens  212.4 tokens/s  12 s left". Appears
// only on a terminal and only when the work takes longer than two seconds.
class Progress {
 public:
  Progress(std::string what, std::string unit);
  ~Progress();  // removes the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void update(double done, double total);
  double seconds() const;

 private:
  std::string what_, unit_;
  std::chrono::steady_clock::time_point start_, shown_;
  bool visible_ = false;
};

std::string read_stdin();
// "1 2 3" or "1,2,3" -> ids. Throws kl::Error naming what is not a number.
std::vector<int32_t> parse_ids(std::string_view text);

std::string human_bytes(double bytes);  // "98.25 GB"
std::string human_count(double count);  // "49.12 B"
std::string fixed(double value, int digits);

}  // namespace kl::app
