// The instruction sets, best first. FASTKD_CPU_ISA=<name> forces one; one that is unknown, or that this processor lacks,
// is an error and never silently another.
#pragma once
#include "attention.h"
#include "feature.h"
#include "int8.h"
#include "logit.h"
#include "matmul.h"
#include "pairs.h"
#include "similarity.h"
#include "topk.h"

namespace fastkd {

struct InstructionSet {
    const char* name;
    bool (*supported)();  // asks the processor and the operating system
    LogitKernels logit;
    TopKKernels topk;
    AttentionKernels attention;
    PairKernels pairs;
    FeatureKernels feature;
    Int8Kernels int8;
    MatmulKernels matmul;
    SimilarityKernels similarity;
};

extern const InstructionSet generic;
#if defined(__x86_64__)
extern const InstructionSet avx2, avx512;
extern const Int8Kernels avx512vnni_int8;
bool avx512vnni_supported();
#endif

const InstructionSet& active_instruction_set();

}  // namespace fastkd
