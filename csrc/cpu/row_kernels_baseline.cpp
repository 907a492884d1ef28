// The kernels for the processor family's baseline, and the choice between the instruction sets.
#include "row_kernels.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#define SDKERNELS_ISA baseline
#define SDKERNELS_ISA_NAME "baseline"
#include "row_kernels_impl.h"

namespace sdkernels::cpu {

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif
#if defined(SDKERNELS_KNOWS_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

namespace {

bool runs_on_this_processor(const Kernels& table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(SDKERNELS_KNOWS_AVX512_BF16)
  if (&table == &avx512_bf16::table) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  if (&table == &avx512::table) return avx512;
  // f16c is older than avx2, and not every compiler can be asked for it.
  if (&table == &avx2::table)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &table == &baseline::table;
}

const Kernels& choose() {
  const char* variable = std::getenv("SDKERNELS_CPU_CAPABILITY");
  const std::string wanted = variable ? variable : "";
  std::string names;
  for (const Kernels* table : {
#if defined(SDKERNELS_KNOWS_AVX512_BF16)
           &avx512_bf16::table,
#endif
#if defined(__x86_64__)
           &avx512::table, &avx2::table,
#endif
           &baseline::table}) {
    if (!runs_on_this_processor(*table)) continue;
    if (wanted.empty() || wanted == table->capability) return *table;
    names += names.empty() ? table->capability : std::string(", ") + table->capability;
  }
  throw std::invalid_argument("SDKERNELS_CPU_CAPABILITY: expected one of " + names +
                              " on this processor, got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace sdkernels::cpu
