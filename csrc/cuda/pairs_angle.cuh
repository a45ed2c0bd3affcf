// The sizes of the angle loss: what is in its scratch memory, and who works on what.
//
// All triples of one anchor i and an unordered pair j, k of columns are computed once. A block has 32 columns j and 32
// columns k, a thread 4 x 4 of them, and goes through anchors. What belongs to (j, k) stays in registers; what belongs to
// (i, j) and (i, k) is added up over the block and written out, to be added up over the tiles afterwards. To bound that
// memory, anchors come in slabs, one launch each; within a slab they are split into groups, so that small batches fill the
// device.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "launch.cuh"

namespace fastkd::cuda {

constexpr int kTile = 32, kMicro = 4, kAnchors = 8;  // columns of a block, of a thread; anchors in shared memory
constexpr int kPlanes = 6;                           // numbers of a pair: three of the student, three of the teacher
constexpr int64_t kWantedBlocks = 1024;              // a few for each multiprocessor, whichever device it is

struct AngleSizes {
    int64_t n, padded, tiles, pairs, slab, groups;
    // Where the parts of the scratch memory begin, in bytes. What is in them: struct Angle in pairs_angle.cu.
    int64_t planes, pull, row_pull, row_turn, losses, bytes;

    // slab_bytes: what a slab's sums may take; or as much as the numbers of all pairs, if that is more.
    AngleSizes(int64_t n, bool gradient, int64_t slab_bytes) : n(n) {
        constexpr int64_t kFloat = sizeof(float), kDouble = sizeof(double);
        tiles = divide_up(n, kTile), padded = tiles * kTile, pairs = tiles * (tiles + 1) / 2;
        const int64_t plane_bytes = padded * padded * kPlanes * kFloat;
        const int64_t most = std::max(slab_bytes, plane_bytes) / (tiles * padded * (kDouble + kFloat));
        slab = gradient ? std::clamp(most, int64_t{1}, n) : n;
        groups = std::min(divide_up(kWantedBlocks, pairs), divide_up(slab, kAnchors));
        const int64_t rows = gradient ? tiles * slab * padded : 0;
        planes = 0;
        pull = planes + plane_bytes;
        row_pull = pull + (gradient ? groups * padded * padded * kDouble : 0);
        losses = row_pull + rows * kDouble;
        row_turn = losses + groups * pairs * kDouble;
        bytes = row_turn + rows * kFloat;
    }
};

}  // namespace fastkd::cuda
