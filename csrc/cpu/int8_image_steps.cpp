#include "int8_image_steps.h"

#include <vector>

#include "int8_steps.h"
#include "isa.h"
#include "threads.h"

namespace fastkd {

uint32_t largest_of(const uint32_t* bits, int64_t count) { return count ? *std::max_element(bits, bits + count) : 0; }

void find_image_steps(const Int8Layer& l, int64_t size, int64_t first, int64_t count, float* steps) {
    constexpr int64_t kPiece = 16384;
    const int64_t pieces = (size + kPiece - 1) / kPiece;
    const char* input = static_cast<const char*>(l.input) + first * size * element_size(l.dtype);
    std::vector<uint32_t> found(count * pieces);
    for_each_chunk(count * pieces, kPiece, l.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t from = i % pieces * kPiece;
            const char* x = input + (i / pieces * size + from) * element_size(l.dtype);
            found[i] = active_instruction_set().int8.largest(x, l.dtype, std::min(kPiece, size - from));
        }
    });
    for (int64_t i = 0; i < count; ++i) steps[i] = step_of(largest_of(found.data() + i * pieces, pieces), nullptr);
}

}  // namespace fastkd
