// What kernels of operators with a matrix state per head read their operands with: strided f32|bf16 views,
// packed sequences (cu_seqlens of either width), states by slot. Element types of operands are decided at run
// time: a branch that the whole grid takes alike costs one instruction, and saves sixteen copies of each
// kernel.
#pragma once

#include "cuda/vec.cuh"

namespace kl::cuda {

// [T, H, X] or [T, H], innermost contiguous, f32 or bf16.
struct Operand {
  void* data;
  int64_t token_stride, head_stride;  // in elements
  bool is_bf16;
};
inline Operand operand(const Tensor& t) {
  return {t.data, t.stride[0], t.rank > 2 ? t.stride[1] : 1, t.dtype == DType::bf16};
}

// Where element (token, head, 0) stands, counted in elements.
KL_DEVICE int64_t offset_of(const Operand& t, int64_t token, int64_t head) {
  return token * t.token_stride + head * t.head_stride;
}
// Where element i stands, counted in bytes from t.data.
KL_DEVICE int64_t byte_of(const Operand& t, int64_t i) { return i << (t.is_bf16 ? 1 : 2); }
KL_DEVICE float load_element(const Operand& t, int64_t i) {
  return t.is_bf16 ? to_float(static_cast<const bf16*>(t.data)[i]) : static_cast<const float*>(t.data)[i];
}

// Elements on their way: what was loaded, not yet looked at. Converting at once would make a warp wait for
// each load before it issues the next; so loads come first, then value_of().
struct RawElement {
  uint32_t bits = 0;
};
KL_DEVICE RawElement load_raw_at(const Operand& t, int64_t byte) {
  const char* at = static_cast<const char*>(t.data) + byte;
  return {t.is_bf16 ? *reinterpret_cast<const uint16_t*>(at) : *reinterpret_cast<const uint32_t*>(at)};
}
KL_DEVICE RawElement load_raw(const Operand& t, int64_t i) { return load_raw_at(t, byte_of(t, i)); }
KL_DEVICE float value_of(const Operand& t, RawElement raw) {
  return __uint_as_float(raw.bits << (t.is_bf16 ? 16 : 0));
}

KL_DEVICE void store_element(const Operand& t, int64_t i, float x) {
  if (t.is_bf16)
    static_cast<bf16*>(t.data)[i] = from_float<bf16>(x);
  else
    static_cast<float*>(t.data)[i] = x;
}

// kCount (2 or 4) neighbours from element i on. kFull: aligned and all inside the row; otherwise the first
// `valid` are loaded (any int, at most 0 for none) and the rest are 0.
template <int kCount, bool kFull>
struct RawRun {
  uint32_t bits[kCount] = {};
};
template <int kCount, bool kFull>
KL_DEVICE RawRun<kCount, kFull> load_raw_run_at(const Operand& t, int64_t byte, int valid) {
  const char* at = static_cast<const char*>(t.data) + byte;
  RawRun<kCount, kFull> raw;
  if constexpr (!kFull) {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < valid) raw.bits[e] = load_raw_at(t, byte + byte_of(t, e)).bits;
  } else if constexpr (kCount == 2) {
    if (t.is_bf16) {
      raw.bits[0] = *reinterpret_cast<const uint32_t*>(at);
    } else {
      const uint2 x = *reinterpret_cast<const uint2*>(at);
      raw.bits[0] = x.x, raw.bits[1] = x.y;
    }
  } else {
    if (t.is_bf16) {
      const uint2 x = *reinterpret_cast<const uint2*>(at);
      raw.bits[0] = x.x, raw.bits[1] = x.y;
    } else {
      const uint4 x = *reinterpret_cast<const uint4*>(at);
      raw.bits[0] = x.x, raw.bits[1] = x.y, raw.bits[2] = x.z, raw.bits[3] = x.w;
    }
  }
  return raw;
}
template <int kCount, bool kFull>
KL_DEVICE RawRun<kCount, kFull> load_raw_run(const Operand& t, int64_t i, int valid) {
  return load_raw_run_at<kCount, kFull>(t, byte_of(t, i), valid);
}
template <int kCount, bool kFull>
KL_DEVICE void values_of(float (&x)[kCount], const Operand& t, const RawRun<kCount, kFull>& raw) {
  if constexpr (!kFull) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = value_of(t, {raw.bits[e]});
  } else {
#pragma unroll
    for (int e = kCount - 1; e >= 0; --e) {
      const uint32_t pair = raw.bits[e / 2];
      x[e] = __uint_as_float(!t.is_bf16 ? raw.bits[e] : e % 2 ? pair & 0xffff0000u : pair << 16);
    }
  }
}
template <bool kFull, int kCount>
KL_DEVICE void store_run_at(const Operand& t, int64_t byte, const float (&x)[kCount], int valid) {
  char* at = static_cast<char*>(t.data) + byte;
  if constexpr (kFull && kCount == 2) {
    if (t.is_bf16)
      store2(reinterpret_cast<bf16*>(at), {x[0], x[1]});
    else
      store2(reinterpret_cast<float*>(at), {x[0], x[1]});
  } else if constexpr (kFull) {
    const float4 four{x[0], x[1], x[2], x[3]};
    if (t.is_bf16)
      store4(reinterpret_cast<bf16*>(at), four);
    else
      store4(reinterpret_cast<float*>(at), four);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < valid) {
        if (t.is_bf16)
          reinterpret_cast<bf16*>(at)[e] = from_float<bf16>(x[e]);
        else
          reinterpret_cast<float*>(at)[e] = x[e];
      }
  }
}
template <bool kFull, int kCount>
KL_DEVICE void store_run(const Operand& t, int64_t i, const float (&x)[kCount], int valid) {
  store_run_at<kFull>(t, byte_of(t, i), x, valid);
}

// An i32 or i64 vector of row numbers.
struct RowNumbers {
  const void* data;
  bool is_i64;
};
inline RowNumbers row_numbers(const Tensor& t) { return {t.data, t.dtype == DType::i64}; }
KL_DEVICE int64_t row_number(const RowNumbers& t, int64_t i) {
  return t.is_i64 ? static_cast<const int64_t*>(t.data)[i] : static_cast<const int32_t*>(t.data)[i];
}

// Packed sequences, and the pool in which their states stand.
struct PackedStates {
  RowNumbers cu_seqlens;  // null: row n is all of sequence n
  void* state;            // null: sequences start at zero and leave nothing
  int64_t slot_stride, head_stride, row_stride;
  const int32_t *slot, *slot_out;
};
inline PackedStates packed_states(const Tensor& cu_seqlens, const Tensor& state, const Tensor& slot,
                                  const Tensor& slot_out) {
  PackedStates p{};
  if (cu_seqlens) p.cu_seqlens = row_numbers(cu_seqlens);
  if (!state) return p;
  p.state = state.data;
  p.slot_stride = state.stride[0], p.head_stride = state.stride[1], p.row_stride = state.stride[2];
  p.slot = slot.ptr<int32_t>();
  p.slot_out = slot_out ? slot_out.ptr<int32_t>() : nullptr;
  return p;
}

// Rows of a sequence, and where its state comes from and goes to (< 0: from zero, nowhere).
struct SequenceWork {
  int64_t begin, end;
  int slot, slot_out;
  KL_DEVICE bool idle() const { return begin == end && slot == slot_out; }
};
KL_DEVICE void read_rows(SequenceWork& w, const PackedStates& p, int n) {
  const bool listed = p.cu_seqlens.data != nullptr;
  // The end first: compilers wait for `begin`, which a kernel counts from, as soon as it is loaded.
  w.end = listed ? row_number(p.cu_seqlens, n + 1) : n + 1;
  w.begin = listed ? row_number(p.cu_seqlens, n) : n;
}
KL_DEVICE void read_slots(SequenceWork& w, const PackedStates& p, int n) {
  w.slot = p.state == nullptr ? -1 : p.slot[n];
  w.slot_out = p.slot_out == nullptr ? w.slot : p.slot_out[n];
}
KL_DEVICE SequenceWork sequence_work(const PackedStates& p, int n) {
  SequenceWork w;
  read_rows(w, p, n);
  read_slots(w, p, n);
  return w;
}

// log(1 + e^x) with a small relative error also where it is tiny: slow gates act over a million tokens.
KL_DEVICE float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }
KL_DEVICE float sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

// The first checkpoint whose row lies behind `row`; p.checkpoints if none does. Params: checkpoint_row,
// ascending, and checkpoints, their number.
template <class Params>
KL_DEVICE int first_checkpoint(const Params& p, int64_t row) {
  int low = 0, high = p.checkpoints;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (p.checkpoint_row[middle] > row)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

}  // namespace kl::cuda
