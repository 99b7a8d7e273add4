#include "terminal.h"

#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "base/check.h"

namespace kl::app {

std::atomic<bool> interrupted{false};

namespace {

void on_signal(int) {
  static_assert(std::atomic<bool>::is_always_lock_free);
  if (interrupted.exchange(true)) _exit(1);
}

}  // namespace

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = on_signal;  // without SA_RESTART: a read from the terminal returns
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe becomes an error of print()
}

void print(std::string_view text) {
  const bool good =
      std::fwrite(text.data(), 1, text.size(), stdout) == text.size() && std::fflush(stdout) == 0;
  KL_CHECK(good, "cannot write to standard output: ", std::strerror(errno));
}

bool stderr_is_terminal() { return isatty(STDERR_FILENO) == 1; }
bool stdin_is_terminal() { return isatty(STDIN_FILENO) == 1; }

void note(const std::string& line) {
  if (stderr_is_terminal()) std::fprintf(stderr, "%s\n", line.c_str());
}

Progress::Progress(std::string what, std::string unit)
    : what_(std::move(what)),
      unit_(std::move(unit)),
      start_(std::chrono::steady_clock::now()),
      shown_(start_) {}

Progress::~Progress() {
  if (visible_) std::fprintf(stderr, "\r\033[K");
}

double Progress::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Progress::update(double done, double total) {
  const double elapsed = seconds();
  const auto now = std::chrono::steady_clock::now();
  if (elapsed < 2 || now - shown_ < std::chrono::milliseconds(200) || !stderr_is_terminal()) return;
  shown_ = now;
  visible_ = true;
  const double rate = done / elapsed;
  const std::string left = rate > 0 ? fixed((total - done) / rate, 0) + " s left" : "";
  std::fprintf(stderr, "\r\033[K%s  %.0f / %.0f %s  %.1f %s/s  %s", what_.c_str(), done, total, unit_.c_str(),
               rate, unit_.c_str(), left.c_str());
  std::fflush(stderr);
}

std::string read_stdin() {
  std::string text;
  char block[65536];
  for (;;) {
    const ssize_t n = read(STDIN_FILENO, block, sizeof block);
    if (n == 0) return text;
    if (n < 0 && errno == EINTR && !interrupted) continue;
    KL_CHECK(n > 0, "cannot read standard input: ", std::strerror(errno));
    text.append(block, static_cast<size_t>(n));
  }
}

std::vector<int32_t> parse_ids(std::string_view text) {
  std::vector<int32_t> ids;
  const char* p = text.data();
  const char* const end = p + text.size();
  for (;;) {
    while (p != end && std::strchr(" \t\r\n,[]", *p) && *p) ++p;
    if (p == end) return ids;
    int32_t id = 0;
    const auto [rest, error] = std::from_chars(p, end, id);
    KL_CHECK(error == std::errc() && (rest == end || std::strchr(" \t\r\n,[]", *rest)),
             "token ids: expected integers, found \"",
             std::string_view(p, std::min<size_t>(20, static_cast<size_t>(end - p))), "\"");
    ids.push_back(id);
    p = rest;
  }
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string human_bytes(double bytes) {
  const char* units[] = {"B", "kB", "MB", "GB", "TB"};
  int u = 0;
  while (bytes >= 1000 && u < 4) bytes /= 1000, ++u;
  return fixed(bytes, u == 0 ? 0 : 2) + " " + units[u];
}

std::string human_count(double count) {
  const char* units[] = {"", " K", " M", " B", " T"};
  int u = 0;
  while (count >= 1000 && u < 4) count /= 1000, ++u;
  return fixed(count, u == 0 ? 0 : 2) + units[u];
}

}  // namespace kl::app
