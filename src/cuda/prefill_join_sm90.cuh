// What makes one recurrence out of segments that were worked on separately (prefill_segments.cuh): the states
// before them, one after the other, and their part in the outputs. Where a segment's transition is closed the
// state after it is its own, and its neighbours' states are never touched.
#pragma once

#include "cuda/prefill_pipeline_sm90.cuh"

namespace kl::cuda {

// out += qt · S for tokens `token` to `token` + 15 that lie before `end`, by one warp, for a head's
// value channels: first what comes from memory, then the rest.
template <int D>
class StatePart {
  static constexpr int kRuns = D / 16;

 public:
  KL_DEVICE void load(const PrefillParams& p, int head, int64_t token, int64_t end) {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = token + g + 8 * half;
      valid[half] = row < end;
      const bf16* from = static_cast<const bf16*>(p.queries) + (row * p.heads + head) * D + 8 * t;
      out[half] = static_cast<bf16*>(p.out.data) + offset_of(p.out, row, head) + 4 * t;
#pragma unroll
      for (int step = 0; step < D / 32; ++step)
        q[half][step] = valid[half] ? *reinterpret_cast<const uint4*>(from + 32 * step) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int run = 0; run < kRuns; ++run)
        if (valid[half]) old[half][run] = *reinterpret_cast<const uint2*>(out[half] + 16 * run);
    }
  }
  // state(run, step, s) gives S as right operands of 32 key channels, twos of them in the order of qt:
  // s[tile][i] has those that stand at 8t + 2i, of value channel 4 (g / 2) + 2 tile + g % 2, of that step and
  // run. So a lane reads 16 bytes of a qt at a time, and has 8 neighbouring bytes of an output.
  template <class State>
  KL_DEVICE void add(State&& state) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      float d[2][4] = {};
#pragma unroll
      for (int step = 0; step < D / 32; ++step) {
        uint32_t s[2][4];
        state(run, step, s);
        const uint4 a = q[0][step], b = q[1][step];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          mma_bf16(d[tile], {a.x, b.x, a.y, b.y}, s[tile][0], s[tile][1]);
          mma_bf16(d[tile], {a.z, b.z, a.w, b.w}, s[tile][2], s[tile][3]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 x = unpack_bf16x4(old[half][run]);
        if (valid[half])
          store4(out[half] + 16 * run, float4{x.x + d[0][2 * half], x.y + d[0][2 * half + 1],
                                              x.z + d[1][2 * half], x.w + d[1][2 * half + 1]});
      }
    }
  }

 private:
  uint4 q[2][D / 32];
  uint2 old[2][kRuns];
  bf16* out[2];
  bool valid[2];
};

// x as the sum of two numbers of 11 bits, but for 2^-21 of it.
struct TwoTerms {
  uint32_t high, low;
};
KL_DEVICE TwoTerms two_terms(float x) {
  const uint32_t high = __float_as_uint(x) & 0xffffe000u;
  return {high, __float_as_uint(x - __uint_as_float(high))};
}

// The consumers of a block, when its ring is done with.
template <class Slot, bool kProbes>
class Joiner {
  static constexpr int D = Slot::D;
  static constexpr int kThreads = 2 * D;
  static constexpr int kApplyTokens = 256;  // of an item
  static constexpr int kStateRow = D + 8;
  static constexpr int kSlab = 16, kWideSlab = 32;  // value channels that are chained at a time
  struct Memory {
    union {
      float matrices[2][D * D];         // as in the workspace
      uint16_t applied[D * kStateRow];  // a state in bf16, its rows in the order of StatePart::add()
    };
    uint64_t loaded[2];  // barriers: a matrix is there
    float slab[kWideSlab][D + 4];
    int progress[kMostSegments];
    int next;
  };
  static_assert(sizeof(Memory) <= Ring<Slot>::kDecay);  // where there is nothing but chunks

 public:
  KL_DEVICE Joiner(const PrefillParams& params, char* memory)
      : p(params), m(*reinterpret_cast<Memory*>(memory)), thread(static_cast<int>(threadIdx.x)) {}

  // Heads that are expected to forget soon come first: their transitions are over.
  KL_DEVICE void run() {
    sync();  // the ring has been read
    if (thread == 0) {
      for (uint64_t& bar : m.loaded) mbarrier_init(smem_address(&bar), 1);
      fence_barrier_init();
    }
    // Wide ones load an M less often, where there are enough of them.
    const bool wide = p.sequences * p.heads * (D / kSlab) > static_cast<int>(gridDim.x);
    const int slabs = D / (wide ? kWideSlab : kSlab);
    each_of(&p.counters->chains, p.sequences * p.heads * slabs, [&](int i, auto&& next) {
      const int pair = i / slabs, slab = i % slabs;
      if (wide)
        chain<kWideSlab>(pair % p.sequences, head_of(pair / p.sequences), slab * kWideSlab);
      else
        chain<kSlab>(pair % p.sequences, head_of(pair / p.sequences), slab * kSlab);
      next();
    });
    const Sequences sequences(p);
    const int later = sequences.count_segments() - p.sequences;
    const int parts = (longest(sequences) + kApplyTokens - 1) / kApplyTokens;
    each_of(&p.counters->parts, p.heads * parts * later, [&](int i, auto&& next) {
      // All segments have first tokens, fewer have others.
      const int of_head = i % (parts * later);
      const Segment s = sequences.segment(Among::later, of_head % later);
      const int head = head_of(i / (parts * later));
      apply(s, head, of_head / later * kApplyTokens, next);
    });
  }

 private:
  const PrefillParams& p;
  Memory& m;
  int thread;
  uint32_t phases = 0;  // of m.loaded: a bit each

  KL_DEVICE static void sync() { named_barrier_sync(1, kThreads); }
  KL_DEVICE static void wait_until(const int* word, int least) {
    while (load_acquire(word) < least) __nanosleep(50);
  }
  KL_DEVICE int head_of(int number) const {
    return p.by_slowness != nullptr ? p.by_slowness[p.heads - 1 - number] : number;
  }

  // work(i, next) for numbers that no other block has, below count. Shortly before its end it calls next(),
  // and the next number is on its way: not sooner, or others have nothing to do.
  template <class Work>
  KL_DEVICE void each_of(int* list, int count, Work&& work) {
    int ticket = 0;
    const auto next = [&] {
      if (thread == 0) ticket = atomicAdd(list, 1);
    };
    next();
    for (;;) {
      sync();  // the number before has been read
      if (thread == 0) m.next = ticket;
      sync();  // the next number is there
      const int i = m.next;
      if (i >= count) return;
      work(i, next);
    }
  }

  // Tokens that no segment has more of, but for first ones.
  KL_DEVICE int longest(const Sequences& sequences) const {
    int chunks = 0;
    sequences.walk([&](const Sequence& q) {
      const int shares = p.first_shares + q.segments - 1;
      const int own = q.number < 0 ? 0 : (q.chunks + shares - 1) / shares;
      chunks = max(chunks, static_cast<int>(__reduce_max_sync(0xffffffffu, static_cast<unsigned>(own))));
      return false;
    });
    return chunks * kChunkTokens;
  }

  // Has the item of this segment's values added its part of the outputs already?
  KL_DEVICE bool added(const Segment& s, int head) const {
    const auto closed = [&](int id) {
      const int progress = p.progress[id * p.heads + head];
      return progress < 0 && -progress <= kProbeChunks;
    };
    return p.probes && closed(s.id) && (s.index == 1 || closed(s.id - 1));
  }

  // carried[j] = carried[j - 1] · M_j + C_j for j = 1, 2, ..., rows v0 to v0 + kWidth - 1, which nobody else
  // reads; the last one is the final state. The next M is on its way while one is multiplied with.
  template <int kWidth>
  KL_DEVICE void chain(int n, int head, int v0) {
    constexpr int kTiles = kWidth / 16;
    const Sequence q = Sequences(p).find([&](const Sequence& x) { return x.number == n; });
    const int count = q.segments;
    if (count == 1) return;  // its final state is written already, and nothing is added to its outputs
    const auto item = [&](int j) { return (q.first_id + j) * p.heads + head; };
    for (int i = thread; i < count * (D / 16); i += kThreads)
      wait_until(p.ready + item(i / (D / 16)) * kConsumerWarps + i % (D / 16), kDone);
    for (int j = 1 + thread; j < count; j += kThreads) {
      const int chunks = first_chunk_of(p, q.chunks, j + 1, count) - first_chunk_of(p, q.chunks, j, count);
      int progress = 0;
      while (progress >= 0 && progress < chunks) progress = load_acquire(p.progress + item(j));
      m.progress[j] = progress;
    }
    sync();  // all C and M, and `progress`, are there

    // A warp has 16 key channels of all rows; a lane, as in mma.sync's results, twos of them.
    const int lane = thread % 32, g = lane / 4, t = lane % 4, k0 = thread / 32 * 16;
    using Rows = float[kTiles][2][4];
    const auto two = [](Rows& of, int e) -> float2& {
      return *reinterpret_cast<float2*>(of[e / 4][e / 2 % 2] + 2 * (e % 2));
    };
    const auto each_two = [&](auto&& f) {  // f(number, row of the slab, key channel)
#pragma unroll
      for (int e = 0; e < 4 * kTiles; ++e) f(e, 16 * (e / 4) + g + 8 * (e % 2), k0 + 8 * (e / 2 % 2) + 2 * t);
    };
    const auto stored = [&](int j, int row, int k) -> float2& {
      return *reinterpret_cast<float2*>(p.carried + static_cast<int64_t>(item(j)) * D * D +
                                        matrix_at<D>(v0 + row, k));
    };
    const auto slab = [&](int row, int k) -> float2& { return *reinterpret_cast<float2*>(&m.slab[row][k]); };
    const auto next_open = [&](int j) {  // the first segment from j on whose transition counts
      while (j < count && m.progress[j] < 0) ++j;
      return j;
    };
    Rows C;  // of the next open segment
    const auto load = [&](int j, int buffer) {
      if (j < count) {
        if (thread == 0) {
          const uint32_t bar = smem_address(&m.loaded[buffer]);
          constexpr uint32_t kBytes = sizeof m.matrices[buffer];
          fence_proxy_async_all();  // M is there
          mbarrier_arrive_expect_tx(bar, kBytes);
          bulk_load(smem_address(m.matrices[buffer]), p.transition + static_cast<int64_t>(item(j)) * D * D,
                    kBytes, bar);
        }
        each_two([&](int e, int row, int k) { two(C, e) = stored(j, row, k); });
      }
    };

    int held = 0;  // whose state `slab` holds; 0: nobody's yet
    int open = next_open(1);
    load(open, 0);
    for (int use = 0; open < count; use ^= 1) {
      const int following = next_open(open + 1);
      Rows x, lower = {};
      each_two([&](int e, int, int) { two(x, e) = two(C, e); });
      load(following, use ^ 1);
      if (held != open - 1 || held == 0)
        each_two([&](int, int row, int k) { slab(row, k) = stored(open - 1, row, k); });
      mbarrier_wait(smem_address(&m.loaded[use]), phases >> use & 1);
      phases ^= 1u << use;
      sync();  // the state before is there
      const float* M = m.matrices[use] + matrix_at<D>(0, k0 + g);
#pragma unroll kTiles == 1 ? 4 : 2
      for (int i = t; i < D; i += 8) {
        TwoTerms b[2][2];
#pragma unroll
        for (int e = 0; e < 4; ++e) b[e / 2][e % 2] = two_terms(M[matrix_at<D>(i + e % 2 * 4, e / 2 * 8)]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float* row = &m.slab[16 * tile + g][i];
          uint32_t high[4], low[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const TwoTerms a = two_terms(row[e % 2 * 8 * (D + 4) + e / 2 * 4]);
            high[e] = a.high, low[e] = a.low;
          }
#pragma unroll
          for (int block = 0; block < 2; ++block) {
            mma_tf32(lower[tile][block], low, b[block][0].high, b[block][1].high);
            mma_tf32(x[tile][block], high, b[block][0].high, b[block][1].high);
            mma_tf32(lower[tile][block], high, b[block][0].low, b[block][1].low);
          }
        }
      }
      fence_proxy_async();  // what was read comes before the copy of the M after the next
      sync();               // the state before and M have been read
      each_two([&](int e, int row, int k) {
        const float2 a = two(x, e), b = two(lower, e);
        slab(row, k) = stored(open, row, k) = {a.x + b.x, a.y + b.y};
      });
      held = open;
      open = following;
    }
    sync();  // the states are there
    if (thread == 0) add_release(p.chained + n * p.heads + head, kWidth);

    const int last = m.progress[count - 1];
    if (p.slot == nullptr || (p.probes && last < 0 && -last <= kProbeChunks)) return;  // or written already
    const int slot = (p.slot_out != nullptr ? p.slot_out : p.slot)[n];
    if (slot < 0) return;
    if (held != count - 1) {
      each_two([&](int, int row, int k) { slab(row, k) = stored(count - 1, row, k); });
      sync();  // the final state is there
    }
    const StatePlace place = state_place(p, slot, head);
    // Neighbours in the pool to neighbouring threads.
    for (int i = thread; i < kWidth * D; i += kThreads) {
      const int v = p.state_v_first ? i / D : i % kWidth, key = p.state_v_first ? i % D : i / kWidth;
      store_element(place.pool, place.base + key * place.k_stride + (v0 + v) * place.v_stride,
                    m.slab[v][key]);
    }
  }

  // Adds the state's part to kApplyTokens tokens of a segment from its token `from` on, as far as they have a
  // qt.
  template <class Next>
  KL_DEVICE void apply(const Segment& s, int head, int from, Next&& next) const {
    wait_until(p.chained + s.sequence * p.heads + head, D);
    if (added(s, head)) return next();
    const int64_t first = static_cast<int64_t>(s.first_chunk) * kChunkTokens;
    const int64_t with_query = static_cast<int64_t>(abs(p.progress[s.id * p.heads + head])) * kChunkTokens;
    const int64_t begin = s.begin + first + from;
    const int64_t end = s.begin + min(min(first + with_query, first + from + kApplyTokens), s.length);
    if (begin >= end) return next();
    StatePart<D> part;
    int64_t token = begin + thread / 32 * 16;
    part.load(p, head, token, end);  // on its way meanwhile
    const float* before = p.carried + (static_cast<int64_t>(s.id - 1) * p.heads + head) * D * D;
#pragma unroll 8
    for (int i = 0; i < D * D / 4 / kThreads; ++i) {
      const int four = 4 * (i * kThreads + thread), v = four % (8 * D) / 8, k = four / (8 * D) * 8 + four % 8;
      const float4 x = load4(before + four);
      uint16_t* to = m.applied + (v / 16 * 16 + v / 2 % 2 * 8 + v % 16 / 4 * 2 + v % 2) * kStateRow;
      if constexpr (kProbes) {
        *reinterpret_cast<uint2*>(to + k) = pack_bf16x4(x);
      } else {
        *reinterpret_cast<uint32_t*>(to + query_at(k)) = pack_bf16(x.x, x.y);
        *reinterpret_cast<uint32_t*>(to + query_at(k + 2)) = pack_bf16(x.z, x.w);
      }
    }
    sync();  // the state is there
    const int lane = thread % 32;
    const uint32_t rows =
        smem_address(m.applied + (lane % 8 + lane / 16 * 8) * kStateRow) + lane / 8 % 2 * 16;
    while (token < end) {
      if (token + kThreads / 2 >= end) next();
      part.add([&](int run, int step, uint32_t(&x)[2][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t b[4];  // tile 0: key channels 0-7, 8-15; tile 1
          ldmatrix_x4(b, rows + run * 16 * kStateRow * 2 + (2 * step + half) * 32);
          x[0][2 * half] = b[0], x[0][2 * half + 1] = b[1];
          x[1][2 * half] = b[2], x[1][2 * half + 1] = b[3];
        }
      });
      token += kThreads / 2;
      if (token < end) part.load(p, head, token, end);
    }
  }
};

}  // namespace kl::cuda
