// The row pieces of a teacher that names k ids a row: what every instruction set implements, once per table entry.
// What they are asked is in fastkd/_topk_rows.py.
#pragma once
#include "logit.h"

namespace fastkd {

constexpr int64_t kBlock = 512;  // ids; a tile of any instruction set is a multiple of it

// The named ids of one row, and for `statistics` their order by the blocks that the row is walked over in.
struct NamedIds {
    const int64_t* ids;  // -1: an entry that is absent
    int64_t count;
    const int32_t* first;  // of each block, and one past the last: where its entries begin in `order`
    const int32_t* order;  // entries by block, without those that are absent
    float* values;         // one an entry, and room for a vector more: its logit, then what its gradient gets
};

struct TopKKernels {
    // One pass over the logits of a soft row: the sums of its tail alone, and those of the whole row. The logits of the
    // named ids, -inf for an entry that is absent, become the `values`.
    void (*statistics)(const LogitRow&, const NamedIds&, StudentSums& tail, StudentSums&);
    // One row of the gradient, in the student's dtype; it may be the student's own memory. Shared ids get `spread` times
    // q_j by g.student, the named ones their `values` (which are spent), and all the hard term. In a row that is not soft
    // nobody is named.
    void (*gradient)(const LogitRow&, const NamedIds&, float spread, const LogitGradient& g, void* grad);
};

}  // namespace fastkd
