// Which instruction set the CPU kernels use. An x_cpu.cc file is compiled once per instruction set, each time
// in a namespace of that name (kl::generic, kl::avx2, kl::avx512, kl::avx512_bf16); x.cc declares the
// functions for all of them and calls the active one (amx adds tiles to avx512_bf16 and shares its
// namespace):
//
//   KL_DECLARE_PER_ISA(void gemm_nt(const Gemm&);)
//   KL_ACTIVE_ISA(gemm_nt)({...});
//
// A file that AVX-512-BF16 gives nothing may leave it out: KL_DECLARE_UP_TO_AVX512 declares its functions for
// the others, and avx512's are avx512_bf16's too.
//
// The active one is chosen at the first use and stays, unless somebody forces another.
#pragma once

#include <cstdint>
#include <string_view>

namespace kl {

enum class Isa : uint8_t { generic, avx2, avx512, avx512_bf16, amx };  // each includes the ones before it
constexpr Isa kIsas[] = {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

constexpr std::string_view name_of(Isa isa) {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
  }
  return "?";
}

bool isa_supported(Isa);  // by this build, the processor and the operating system
Isa best_isa();
Isa active_isa();     // best_isa(), or what was forced
void force_isa(Isa);  // for all threads, between operators; throws if it is not supported

}  // namespace kl

#if defined(__x86_64__)
#define KL_DECLARE_WITHOUT_BF16(...) \
  namespace generic {                \
  __VA_ARGS__                        \
  }                                  \
  namespace avx2 {                   \
  __VA_ARGS__                        \
  }                                  \
  namespace avx512 {                 \
  __VA_ARGS__                        \
  }
#define KL_DECLARE_PER_ISA(...)        \
  KL_DECLARE_WITHOUT_BF16(__VA_ARGS__) \
  namespace avx512_bf16 {              \
  __VA_ARGS__                          \
  }
#define KL_DECLARE_UP_TO_AVX512(...)   \
  KL_DECLARE_WITHOUT_BF16(__VA_ARGS__) \
  namespace avx512_bf16 {              \
  using namespace avx512;              \
  }
#define KL_ACTIVE_ISA(function)                                          \
  (::kl::active_isa() >= ::kl::Isa::avx512_bf16 ? &avx512_bf16::function \
   : ::kl::active_isa() == ::kl::Isa::avx512    ? &avx512::function      \
   : ::kl::active_isa() == ::kl::Isa::avx2      ? &avx2::function        \
                                                : &generic::function)
#else
#define KL_DECLARE_PER_ISA(...) \
  namespace generic {           \
  __VA_ARGS__                   \
  }
#define KL_DECLARE_UP_TO_AVX512(...) KL_DECLARE_PER_ISA(__VA_ARGS__)
#define KL_ACTIVE_ISA(function) (&generic::function)
#endif
