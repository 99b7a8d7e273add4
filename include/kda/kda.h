/* libkda: Kimi Delta Attention behind a C interface.
 *
 *   S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T        o_t = scale * S_t^T q_t
 *
 * T tokens of N packed sequences; sequence n owns rows [cu_seqlens[n], cu_seqlens[n+1]). H query/key heads
 * serve Hv value heads (a multiple of H). K and V up to 256, any gate from 0 to -inf a step, any length
 * including zero.
 *
 * Memory belongs to the caller. On KDA_CUDA every pointer is device memory of the current device, work is
 * queued on `stream` and no call waits for it: memory must stay as it is until the stream has done the work.
 * Calls can be captured into a CUDA graph. Contents of device index tensors cannot be checked: slots outside
 * of the pool are the caller's fault. On KDA_CPU a call returns when the work is done.
 *
 * Calls are safe from several threads; those on the CPU that ask for threads take turns. */
#ifndef KDA_KDA_H
#define KDA_KDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define KDA_API __attribute__((visibility("default")))
#else
#define KDA_API
#endif

/* The library's version of this interface. Minor versions add fields at the end of structs and functions. */
#define KDA_ABI_MAJOR 1
#define KDA_ABI_MINOR 1
KDA_API uint32_t kda_abi_version(void); /* major << 16 | minor */

typedef enum kda_status {
  KDA_OK = 0,
  KDA_REFUSED = 1,   /* arguments do not fit together, or the device refused; kda_last_error() says what */
  KDA_NO_MEMORY = 2, /* host memory is exhausted */
  KDA_INTERNAL = 3   /* anything else; kda_last_error() says what */
} kda_status;

/* What the calling thread's last call that did not return KDA_OK had to say. Never null. */
KDA_API const char* kda_last_error(void);

typedef enum kda_device { KDA_CPU = 0, KDA_CUDA = 1 } kda_device;
typedef enum kda_dtype { KDA_F32 = 0, KDA_BF16 = 1, KDA_I32 = 2, KDA_I64 = 3 } kda_dtype;

/* A view. data = NULL: absent. Strides in elements; the innermost dimension is contiguous (stride 1).
 * Addresses are multiples of the element's size. */
typedef struct kda_tensor {
  void* data;
  int32_t dtype; /* kda_dtype */
  int32_t rank;  /* 1 to 4 */
  int64_t shape[4], stride[4];
} kda_tensor;

typedef enum kda_gate {
  KDA_GATE_LOG_DECAY = 0, /* g as given, at most 0 */
  KDA_GATE_SOFTPLUS = 1,  /* -exp(A_log) * softplus(g + dt_bias) */
  KDA_GATE_BOUNDED = 2    /* lower_bound * sigmoid(exp(A_log) * (g + dt_bias)) */
} kda_gate;
typedef enum kda_beta { KDA_BETA_VALUE = 0, KDA_BETA_SIGMOID = 1, KDA_BETA_SIGMOID2 = 2 } kda_beta;

/* Always begin with kda_args_init(). */
typedef struct kda_args {
  uint32_t struct_size; /* sizeof(kda_args) of the caller; a library takes any size that it knows */
  int32_t device;       /* kda_device */
  void* stream;         /* cudaStream_t; NULL: the default stream */
  int32_t threads;      /* KDA_CPU: threads to use; 0 or 1: the calling one */
  int32_t gate;         /* kda_gate */
  int32_t beta_kind;    /* kda_beta */
  int32_t state_v_first;
  int32_t l2norm; /* q and k are first divided by sqrt(sum of squares + l2_eps) */
  float l2_eps;
  float scale;       /* 0: K^-0.5 */
  float lower_bound; /* of KDA_GATE_BOUNDED, below 0 */

  kda_tensor q, k;       /* [T, H, K]   f32|bf16 */
  kda_tensor v;          /* [T, Hv, V]  f32|bf16 */
  kda_tensor g;          /* [T, Hv, K]  f32|bf16 */
  kda_tensor beta;       /* [T, Hv]     f32|bf16 */
  kda_tensor cu_seqlens; /* [N + 1]     i32|i64 */
  kda_tensor out;        /* [T, Hv, V]  f32|bf16, overwritten */
  kda_tensor A_log;      /* [Hv]        f32, optional */
  kda_tensor dt_bias;    /* [Hv, K]     f32, optional */

  kda_tensor state; /* [slots, Hv, K, V] f32 (KDA_CUDA also bf16); [slots, Hv, V, K] with state_v_first */
  kda_tensor slot; /* [N] i32: where a sequence finds its state and leaves it; < 0: from zero, nothing kept */
  kda_tensor slot_out; /* [N] i32, optional: the final state goes here instead (< 0: nowhere) */
  /* Optional, [M] i32 each: the state behind row checkpoint_row[m], a multiple of 16 tokens from the start of
   * its sequence, is left at checkpoint_slot[m] (< 0: nowhere). Rows ascend. */
  kda_tensor checkpoint_row, checkpoint_slot;

  /* KDA_CUDA, kda_prefill(): kda_workspace_bytes() of memory, 256-byte aligned, free again when the work is
   * done. */
  void* workspace;
  uint64_t workspace_bytes;

  /* Since 1.1. KDA_CUDA: the bits of a sequence do not depend on what else is in the batch. Costs speed where
   * kernels are chosen, or sequences cut, by the size of a batch. Calls with checkpoints and without differ.
   */
  int32_t batch_invariant;
  int32_t reserved; /* 0 */
} kda_args;

/* Clears `args` and sets struct_size and the defaults: CPU, softplus gate, beta a logit, l2norm with 1e-6,
 * lower_bound -5. `size` is sizeof(kda_args). */
KDA_API void kda_args_init(kda_args* args, size_t size);

/* Any lengths. */
KDA_API kda_status kda_prefill(const kda_args* args);
/* Short sequences: one step of the recurrence after another. */
KDA_API kda_status kda_decode(const kda_args* args);
/* Bytes of workspace that kda_prefill() needs for tensors of these shapes, strides and alignments,
   whatever they hold. */
KDA_API kda_status kda_workspace_bytes(const kda_args* args, uint64_t* bytes);

#ifdef __cplusplus
}
#endif
#endif /* KDA_KDA_H */
