#include "pairs_angle.cuh"

#include "pairs.h"
#include "pairs_device.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kThreads = (kTile / kMicro) * (kTile / kMicro), kWarps = kThreads / 32;
constexpr int kColumns = 2 * kTile;  // of a block: those of j, then those of k
constexpr int kTeacher = 3;          // the first of the teacher's planes
constexpr int kPrepareThreads = 256;
constexpr double kRootHalf = 0.70710678118654752440;

struct Four {
    float at[kMicro];
};

// Three numbers of a pair, for 4 pairs in a row: the squared distance as the sum of two floats, and sqrt(1/2) u with
// u = 1 / distance, or 0 if the two coincide. Squared distances are relative to a power of 2 near their mean.
struct Pairs {
    Four high, low, inverse;
};

__device__ inline Four four(const float* address) {
    const float4 x = *reinterpret_cast<const float4*>(address);
    return {{x.x, x.y, x.z, x.w}};
}

__device__ inline Pairs pairs_at(const float* address, int64_t stride) {
    return {four(address), four(address + stride), four(address + 2 * stride)};
}

// 2^-e for a mean of 2^e.
__device__ inline double unit(double mean) { return mean > 0 ? scalbn(1.0, -ilogb(mean)) : 1.0; }

struct Prepare {
    const double *squares, *sum;
    float* planes;
    int64_t n, padded, first_plane;
    double coincident;
};

// (n, n) doubles -> three planes of (padded, kPlanes, padded) floats.
__global__ void __launch_bounds__(kPrepareThreads) prepare(Prepare p) {
    const double mean = mean_square(*p.sum, p.n), scale = unit(mean), threshold = coincident_square(p.coincident, mean);
    const int64_t stride = int64_t{gridDim.x} * kPrepareThreads;
    for (int64_t e = int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x; e < p.padded * p.padded; e += stride) {
        const int64_t row = e / p.padded, column = e % p.padded;
        const bool inside = row < p.n && column < p.n;
        const double square = inside ? p.squares[row * p.n + column] : 0.0, scaled = square * scale;
        const bool apart = row != column && square > threshold;
        const float high = static_cast<float>(scaled);
        float* out = p.planes + (row * kPlanes + p.first_plane) * p.padded + column;
        out[0] = high;
        out[p.padded] = static_cast<float>(scaled - static_cast<double>(high));
        out[2 * p.padded] = apart ? static_cast<float>(kRootHalf / sqrt(scaled)) : 0.0f;
    }
}

// The squared distances of a thread's 4 x 4 columns j and k, which stay while it goes through the anchors.
struct Between {
    Four high[kMicro], low[kMicro], teacher_high[kMicro], teacher_low[kMicro];
};

// What it adds up over all anchors.
struct Sums {
    double pull[kMicro][kMicro] = {};
    double loss = 0;
};

// What it adds up over its columns, for one anchor.
struct RowSums {
    double pull_of_j[kMicro] = {}, pull_of_k[kMicro] = {};
    float turn_of_j[kMicro] = {}, turn_of_k[kMicro] = {};
};

// cos of the angle at i between j and k: (Q_ij + Q_ik - Q_jk) u_ij u_ik / 2. However close two of the three are, the error
// is a few roundings of 1: Q_jk is taken from the larger of the others, and what that leaves is of the order of
// d_ij d_ik or is exact.
__device__ inline float cosine(float ij, float ij_low, float ik, float ik_low, float jk, float jk_low, float half_weight) {
    const float high = (fmaxf(ij, ik) - jk) + fminf(ij, ik);
    // Not to be fused with the difference of two cosines, which is 0 where they are equal.
    return __fmul_rn(high + ((ij_low + ik_low) - jk_low), half_weight);
}

// Where j is k the cosine is 1, or 0 if it coincides with the anchor: to a rounding, and the two sums cancel in the slope.
template <bool gradient>
__device__ inline void one_anchor(const float* of_j, const float* of_k, const Between& q, float delta, Sums& sums, RowSums& rows) {
    const Pairs sj = pairs_at(of_j, kColumns), tj = pairs_at(of_j + kTeacher * kColumns, kColumns);
    const Pairs sk = pairs_at(of_k, kColumns), tk = pairs_at(of_k + kTeacher * kColumns, kColumns);
    float loss = 0;
#pragma unroll
    for (int a = 0; a < kMicro; ++a) {
#pragma unroll
        for (int b = 0; b < kMicro; ++b) {
            const float weight = sj.inverse.at[a] * sk.inverse.at[b], weight_taught = tj.inverse.at[a] * tk.inverse.at[b];
            const float cos = cosine(sj.high.at[a], sj.low.at[a], sk.high.at[b], sk.low.at[b], q.high[a].at[b], q.low[a].at[b], weight);
            const float taught = cosine(tj.high.at[a], tj.low.at[a], tk.high.at[b], tk.low.at[b], q.teacher_high[a].at[b],
                                        q.teacher_low[a].at[b], weight_taught);
            const float error = cos - taught;
            const float h = fminf(fmaxf(error, -delta), delta);
            loss += h * (error - 0.5f * h);
            if (!gradient) continue;
            // One rounded number goes into three sums, and these are in double: the large terms of two near rows cancel in the
            // gradient of a third.
            const double pull = h * weight;
            const float turn = h * cos;
            sums.pull[a][b] += pull, rows.pull_of_j[a] += pull, rows.pull_of_k[b] += pull;
            rows.turn_of_j[a] += turn, rows.turn_of_k[b] += turn;
        }
    }
    sums.loss += static_cast<double>(loss);
}

// Adds up x[0..3] over the lanes that differ in the bits `high` and `low`. Each keeps one of the four sums: number `kept`.
template <class T>
__device__ inline T add_up(const T (&x)[kMicro], unsigned lane, unsigned high, unsigned low) {
    const bool second = lane & high, odd = lane & low;
    const T even_sum = (second ? x[2] : x[0]) + __shfl_xor_sync(kAllLanes, second ? x[0] : x[2], high);
    const T odd_sum = (second ? x[3] : x[1]) + __shfl_xor_sync(kAllLanes, second ? x[1] : x[3], high);
    return (odd ? odd_sum : even_sum) + __shfl_xor_sync(kAllLanes, odd ? even_sum : odd_sum, low);
}
__device__ inline unsigned kept(unsigned lane, unsigned high, unsigned low) { return (lane & high ? 2 : 0) + (lane & low ? 1 : 0); }

// The sums of RowSums over the block, for some anchors. The columns k are added up by each warp.
struct Exchange {
    double pull_of_j[kAnchors][kTile], pull_of_k[kWarps][kAnchors][kTile];
    float turn_of_j[kAnchors][kTile], turn_of_k[kWarps][kAnchors][kTile];
};

// Of a warp's lanes, bits 0 to 2 are the columns k and bits 3 and 4 the columns j.
__device__ inline void exchange_rows(const RowSums& rows, int anchor, Exchange& exchange) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double pull = add_up(rows.pull_of_j, lane, 4, 2);
    float turn = add_up(rows.turn_of_j, lane, 4, 2);
    pull += __shfl_xor_sync(kAllLanes, pull, 1);
    turn += __shfl_xor_sync(kAllLanes, turn, 1);
    const unsigned j = threadIdx.x / 8 * kMicro + kept(lane, 4, 2), k = lane % 8 * kMicro + kept(lane, 16, 8);
    if (lane % 2 == 0) exchange.pull_of_j[anchor][j] = pull, exchange.turn_of_j[anchor][j] = turn;
    exchange.pull_of_k[warp][anchor][k] = add_up(rows.pull_of_k, lane, 16, 8);
    exchange.turn_of_k[warp][anchor][k] = add_up(rows.turn_of_k, lane, 16, 8);
}

struct Angle {
    const float* planes;  // (padded, kPlanes, padded)
    double* pull;         // (groups, padded, padded): sum_i h_ijk u_ij u_ik / 2, where j's tile is not after k's
    double* row_pull;     // (tiles, slab, padded): sum_k h_ijk u_ij u_ik / 2 over the k of a tile
    float* row_turn;      // the same of h_ijk cos_ijk
    double* losses;       // (groups, pairs of tiles)
    int64_t padded, slab, first, end;  // the anchors of this launch
    int tiles;
    float delta;
};

// Two tiles of columns, J <= K, and a group's share of the anchors.
struct Work {
    int64_t j, k, begin, end;
};

__device__ inline Work work(const Angle& p) {
    int64_t j = 0, left = blockIdx.x;
    while (left >= p.tiles - j) left -= p.tiles - j, ++j;
    const int64_t anchors = p.end - p.first, share = (anchors + gridDim.y - 1) / gridDim.y;
    const int64_t begin = p.first + share * blockIdx.y;
    return {j, j + left, begin, min(p.end, begin + share)};
}

// The sums over the columns of this block, for `anchors` anchors from `begin`.
__device__ inline void write_rows(const Angle& p, const Work& w, int64_t begin, int anchors, const Exchange& exchange) {
    const int column = threadIdx.x % kTile;
    const bool of_j = threadIdx.x < kTile;
    if (!of_j && w.j == w.k) return;  // they are the same sums
    const int64_t tile = of_j ? w.k : w.j, first = (of_j ? w.j : w.k) * kTile;
    for (int s = 0; s < anchors; ++s) {
        const int64_t at = (tile * p.slab + (begin - p.first + s)) * p.padded + first + column;
        double pull = of_j ? exchange.pull_of_j[s][column] : 0.0;
        float turn = of_j ? exchange.turn_of_j[s][column] : 0.0f;
        for (int warp = 0; warp < kWarps && !of_j; ++warp) {
            pull += exchange.pull_of_k[warp][s][column], turn += exchange.turn_of_k[warp][s][column];
        }
        p.row_pull[at] = pull;
        p.row_turn[at] = turn;
    }
}

// What goes on over slabs is added to what the last one left.
__device__ inline void write_sums(const Angle& p, const Work& w, const Sums& sums, bool gradient, double* scratch) {
    const bool begins = p.first == 0;
    const int64_t j = w.j * kTile + threadIdx.x / 8 * kMicro, k = w.k * kTile + threadIdx.x % 8 * kMicro;
    double* pull = p.pull + (int64_t{blockIdx.y} * p.padded + j) * p.padded + k;
    for (int a = 0; a < kMicro && gradient; ++a) {
        for (int b = 0; b < kMicro; ++b) {
            double& target = pull[a * p.padded + b];
            target = begins ? sums.pull[a][b] : target + sums.pull[a][b];
        }
    }
    const double loss = block_sum(sums.loss, scratch) * (w.j == w.k ? 1 : 2);
    double& target = p.losses[int64_t{blockIdx.y} * gridDim.x + blockIdx.x];
    if (threadIdx.x == 0) target = begins ? loss : target + loss;
}

// Numbers of a block's columns, for some anchors.
using Stage = float[kAnchors][kPlanes][kColumns];

template <bool gradient>
__device__ inline void angles_of_block(const Angle& p, Stage& stage, Exchange* exchange, double* scratch) {
    const Work w = work(p);
    const int j = threadIdx.x / 8 * kMicro, k = threadIdx.x % 8 * kMicro;
    const int64_t column = (threadIdx.x < kTile ? w.j * kTile : w.k * kTile - kTile) + threadIdx.x;
    Between q;
#pragma unroll
    for (int a = 0; a < kMicro; ++a) {
        const float* row = p.planes + (w.j * kTile + j + a) * kPlanes * p.padded + w.k * kTile + k;
        q.high[a] = four(row), q.low[a] = four(row + p.padded);
        q.teacher_high[a] = four(row + kTeacher * p.padded), q.teacher_low[a] = four(row + (kTeacher + 1) * p.padded);
    }
    Sums sums;
    for (int64_t begin = w.begin; begin < w.end; begin += kAnchors) {
        const int anchors = static_cast<int>(min(int64_t{kAnchors}, w.end - begin));
        for (int s = 0; s < anchors; ++s) {
            const float* row = p.planes + (begin + s) * kPlanes * p.padded + column;
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane) stage[s][plane][threadIdx.x] = row[plane * p.padded];
        }
        __syncthreads();
        for (int s = 0; s < anchors; ++s) {
            RowSums rows;
            one_anchor<gradient>(&stage[s][0][j], &stage[s][0][kTile + k], q, p.delta, sums, rows);
            if (gradient) exchange_rows(rows, s, *exchange);
        }
        __syncthreads();
        if (gradient) write_rows(p, w, begin, anchors, *exchange);
    }
    write_sums(p, w, sums, gradient, scratch);
}

__global__ void __launch_bounds__(kThreads) angles(Angle p) {
    alignas(16) __shared__ Stage stage;
    __shared__ double scratch[kWarps];
    angles_of_block<false>(p, stage, nullptr, scratch);
}

__global__ void __launch_bounds__(kThreads) angles_and_slopes(Angle p) {
    alignas(16) __shared__ Stage stage;
    __shared__ Exchange exchange;
    __shared__ double scratch[kWarps];
    angles_of_block<true>(p, stage, &exchange, scratch);
}

struct Finish {
    const float* planes;
    const double *pull, *row_pull, *sum;
    const float* row_turn;
    double* slopes;
    int64_t n, padded, slab, first, end;
    int tiles, groups;
};

// Of the slab's anchors i: sum_k h_ijk u_ij u_ik - u_ij^2 sum_k h_ijk cos_ijk, at (i, j).
__global__ void __launch_bounds__(kPrepareThreads) add_tiles(Finish p) {
    const int64_t stride = int64_t{gridDim.x} * kPrepareThreads, count = (p.end - p.first) * p.n;
    for (int64_t e = int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x; e < count; e += stride) {
        const int64_t anchor = e / p.n, column = e % p.n, i = p.first + anchor;
        double pull = 0, turn = 0;
        for (int64_t tile = 0; tile < p.tiles; ++tile) {
            const int64_t at = (tile * p.slab + anchor) * p.padded + column;
            pull += p.row_pull[at], turn += static_cast<double>(p.row_turn[at]);
        }
        const double u = p.planes[(i * kPlanes + 2) * p.padded + column];
        p.slopes[i * p.n + column] = 2 * (pull - u * u * turn);
    }
}

// T_ij = what add_tiles left at (i, j) and at (j, i), less sum_a h_aij u_ai u_aj; of squared distances as they were given.
__global__ void __launch_bounds__(kPrepareThreads) finish_slopes(Finish p) {
    const double scale = unit(mean_square(*p.sum, p.n));
    const int64_t stride = int64_t{gridDim.x} * kPrepareThreads, count = p.n * p.n;
    for (int64_t e = int64_t{blockIdx.x} * kPrepareThreads + threadIdx.x; e < count; e += stride) {
        const int64_t i = e / p.n, j = e % p.n;
        if (i >= j) continue;  // at (i, i) add_tiles leaves 0
        double pull = 0;
        for (int64_t group = 0; group < p.groups; ++group) pull += p.pull[(group * p.padded + i) * p.padded + j];
        const double slope = scale * (p.slopes[i * p.n + j] + p.slopes[j * p.n + i] - 2 * pull);
        p.slopes[i * p.n + j] = slope;
        p.slopes[j * p.n + i] = slope;
    }
}

__global__ void __launch_bounds__(kPrepareThreads) add_losses(const double* losses, int64_t count, double* loss) {
    __shared__ double scratch[kPrepareThreads / 32];
    double sum = 0;
    for (int64_t e = threadIdx.x; e < count; e += kPrepareThreads) sum += losses[e];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *loss = sum;
}

}  // namespace

int64_t angle_loss_scratch(int64_t n, bool gradient, int64_t slab_bytes) { return AngleSizes(n, gradient, slab_bytes).bytes; }

int angle_loss(const SquaredDistances& squares, double delta, double* loss, double* slopes, int64_t slab_bytes, void* scratch,
               void* stream) {
    const bool gradient = slopes != nullptr;
    const AngleSizes z(squares.n, gradient, slab_bytes);
    char* memory = static_cast<char*>(scratch);
    const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(memory + at); };
    const auto doubles = [&](int64_t at) { return reinterpret_cast<double*>(memory + at); };
    Launcher launch(stream);
    const unsigned prepare_blocks = blocks_for(z.padded * z.padded, kPrepareThreads);
    const Prepare student = {squares.student, squares.student_sum, floats(z.planes), z.n, z.padded, 0, squares.coincident};
    const Prepare teacher = {squares.teacher, squares.teacher_sum, floats(z.planes), z.n, z.padded, kTeacher, squares.coincident};
    launch(prepare, prepare_blocks, kPrepareThreads, student);
    launch(prepare, prepare_blocks, kPrepareThreads, teacher);
    const auto tiles = static_cast<int>(z.tiles);
    Angle p = {floats(z.planes), doubles(z.pull), doubles(z.row_pull), floats(z.row_turn), doubles(z.losses),
               z.padded, z.slab, 0, 0, tiles, static_cast<float>(delta)};
    Finish f = {p.planes, p.pull, p.row_pull, squares.student_sum, p.row_turn, slopes, z.n, z.padded, z.slab, 0, 0,
                tiles, static_cast<int>(z.groups)};
    const dim3 grid(static_cast<unsigned>(z.pairs), static_cast<unsigned>(z.groups));
    for (int64_t first = 0; first < z.n; first += z.slab) {
        p.first = f.first = first, p.end = f.end = std::min(z.n, first + z.slab);
        launch(gradient ? angles_and_slopes : angles, grid, kThreads, p);
        if (gradient) launch(add_tiles, blocks_for((f.end - first) * z.n, kPrepareThreads), kPrepareThreads, f);
    }
    if (gradient) launch(finish_slopes, blocks_for(z.n * z.n, kPrepareThreads), kPrepareThreads, f);
    launch(add_losses, 1, kPrepareThreads, p.losses, z.groups * z.pairs, loss);
    return launch.error();
}

}  // namespace fastkd::cuda
