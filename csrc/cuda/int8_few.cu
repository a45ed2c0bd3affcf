// int8 layers of few rows: see int8_plan.cuh.
#include "int8_plan.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 8;                             // of the input, in one multiplication
constexpr int kSpan = 64;                            // terms that a warp has of a row at a time: 16 for each of four lanes
constexpr int kSpans = 2;                            // that are on their way while the last ones are multiplied
constexpr int kRound = kWarps * kSpans * kSpan;      // terms that a block has at a time
constexpr int kChunk = 4 * kRound;                   // terms of the input that a block has quantised
constexpr int kPitch = (kChunk + kSpan) / 4;         // words: rows are in other banks of shared memory

// Numbers of the rows of the input, and afterwards the sums of the warps.
struct alignas(16) Quantised {
    uint32_t words[kFusedRows * kPitch];
    uint32_t most[kFusedRows][kWarps];
    float steps[kFusedRows];
};
template <int tiles>
struct alignas(16) Sums {
    int of_warps[kWarps][tiles * kRows][kFewColumns];
};

// A warp's weights: 16 rows, of which lane l has l / 4 and l / 4 + 8. Which lane has which terms of a row does not matter, as
// long as it has those of the input too: so every lane reads 16 of them at once, and they go into two multiplications.
struct Weights {
    uint4 low[kSpans], high[kSpans];
};

// The spans of a round are dealt to the warps in turn.
__device__ inline int64_t term_of(int64_t round, int span) {
    return round * kRound + (span * kWarps + threadIdx.x / 32) * kSpan + threadIdx.x % 4 * 16;
}

template <bool aligned>
__device__ inline Weights weights_at(const FewRows& p, int64_t round) {
    Weights w;
    const int64_t row = int64_t{blockIdx.x} * kFewColumns + threadIdx.x % 32 / 4;
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
        const int64_t k = term_of(round, s);
        w.low[s] = row < p.epilogue.columns ? sixteen_at<aligned>(p.weight + row * p.terms, k, p.terms) : zero;
        w.high[s] = row + 8 < p.epilogue.columns ? sixteen_at<aligned>(p.weight + (row + 8) * p.terms, k, p.terms) : zero;
    }
    return w;
}

template <int tiles>
struct Numbers {
    uint4 at[tiles][kSpans];
};

// Of the input's rows, in the order of the weights' terms.
__device__ inline Numbers<2> numbers_at(const FewRows& p, int64_t round) {
    Numbers<2> x;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        const int64_t row = tile * kRows + threadIdx.x % 32 / 4;
#pragma unroll
        for (int s = 0; s < kSpans; ++s) {
            const int64_t k = term_of(round, s);
            const bool inside = row < p.rows && k < p.pitch;
            x.at[tile][s] = inside ? *reinterpret_cast<const uint4*>(p.numbers + row * p.pitch + k) : make_uint4(0, 0, 0, 0);
        }
    }
    return x;
}

__device__ inline Numbers<1> numbers_at(const FewRows& p, int64_t round, const Quantised& shared) {
    Numbers<1> x;
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
        const auto word = row * kPitch + static_cast<int>(term_of(round, s) % kChunk) / 4;
        x.at[0][s] = row < p.rows ? *reinterpret_cast<const uint4*>(shared.words + word) : make_uint4(0, 0, 0, 0);
    }
    return x;
}

template <int tiles>
__device__ inline void multiply(const Weights& w, const Numbers<tiles>& x, int (&sums)[tiles][4]) {
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
        const uint32_t first[4] = {w.low[s].x, w.high[s].x, w.low[s].y, w.high[s].y};
        const uint32_t second[4] = {w.low[s].z, w.high[s].z, w.low[s].w, w.high[s].w};
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
            multiply_add(sums[tile], first, x.at[tile][s].x, x.at[tile][s].y);
            multiply_add(sums[tile], second, x.at[tile][s].z, x.at[tile][s].w);
        }
    }
}

__device__ inline int64_t rounds_of(const FewRows& p) { return (p.terms + kRound - 1) / kRound; }

// Of all rows at once, so that their numbers are on their way together.
__device__ inline void find_steps(const FewRows& p, Quantised& shared) {
    uint32_t most[kFusedRows] = {};
    for (int64_t k = threadIdx.x * kEight; k < p.terms; k += kThreads * kEight) {
#pragma unroll
        for (int row = 0; row < kFusedRows; ++row) {
            if (row < p.rows) most[row] = largest(most[row], eight_at(p.input, row, k));
        }
    }
#pragma unroll
    for (int row = 0; row < kFusedRows; ++row) {
        most[row] = warp_largest(most[row]);
        if (threadIdx.x % 32 == 0) shared.most[row][threadIdx.x / 32] = most[row];
    }
    __syncthreads();
    if (threadIdx.x < p.rows) {
        uint32_t of_row = 0;
        for (int warp = 0; warp < kWarps; ++warp) of_row = max(of_row, shared.most[threadIdx.x][warp]);
        shared.steps[threadIdx.x] = step_of(of_row, p.input.given);
    }
    __syncthreads();
}

// The numbers of the next rounds, with 0 for the terms of the last one that there are not.
__device__ inline void quantize_chunk(const FewRows& p, int64_t begin, Quantised& shared) {
    __syncthreads();  // the last chunk has been multiplied
    const int64_t count = min(int64_t{kChunk}, rounds_of(p) * kRound - begin);
    for (int row = 0; row < p.rows; ++row) {
        const float step = shared.steps[row];
        for (int64_t k = threadIdx.x * kEight; k < count; k += kThreads * kEight) {
            *reinterpret_cast<uint2*>(shared.words + row * kPitch + k / 4) = levels(eight_at(p.input, row, begin + k), step);
        }
    }
    __syncthreads();
}

// Lane l has of the weights' rows l / 4 and l / 4 + 8, and of the input's 2 (l % 4) and the next.
template <int tiles>
__device__ inline void finish(const FewRows& p, const int (&mine)[tiles][4], const float* steps, Sums<tiles>& sums) {
    const int warp = threadIdx.x / 32, column = threadIdx.x % 32 / 4, row = threadIdx.x % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
        int(*of_rows)[kFewColumns] = sums.of_warps[warp] + tile * kRows + row;
        of_rows[0][column] = mine[tile][0], of_rows[1][column] = mine[tile][1];
        of_rows[0][column + 8] = mine[tile][2], of_rows[1][column + 8] = mine[tile][3];
    }
    __syncthreads();
    constexpr int kGroups = kFewColumns / kFour;
    const int of_thread = threadIdx.x / kGroups, group = threadIdx.x % kGroups;
    const int64_t first = int64_t{blockIdx.x} * kFewColumns + group * kFour;
    if (of_thread >= p.rows || first >= p.epilogue.columns) return;
    int total[kFour] = {};
    for (int w = 0; w < kWarps; ++w) {
        const int4 x = *reinterpret_cast<const int4*>(sums.of_warps[w][of_thread] + group * kFour);
        total[0] += x.x, total[1] += x.y, total[2] += x.z, total[3] += x.w;
    }
    finish_four(p.epilogue, channels_at(p.epilogue, first), of_thread, first, steps[of_thread], total);
}

// The weights of a round are on their way while those of the last one are multiplied, and the first ones while the input is
// quantised.
template <bool aligned>
__device__ inline void fused_rows(const FewRows& p, Quantised& shared, Sums<1>& of_warps) {
    const int64_t rounds = rounds_of(p);
    int sums[1][4] = {};
    Weights next = weights_at<aligned>(p, 0);
    find_steps(p, shared);
    for (int64_t round = 0; round < rounds; ++round) {
        if (round * kRound % kChunk == 0) quantize_chunk(p, round * kRound, shared);
        const Weights weights = next;
        next = weights_at<aligned>(p, round + 1);
        multiply<1>(weights, numbers_at(p, round, shared), sums);
    }
    finish<1>(p, sums, shared.steps, of_warps);
}

template <bool aligned>
__device__ inline void quantised_rows(const FewRows& p, Sums<2>& of_warps) {
    const int64_t rounds = rounds_of(p);
    int sums[2][4] = {};
    Weights next = weights_at<aligned>(p, 0);
    Numbers<2> next_numbers = numbers_at(p, 0);
    for (int64_t round = 0; round < rounds; ++round) {
        const Weights weights = next;
        const Numbers<2> numbers = next_numbers;
        next = weights_at<aligned>(p, round + 1), next_numbers = numbers_at(p, round + 1);
        multiply<2>(weights, numbers, sums);
    }
    finish<2>(p, sums, p.steps, of_warps);
}

__global__ void __launch_bounds__(kThreads, 3) few_rows_fused(FewRows p) {
    __shared__ Quantised shared;
    __shared__ Sums<1> sums;
    fused_rows<true>(p, shared, sums);
}

__global__ void __launch_bounds__(kThreads, 3) few_rows_fused_odd(FewRows p) {
    __shared__ Quantised shared;
    __shared__ Sums<1> sums;
    fused_rows<false>(p, shared, sums);
}

__global__ void __launch_bounds__(kThreads, 3) few_rows(FewRows p) {
    __shared__ Sums<2> sums;
    quantised_rows<true>(p, sums);
}

__global__ void __launch_bounds__(kThreads, 2) few_rows_odd(FewRows p) {
    __shared__ Sums<2> sums;
    quantised_rows<false>(p, sums);
}

}  // namespace

void multiply_few_rows(Launcher& launch, const FewRows& p, bool aligned) {
    const auto blocks = static_cast<unsigned>(divide_up(p.epilogue.columns, kFewColumns));
    if (p.numbers == nullptr) {
        launch(aligned ? few_rows_fused : few_rows_fused_odd, blocks, kThreads, p);
    } else {
        launch(aligned ? few_rows : few_rows_odd, blocks, kThreads, p);
    }
}

}  // namespace fastkd::cuda
