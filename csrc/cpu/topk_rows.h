// All rows of a teacher that names k ids a row: gather and scatter, as fastkd/_topk_rows.py describes them.
#pragma once
#include "logit_rows.h"

namespace fastkd {

struct TopKProblem {
    LogitProblem logits;  // without teachers
    const int64_t* ids;   // (rows, count), or nullptr where that is empty; -1: an entry that is absent
    int64_t count;
};

// The first row that counts and has a wrong id.
struct IdFault {
    enum Kind { none, outside, twice } kind = none;
    int64_t got = 0;
};
IdFault find_id_fault(const TopKProblem&);

// `best` is the teacher's best id of each row, or nullptr.
void topk_gather(const TopKProblem&, const int64_t* best, double* state, float* events);

// `grad_loss` has a stride, 0 for a loss that was reduced. `fresh`: the gradient's memory was just allocated, and is not
// the student's.
void topk_scatter(const TopKProblem&, const double* state, const float* events, const float* slopes, const float* grad_loss,
                  int64_t grad_loss_stride, double scale, void* grad, int64_t grad_stride, bool fresh);

}  // namespace fastkd
