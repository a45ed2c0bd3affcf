#include "int8_plan.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kQuantizeThreads = 128, kFinishThreads = 256;

struct Quantize {
    Input input;
    int64_t pitch;
    int8_t* numbers;
    float* steps;
};

__device__ inline uint32_t block_largest(uint32_t most, uint32_t* scratch) {
    most = warp_largest(most);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = most;
    __syncthreads();
    for (int warp = 0; warp < kQuantizeThreads / 32; ++warp) most = max(most, scratch[warp]);
    return most;
}

// A block for each row. Its second pass over the row finds it in a cache; with a given step there is one pass.
__global__ void __launch_bounds__(kQuantizeThreads) quantize_rows(Quantize p) {
    __shared__ uint32_t scratch[kQuantizeThreads / 32];
    const int64_t row = blockIdx.x, first = threadIdx.x * kEight, stride = kQuantizeThreads * kEight;
    const Input& in = p.input;
    uint32_t most = 0;
    float step = 0;
    if (in.given == nullptr) {
        for (int64_t k = first; k < in.terms; k += stride) most = largest(most, eight_at(in, row, k));
        step = step_of(block_largest(most, scratch), nullptr);
    } else {
        step = *in.given;
    }
    for (int64_t k = first; k < p.pitch; k += stride) {
        const Eight x = eight_at(in, row, k);
        most = largest(most, x);
        *reinterpret_cast<uint2*>(p.numbers + row * p.pitch + k) = levels(x, step);
    }
    if (in.given != nullptr) step = step_of(block_largest(most, scratch), in.given);
    if (threadIdx.x == 0) p.steps[row] = step;
}

struct Parts {
    const int* sums;
    const float* steps;
    int64_t rows, pitch, count;
    Epilogue epilogue;
};

__global__ void __launch_bounds__(kFinishThreads) finish_parts(Parts p) {
    const int64_t groups = p.pitch / kFour, stride = int64_t{gridDim.x} * kFinishThreads;
    for (int64_t e = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x; e < p.rows * groups; e += stride) {
        const int64_t row = e / groups, column = e % groups * kFour;
        int64_t sums[kFour] = {};
        for (int64_t part = 0; part < p.count; ++part) {
            const int4 x = *reinterpret_cast<const int4*>(p.sums + (part * p.rows + row) * p.pitch + column);
            sums[0] += x.x, sums[1] += x.y, sums[2] += x.z, sums[3] += x.w;
        }
        finish_four(p.epilogue, channels_at(p.epilogue, column), row, column, p.steps[row], sums);
    }
}

bool aligned(const void* address, int64_t stride_bytes) {
    return (reinterpret_cast<uintptr_t>(address) | static_cast<uintptr_t>(stride_bytes)) % 16 == 0;
}

}  // namespace

int64_t int8_linear_scratch(int64_t rows, int64_t terms, int64_t columns, int64_t processors) {
    return Int8Plan(rows, terms, columns, processors).bytes;
}

int int8_linear(const Int8Linear& l, int64_t processors, void* scratch, void* stream) {
    const Int8Plan plan(l.rows, l.terms, l.columns, processors);
    const int64_t size = l.dtype == Dtype::float32 ? 4 : 2;
    const bool of_input = aligned(l.input, l.rows == 1 ? 0 : l.stride * size), of_weight = aligned(l.weight, l.terms);
    const bool of_output = l.columns % kFour == 0 && aligned(l.output, 0);
    const Input input = {l.input, l.terms, l.stride, l.dtype, of_input, l.given};
    const Epilogue epilogue = {l.scale, l.bias, l.residual, l.output, l.columns, l.residual_stride, l.dtype, l.activation,
                               of_output};
    Launcher launch(stream);
    if (plan.fused) {
        multiply_few_rows(launch, {input, nullptr, nullptr, l.rows, plan.pitch, l.weight, l.terms, epilogue}, of_weight);
        return launch.error();
    }
    char* memory = static_cast<char*>(scratch);
    auto* steps = reinterpret_cast<float*>(memory + plan.steps);
    auto* numbers = reinterpret_cast<int8_t*>(memory + plan.numbers);
    auto* sums = plan.parts > 1 ? reinterpret_cast<int*>(memory + plan.sums) : nullptr;
    launch(quantize_rows, static_cast<unsigned>(l.rows), kQuantizeThreads, Quantize{input, plan.pitch, numbers, steps});
    if (plan.few) {
        multiply_few_rows(launch, {input, numbers, steps, l.rows, plan.pitch, l.weight, l.terms, epilogue}, of_weight);
        return launch.error();
    }
    const Tiles tiles = {numbers, steps, l.rows, plan.pitch, l.weight, l.terms, plan.part_terms, plan.part_pitch, sums, epilogue, 0, 0};
    multiply_tiles(launch, tiles, of_weight, plan.large, plan.parts);
    if (sums != nullptr) {
        const Parts parts = {sums, steps, l.rows, plan.part_pitch, plan.parts, epilogue};
        launch(finish_parts, blocks_for(l.rows * plan.part_pitch / kFour, kFinishThreads), kFinishThreads, parts);
    }
    return launch.error();
}

}  // namespace fastkd::cuda
