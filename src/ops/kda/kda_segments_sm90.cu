// What makes one recurrence out of segments that were worked on separately (kda_chunk.cuh): the states before
// them, one after the other, then their part in the outputs. Where a segment's transition is negligible the
// state after it is its own, and its neighbours' states are never touched.
#include "cuda/launch.h"
#include "ops/kda/kda_chunk.cuh"

namespace kl::cuda {
namespace {

constexpr int kSlab = 16;  // value channels of a block of the chain
constexpr int kChainThreads = 256;
static_assert(kChainThreads >= kMostSegments);  // a thread reads the progress of one of them
constexpr int kApplyThreads = 256;
constexpr int kApplyTokens = 512;  // of a block

// Segments of sequence n; the number of the first one, by a whole warp.
KL_DEVICE Segment find_sequence(const PrefillParams& p, int n) {
  Segment s;
  walk_sequences(p, [&](int m, int64_t, int64_t, int, int segments, int before) {
    const unsigned found = __ballot_sync(0xffffffffu, m == n);
    if (found == 0) return false;
    const int lane = __ffs(static_cast<int>(found)) - 1;
    s.sequence = n;
    s.count = __shfl_sync(0xffffffffu, segments, lane);
    s.id = __shfl_sync(0xffffffffu, before, lane);
    return true;
  });
  return s;
}

// carried[j] = carried[j - 1] · M_j + C_j for j = 1, 2, ...; the last one is the final state. A block has
// kSlab rows (value channels), which nobody else reads. The next M is on its way while one is multiplied
// with.
template <int D>
__global__ void __launch_bounds__(kChainThreads) chain_kernel(const __grid_constant__ PrefillParams p) {
  constexpr int kRows = kSlab / (kChainThreads / D);  // of a thread; it has one key channel
  constexpr uint32_t kMatrixBytes = D * D * sizeof(float);
  extern __shared__ __align__(128) float matrices[];  // [2][D (k before)][D (k)]
  __shared__ __align__(16) float state[kSlab][D + 4];
  __shared__ int progress[kChainThreads];
  __shared__ uint64_t barriers[2];
  const int thread = static_cast<int>(threadIdx.x);
  const auto bar = [&](int buffer) { return smem_address(barriers + buffer); };
  if (thread == 0) {
    mbarrier_init(bar(0), 1), mbarrier_init(bar(1), 1);
    fence_barrier_init();
  }
  wait_for_previous_kernel();
  release_next_kernel();
  const int n = static_cast<int>(blockIdx.x) / p.heads, head = static_cast<int>(blockIdx.x) % p.heads;
  const Segment s = find_sequence(p, n);
  if (s.count == 1) return;  // its final state is written already
  if (thread < s.count) progress[thread] = p.progress[(s.id + thread) * p.heads + head];
  __syncthreads();  // the barriers and `progress` are there

  const int v0 = static_cast<int>(blockIdx.y) * kSlab, k = thread % D, row0 = thread / D * kRows;
  const auto matrix = [&](int j) { return (static_cast<int64_t>(s.id + j) * p.heads + head) * D * D; };
  const auto slab = [&](int j) { return p.carried + matrix(j) + static_cast<int64_t>(v0 + row0) * D + k; };
  const auto next_open = [&](int j) {  // the first segment from j on whose transition counts
    while (j < s.count && progress[j] < 0) ++j;
    return j;
  };
  const auto load = [&](int j, int buffer) {
    if (thread != 0 || j >= s.count) return;
    mbarrier_arrive_expect_tx(bar(buffer), kMatrixBytes);
    bulk_load(smem_address(matrices + buffer * D * D), p.transition + matrix(j), kMatrixBytes, bar(buffer));
  };

  float x[kRows];
  int held = 0;  // whose state `state` holds; 0: nobody's yet
  int open = next_open(1);
  load(open, 0);
  for (int use = 0; open < s.count; ++use) {
    const int following = next_open(open + 1);
    load(following, (use + 1) % 2);
    const float* before = slab(open - 1);
    float* own = slab(open);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      x[r] = own[r * D];
      if (held != open - 1 || held == 0) state[row0 + r][k] = before[r * D];
    }
    __syncthreads();  // the state before is there
    mbarrier_wait(bar(use % 2), use / 2 % 2);
    const float* M = matrices + use % 2 * D * D + k;
#pragma unroll 8
    for (int i = 0; i < D; i += 4) {
      const float m[4] = {M[i * D], M[(i + 1) * D], M[(i + 2) * D], M[(i + 3) * D]};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 four = *reinterpret_cast<const float4*>(&state[row0 + r][i]);
        x[r] = fmaf(four.x, m[0], fmaf(four.y, m[1], fmaf(four.z, m[2], fmaf(four.w, m[3], x[r]))));
      }
    }
    __syncthreads();  // the state before and M have been read
#pragma unroll
    for (int r = 0; r < kRows; ++r) state[row0 + r][k] = x[r], own[r * D] = x[r];
    held = open;
    open = following;
  }
  if (p.slot == nullptr) return;
  const int slot = (p.slot_out != nullptr ? p.slot_out : p.slot)[n];
  if (slot < 0) return;
  if (held != s.count - 1) {
    const float* last = slab(s.count - 1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) state[row0 + r][k] = last[r * D];
  }
  __syncthreads();  // the final state is there
  const StatePlace place = state_place(p, slot, head);
  // Neighbours in the pool to neighbouring threads.
  for (int i = thread; i < kSlab * D; i += kChainThreads) {
    const int v = p.state_v_first ? i / D : i % kSlab, key = p.state_v_first ? i % D : i / kSlab;
    store_element(place.pool, place.base + key * place.k_stride + (v0 + v) * place.v_stride, state[v][key]);
  }
}

// out += qt · (state before the segment), for the tokens that have a qt.
template <int D>
__global__ void __launch_bounds__(kApplyThreads) apply_kernel(const __grid_constant__ PrefillParams p) {
  constexpr int kRow = D + 8;
  __shared__ __align__(16) bf16 state[D * kRow];  // [value channel][key channel]
  wait_for_previous_kernel();
  const int head = static_cast<int>(blockIdx.x) % p.heads;
  const Segment s = find_segment(p, static_cast<int>(blockIdx.x) / p.heads);
  if (s.sequence < 0 || s.index == 0) return;
  const int done = p.progress[s.id * p.heads + head];
  const int64_t first = static_cast<int64_t>(s.first_chunk) * kChunkTokens;
  const int64_t end =
      min(first + static_cast<int64_t>(done < 0 ? -done : done) * kChunkTokens, s.length) + s.begin;
  const int64_t begin = s.begin + first + static_cast<int64_t>(blockIdx.y) * kApplyTokens;
  if (begin >= end) return;

  const float* before = p.carried + (static_cast<int64_t>(s.id - 1) * p.heads + head) * D * D;
#pragma unroll
  for (int i = 0; i < D * D / 4 / kApplyThreads; ++i) {
    const int four = i * kApplyThreads + static_cast<int>(threadIdx.x);
    store4(state + four / (D / 4) * kRow + four % (D / 4) * 4, load4(before + 4 * four));
  }
  __syncthreads();  // the state is there

  // Four warps share 16 tokens; each has a quarter of the value channels.
  constexpr int kQuarter = D / 4;
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int quarter = static_cast<int>(threadIdx.x) / 32 % 4;
  const bf16* queries = static_cast<const bf16*>(p.queries);
  bf16* out = static_cast<bf16*>(p.out.data);
  const int64_t stop = min(end, begin + kApplyTokens);
  for (int64_t token = begin + threadIdx.x / 128 * 16; token < stop; token += kApplyThreads / 8) {
    uint32_t a[D / 16][4];
    float4 old[2][kQuarter / 16];
    bool valid[2];
    bf16* to[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = token + g + 8 * half;
      valid[half] = row < stop;
      const bf16* q = queries + (row * p.heads + head) * D + 2 * t;
      to[half] = out + offset_of(p.out, row, head) + quarter * kQuarter + 4 * t;
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        a[step][half] = valid[half] ? *reinterpret_cast<const uint32_t*>(q + 16 * step) : 0;
        a[step][half + 2] = valid[half] ? *reinterpret_cast<const uint32_t*>(q + 16 * step + 8) : 0;
      }
#pragma unroll
      for (int c = 0; c < kQuarter / 16; ++c)
        if (valid[half]) old[half][c] = load4(to[half] + 16 * c);
    }
    // Value channels 16 c + 4 t to 16 c + 4 t + 3 belong to a lane: columns 2t, 2t + 1 of two tiles.
#pragma unroll
    for (int c = 0; c < kQuarter / 16; ++c) {
      float d[2][4] = {};
      const int v = quarter * kQuarter + 16 * c + 4 * (lane % 8 / 2) + lane % 2 + lane / 16 * 2;
      const uint32_t row = smem_address(state + v * kRow) + lane / 8 % 2 * 16;
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t b[4];  // tile 0: key channels 0-7, 8-15; tile 1
        ldmatrix_x4(b, row + 32 * step);
        mma_bf16(d[0], a[step], b[0], b[1]);
        mma_bf16(d[1], a[step], b[2], b[3]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 x = old[half][c];
        if (valid[half])
          store4(to[half] + 16 * c, float4{x.x + d[0][2 * half], x.y + d[0][2 * half + 1],
                                           x.z + d[1][2 * half], x.w + d[1][2 * half + 1]});
      }
    }
  }
}

}  // namespace

void chain_segments(const PrefillParams& p, int64_t D, int64_t segments, int64_t T, cudaStream_t stream) {
  const unsigned heads = static_cast<unsigned>(p.heads);
  const LaunchConfig chain{
      .grid = {static_cast<unsigned>(p.sequences) * heads, static_cast<unsigned>(D / kSlab)},
      .block = kChainThreads,
      .smem = static_cast<size_t>(2 * D * D) * sizeof(float),
      .stream = stream,
      .overlap_previous = true};
  const int64_t chunks = std::max<int64_t>(p.segment_chunks, T / kChunkTokens / kMostSegments + 2);
  const int64_t longest = std::min<int64_t>(T, chunks * kChunkTokens);
  const LaunchConfig apply{.grid = {static_cast<unsigned>(segments) * heads,
                                    static_cast<unsigned>((longest + kApplyTokens - 1) / kApplyTokens)},
                           .block = kApplyThreads,
                           .stream = stream,
                           .overlap_previous = true};
  if (D == 128) {
    launch(chain_kernel<128>, chain, p);
    launch(apply_kernel<128>, apply, p);
  } else {
    launch(chain_kernel<64>, chain, p);
    launch(apply_kernel<64>, apply, p);
  }
}

}  // namespace kl::cuda
