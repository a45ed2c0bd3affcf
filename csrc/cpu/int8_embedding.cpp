#include "int8_layers.h"
#include "int8_steps.h"
#include "isa.h"
#include "threads.h"

namespace fastkd {

int64_t find_outside(const int64_t* ids, int64_t count, int64_t rows) {
    const int64_t* wrong = std::find_if(ids, ids + count, [&](int64_t id) { return id < 0 || id >= rows; });
    return wrong - ids;
}

void int8_embedding(const Int8Table& t, const int64_t* ids, int64_t count, void* output, Dtype dtype, int threads) {
    const Int8Kernels& kernels = active_instruction_set().int8;
    const int64_t bytes = t.columns * element_size(dtype);
    for_each_chunk(count, t.columns, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int8_t* numbers = t.weight + ids[i] * t.columns;
            kernels.dequantize(numbers, t.columns, t.scale[ids[i]], static_cast<char*>(output) + i * bytes, dtype);
        }
    });
}

}  // namespace fastkd
