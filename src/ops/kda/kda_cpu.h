// The CPU back-end of KDA: what its doors call, and the kernels behind them, which know raw pointers only.
// The doors have checked the arguments.
#pragma once

#include "ops/kda/kda.h"
#include "simd/isa.h"

namespace kl {

void kda_prefill_cpu(Ctx&, const KdaArgs&);  // kda_heads.cc
// What the products that read and write the state are made of: f32, pairs of bf16 for what reads it, or tiles
// of bf16. kda_products() says which ones kda_prefill_cpu() takes on this processor.
enum class KdaProducts : uint8_t { f32, pairs, tiles };
KdaProducts kda_products(Precision);
// With these products, whether the processor has them or not; for tests.
void kda_prefill_cpu_with(KdaProducts, Ctx&, const KdaArgs&);
void kda_decode_cpu(Ctx&, const KdaArgs&);

// One head of a tensor [T, heads, n].
struct KdaHeadRows {
  char* data;      // row 0
  DType dtype;     // f32|bf16|f64
  int64_t stride;  // bytes from token to token
};

// One value head of one sequence.
struct KdaCpuHead {
  KdaHeadRows q, k, v, g, beta;
  KdaHeadRows out;  // without data: only the state is wanted
  int64_t K, V;
  float scale;
  bool l2norm;
  float l2_eps;
  KdaGateKind gate;
  float rate;         // exp(A_log)
  const float* bias;  // [K]
  float lower_bound;
};

// Widths of rows in scratch: whole registers of every instruction set, filled up with zeros.
constexpr int64_t kda_padded(int64_t n) { return (n + 15) / 16 * 16; }

// kda_cpu.cc: tokens [begin, end) in chunks of kKdaChunk, beginning at `begin`; beta is read as a logit.
struct KdaChunks {
  const KdaCpuHead& head;
  int64_t begin, end;
  float* state;   // in panels, see below; read and updated, its padding is zero
  float* memory;  // kda_chunks_memory() or kda_tiles_memory() floats, 64-byte aligned
  bool bf16;      // products that read the state take operands rounded to bf16; the state stays f32
};
constexpr int64_t kKdaChunk = 16;
// The state in panels of kKdaPanel columns, [kda_padded(V) / kKdaPanel][kda_padded(K)][kKdaPanel]: what a
// tile of columns reads lies in order, and comes from the second-level cache before it is asked for. Panels
// are an odd number of cache lines apart, so that tiles of several panels have the whole first-level cache.
constexpr int64_t kKdaPanel = 16;
constexpr int64_t kda_panel_stride(int64_t K) { return (kda_padded(K) + 1) * kKdaPanel; }
constexpr int64_t kda_panels_size(int64_t K, int64_t V) {
  return kda_padded(V) / kKdaPanel * kda_panel_stride(K);
}
constexpr int64_t kda_chunks_memory(int64_t K, int64_t V) {
  const int64_t f32 = (4 * kKdaChunk + 2) * kda_padded(K) + kKdaChunk * kda_padded(V);
  return f32 + kKdaChunk * kda_padded(K) + kda_panels_size(K, V) / 2;  // behind it what is rounded
}

// kda_tiles_cpu.cc: the same with tiles (simd/tiles.h), whatever `bf16` says. avx512_bf16:: needs Isa::amx.
// Chunks are prepared so many at a time; each leaves kda_tile_record() floats.
constexpr int64_t kKdaTileBlock = 4;
constexpr int64_t kda_tile_depth(int64_t K) { return (K + 31) / 32; }  // tiles along K
constexpr int64_t kda_tile_record(int64_t K) {
  return (2 * kda_tile_depth(K) + kda_padded(K) / 16 + 2) * 256 + kKdaChunk + 2 * kda_padded(K);
}
constexpr int64_t kda_tiles_memory(int64_t K, int64_t V) {
  return kKdaTileBlock * (kda_tile_record(K) + kKdaChunk * kda_padded(V)) +
         (4 * kKdaChunk + 2) * kda_padded(K) + 2 * kda_tile_depth(K) * 256;
}

// Rows of a decoded state, an odd number of cache lines apart for the same reason.
constexpr int64_t kda_state_stride(int64_t V) {
  const int64_t lines = kda_padded(V) / 16;
  return 16 * (lines + (lines + 1) % 2);
}

// kda_decode_cpu.cc: one step of the recurrence for token t. Any strides, no padding.
struct KdaDecode {
  const KdaCpuHead& head;
  int64_t t;
  float beta;
  const float* from;  // [K, V] the state before the token
  int64_t from_stride;
  float* to;  // [K, V] the state after it; may be `from`
  int64_t to_stride;
  float* memory;  // kda_decode_memory() floats, 64-byte aligned
};
constexpr int64_t kda_decode_memory(int64_t K, int64_t V) { return 7 * kda_padded(K) + 2 * kda_padded(V); }

KL_DECLARE_PER_ISA(void kda_chunks(const KdaChunks&); void kda_chunks_tiles(const KdaChunks&);
                   void kda_decode_head(const KdaDecode&);)

}  // namespace kl
