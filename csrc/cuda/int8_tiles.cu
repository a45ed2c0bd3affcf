// int8 layers of many rows: see int8_plan.cuh.
//
// A block has a tile of the output. Terms come 64 at a time, through a few stages of shared memory that are filled by copies
// on their way while earlier ones are multiplied. Bytes 16 c to 16 c + 15 of row r of a stage are where those of
// c ^ (r / 2 % 4) would be: so eight rows that `load_matrices` reads at once are in different banks.
#include "int8_plan.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kPiece = 16, kPieces = kDepth / kPiece;  // bytes that are copied at once; pieces of a row
constexpr int kTogether = 8;                           // tiles of rows that go along the columns together, for the L2 cache
constexpr int kHalf = 64;                              // rows whose sums are in shared memory at a time

// side: rows and columns of the tile. Warps lie in `down` by `across`, each has tall x wide sums.
template <int side_, int down_, int across_, int stages_>
struct Shape {
    static constexpr int side = side_, down = down_, across = across_, stages = stages_;
    static constexpr int threads = 32 * down * across, tall = side / down, wide = side / across;
    static constexpr int operand = side * kDepth / 4, stage = 2 * operand;  // words
    static constexpr int pitch = side + 8;                                  // of sums: rows are in other banks
    static constexpr int groups = side / kFour;
    struct alignas(128) Memory {
        uint32_t words[stages * stage];
    };
    static_assert(kHalf * pitch <= stages * stage && tall <= kHalf);
};
using Small = Shape<kSmall, 2, 2, 4>;
using Large = Shape<kLarge, 2, 4, 3>;

struct Place {
    int64_t row, column;  // the first ones of the tile
    int64_t begin, end;   // terms
};

__device__ inline Place place_of_block(const Tiles& p, int side) {
    const int64_t all = kTogether * p.column_tiles, first = blockIdx.x / all * kTogether, within = blockIdx.x % all;
    const int64_t height = min(p.row_tiles - first, int64_t{kTogether});
    const int64_t begin = blockIdx.y * p.part_terms;
    return {(first + within % height) * side, within / height * side, begin, min(p.pitch, begin + p.part_terms)};
}

__device__ inline int word_of(int row, int piece) { return row * (kDepth / 4) + (piece ^ (row / 2 % kPieces)) * (kPiece / 4); }

// Asks for the terms k to k + 63 of the tile's rows and columns.
template <class T, bool aligned>
__device__ inline void fill(const Tiles& p, const Place& at, int64_t k, uint32_t* stage) {
    const int piece = threadIdx.x % kPieces;
    const int64_t term = k + piece * kPiece;
#pragma unroll
    for (int r = threadIdx.x / kPieces; r < T::side; r += T::threads / kPieces) {
        const int64_t row = at.row + r, column = at.column + r;
        const bool row_is_there = row < p.rows, column_is_there = column < p.epilogue.columns && term < p.terms;
        copy_sixteen(stage + word_of(r, piece), p.numbers + (row_is_there ? row * p.pitch + term : 0), !row_is_there);
        uint32_t* to = stage + T::operand + word_of(r, piece);
        if (aligned) {
            copy_sixteen(to, p.weight + (column_is_there ? column * p.terms + term : 0), !column_is_there);
        } else {
            const int8_t* weights = p.weight + (column_is_there ? column * p.terms : 0);
            *reinterpret_cast<uint4*>(to) = sixteen_at<false>(weights, column_is_there ? term : p.terms, p.terms);
        }
    }
}

template <class T>
using Sums = int[T::tall / 16][T::wide / 8][4];

template <class T>
__device__ inline void multiply(const uint32_t* stage, Sums<T>& sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = warp / T::across * T::tall, first_column = warp % T::across * T::wide;
#pragma unroll
    for (int k = 0; k < kPieces; k += 2) {
        uint32_t a[T::tall / 16][4], b[T::wide / 16][4];
#pragma unroll
        for (int i = 0; i < T::tall / 16; ++i) {
            load_matrices(a[i], stage + word_of(first_row + i * 16 + lane % 16, k + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < T::wide / 16; ++j) {
            const int column = first_column + j * 16 + lane / 16 * 8 + lane % 8;
            load_matrices(b[j], stage + T::operand + word_of(column, k + lane / 8 % 2));
        }
#pragma unroll
        for (int i = 0; i < T::tall / 16; ++i) {
#pragma unroll
            for (int j = 0; j < T::wide / 8; ++j) multiply_add(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
}

// The sums of the warps that have these 64 rows.
template <class T>
__device__ inline void lay_out(const Sums<T>& sums, int half, uint32_t* words) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = warp / T::across * T::tall, first_column = warp % T::across * T::wide;
    if (first_row / kHalf != half) return;
#pragma unroll
    for (int i = 0; i < T::tall / 16; ++i) {
#pragma unroll
        for (int j = 0; j < T::wide / 8; ++j) {
            uint32_t* to = words + (first_row % kHalf + i * 16 + lane / 4) * T::pitch + first_column + j * 8 + lane % 4 * 2;
            const auto word = [&](int n) { return static_cast<uint32_t>(sums[i][j][n]); };
            *reinterpret_cast<uint2*>(to) = make_uint2(word(0), word(1));
            *reinterpret_cast<uint2*>(to + 8 * T::pitch) = make_uint2(word(2), word(3));
        }
    }
}

template <class T>
__device__ inline void finish(const Tiles& p, const Place& at, const Sums<T>& sums, uint32_t* words) {
    const int group = threadIdx.x % T::groups * kFour;
    const int64_t column = at.column + group;
    const Channels channels = channels_at(p.epilogue, column);
    for (int half = 0; half < T::side / kHalf; ++half) {
        __syncthreads();  // what was here has been read
        lay_out<T>(sums, half, words);
        __syncthreads();
        for (int r = threadIdx.x / T::groups; r < kHalf; r += T::threads / T::groups) {
            const int64_t row = at.row + half * kHalf + r;
            if (row >= p.rows || column >= p.epilogue.columns) break;
            const int4 x = *reinterpret_cast<const int4*>(words + r * T::pitch + group);
            if (p.sums != nullptr) {
                *reinterpret_cast<int4*>(p.sums + (blockIdx.y * p.rows + row) * p.part_pitch + column) = x;
            } else {
                const int total[kFour] = {x.x, x.y, x.z, x.w};
                finish_four(p.epilogue, channels, row, column, p.steps[row], total);
            }
        }
    }
}

template <class T, bool aligned>
__device__ inline void tile(const Tiles& p, uint32_t* words) {
    const Place at = place_of_block(p, T::side);
    const int64_t steps = (at.end - at.begin + kDepth - 1) / kDepth;
    Sums<T> sums = {};
#pragma unroll
    for (int s = 0; s < T::stages - 1; ++s) {
        if (s < steps) fill<T, aligned>(p, at, at.begin + s * kDepth, words + s * T::stage);
        close_copies();
    }
    int from = 0, to = T::stages - 1;
    for (int64_t s = 0; s < steps; ++s) {
        wait_for_copies<T::stages - 2>();  // behind the last stage come groups of nothing
        __syncthreads();  // this stage is there for all, and the one to be filled has been multiplied
        if (s + T::stages - 1 < steps) fill<T, aligned>(p, at, at.begin + (s + T::stages - 1) * kDepth, words + to * T::stage);
        close_copies();
        multiply<T>(words + from * T::stage, sums);
        from = from + 1 == T::stages ? 0 : from + 1, to = to + 1 == T::stages ? 0 : to + 1;
    }
    finish<T>(p, at, sums, words);
}

__global__ void __launch_bounds__(Small::threads) small_tiles(Tiles p) {
    __shared__ Small::Memory memory;
    tile<Small, true>(p, memory.words);
}

__global__ void __launch_bounds__(Small::threads) small_tiles_odd(Tiles p) {
    __shared__ Small::Memory memory;
    tile<Small, false>(p, memory.words);
}

__global__ void __launch_bounds__(Large::threads, 2) large_tiles(Tiles p) {
    __shared__ Large::Memory memory;
    tile<Large, true>(p, memory.words);
}

}  // namespace

// Weights whose rows begin anywhere take small tiles: their bytes go through registers, which large tiles have none for.
void multiply_tiles(Launcher& launch, const Tiles& tiles, bool aligned, bool large, int64_t parts) {
    Tiles p = tiles;
    const int side = large && aligned ? kLarge : kSmall;
    p.row_tiles = divide_up(p.rows, side), p.column_tiles = divide_up(p.epilogue.columns, side);
    const dim3 grid(static_cast<unsigned>(p.row_tiles * p.column_tiles), static_cast<unsigned>(parts));
    if (side == kLarge) {
        launch(large_tiles, grid, Large::threads, p);
    } else {
        launch(aligned ? small_tiles : small_tiles_odd, grid, Small::threads, p);
    }
}

}  // namespace fastkd::cuda
