// Where a processor has VNNI beside AVX-512 int8 layers get kernels of their own; all others are those of avx512.cpp.
#include "int8_kernels-inl.h"
#include "isa.h"

namespace fastkd {

const Int8Kernels avx512vnni_int8 = int8_kernels;

bool avx512vnni_supported() {
    return avx512.supported() && __builtin_cpu_supports("avx512vnni");
}

}  // namespace fastkd
