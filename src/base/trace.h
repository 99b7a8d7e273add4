// What each operator did: name, bytes moved, floating-point operations, time. Operators report their own
// bytes and flops, so that a benchmark, a test and a live server print the same figures.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace kl {

class Trace {
 public:
  struct Entry {
    int64_t calls = 0;
    double bytes = 0, flops = 0, seconds = 0;
  };
  void add(std::string_view name, double bytes, double flops, double seconds) {
    Entry& e = entries_.try_emplace(std::string(name)).first->second;
    e.calls += 1, e.bytes += bytes, e.flops += flops, e.seconds += seconds;
  }
  const std::map<std::string, Entry>& entries() const { return entries_; }
  void clear() { entries_.clear(); }

 private:
  std::map<std::string, Entry> entries_;
};

// Times a scope on the host clock. Free when `trace` is null.
class TraceScope {
 public:
  TraceScope(Trace* trace, std::string_view name, double bytes, double flops)
      : trace_(trace), name_(name), bytes_(bytes), flops_(flops) {
    if (trace_) start_ = Clock::now();
  }
  ~TraceScope() {
    if (trace_)
      trace_->add(name_, bytes_, flops_, std::chrono::duration<double>(Clock::now() - start_).count());
  }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  Trace* trace_;
  std::string_view name_;
  double bytes_, flops_;
  Clock::time_point start_{};
};

}  // namespace kl
