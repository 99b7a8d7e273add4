// Timing on a GPU: CUDA-graph replays over rotating data, medians, and the copy bandwidth of the same run as
// the yardstick. For benchmark programs; include under KL_CUDA.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "cuda/memory.h"

namespace kl::testing {

struct Timing {
  double median = 0, low = 0, high = 0;  // seconds of one repetition: middle, 10th and 90th percentile
};

// Times `repetitions` calls of body(i, stream), captured into one graph that is replayed `replays` times.
// With enough different data behind the i, what one call reads has left the L2 cache before it is read again.
inline Timing time_graph(int repetitions, int replays, const std::function<void(int, cudaStream_t)>& body) {
  cudaStream_t stream;
  KL_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
  body(0, stream);  // loads the kernels outside of the capture
  KL_CUDA_CHECK(cudaStreamSynchronize(stream), "warming up");
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  KL_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "starting a capture");
  for (int i = 0; i < repetitions; ++i) body(i, stream);
  KL_CUDA_CHECK(cudaStreamEndCapture(stream, &graph), "ending a capture");
  KL_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0), "instantiating a graph");
  std::vector<cudaEvent_t> events(static_cast<size_t>(replays) + 1);
  for (cudaEvent_t& e : events) KL_CUDA_CHECK(cudaEventCreate(&e), "creating an event");
  for (int warm = 0; warm < 2; ++warm)
    KL_CUDA_CHECK(cudaGraphLaunch(executable, stream), "warming up a graph");
  KL_CUDA_CHECK(cudaEventRecord(events[0], stream), "recording an event");
  for (size_t r = 1; r < events.size(); ++r) {
    KL_CUDA_CHECK(cudaGraphLaunch(executable, stream), "replaying a graph");
    KL_CUDA_CHECK(cudaEventRecord(events[r], stream), "recording an event");
  }
  KL_CUDA_CHECK(cudaStreamSynchronize(stream), "replaying a graph");
  std::vector<double> seconds;
  for (size_t r = 1; r < events.size(); ++r) {
    float ms = 0;
    KL_CUDA_CHECK(cudaEventElapsedTime(&ms, events[r - 1], events[r]), "reading an event");
    seconds.push_back(ms * 1e-3 / repetitions);
  }
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double q) {
    return seconds[static_cast<size_t>(q * static_cast<double>(seconds.size() - 1))];
  };
  for (cudaEvent_t e : events) cudaEventDestroy(e);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return {at(0.5), at(0.1), at(0.9)};
}

// to[i] = from[i], queued on `stream`: the simplest kernel that moves memory as fast as the device can.
void copy_on_device(void* to, const void* from, size_t bytes, cudaStream_t stream);  // bytes a multiple of 16

// Bytes per second of a large device-to-device copy, read and written bytes both counted: by our kernel or by
// cudaMemcpyAsync, whichever is faster (inside a graph the latter falls behind by a third).
inline double copy_bandwidth(size_t bytes = size_t(1) << 30) {
  const cuda::DeviceBuffer from(bytes), to(bytes);
  KL_CUDA_CHECK(cudaMemset(from.data(), 1, bytes), "filling the copy's source");
  const auto timed = [&](auto&& copy) {
    return time_graph(4, 12,
                      [&](int i, cudaStream_t stream) {
                        copy(i % 2 ? from.data() : to.data(), i % 2 ? to.data() : from.data(), stream);
                      })
        .median;
  };
  const double kernel =
      timed([&](void* a, void* b, cudaStream_t stream) { copy_on_device(a, b, bytes, stream); });
  const double memcpy = timed([&](void* a, void* b, cudaStream_t stream) {
    KL_CUDA_CHECK(cudaMemcpyAsync(a, b, bytes, cudaMemcpyDeviceToDevice, stream), "copying");
  });
  return 2. * static_cast<double>(bytes) / std::min(kernel, memcpy);
}

inline std::string device_name() {
  cudaDeviceProp properties;
  KL_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0), "reading the device's name");
  return properties.name;
}

}  // namespace kl::testing
