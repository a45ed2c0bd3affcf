#include "attention-inl.h"
#include "feature-inl.h"
#include "int8_kernels-inl.h"
#include "isa.h"
#include "logit-inl.h"
#include "matmul-inl.h"
#include "pairs-inl.h"
#include "similarity-inl.h"
#include "standard-inl.h"
#include "topk-inl.h"

namespace fastkd {

static bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

const InstructionSet avx512 = {
    "avx512",
    supported,
    {statistics, divergence, gradient, unmatched, best, moments, along},
    {topk_statistics, topk_gradient},
    {kLanes, kRows, W, pack, attention_statistics, attention_gradient, write_row},
    {{squares<double>, pull<double>, kPull<double>},
     {squares<float>, pull<float>, kPull<float>},
     distances,
     distance_row,
     distance_slopes,
     angles},
    {distance, difference, combination, add_powers, sum_powers, power_gradient},
    int8_kernels,
    {{kPanel<double>, pack_panel<double>, multiply_panels<double>}, {kPanel<float>, pack_panel<float>, multiply_panels<float>}},
    {similarity_row},
};

}  // namespace fastkd
