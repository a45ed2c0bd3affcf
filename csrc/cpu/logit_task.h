// What any loss on rows of logits does for one row, beside its pieces: which terms have a weight, and the hard one.
#pragma once
#include <limits>
#include <vector>

#include "logit_rows.h"

namespace fastkd {

// The columns of the state: fastkd/_rows.py.
enum { kWeight, kHard, kSoft, kStudentMax, kStudentLogsum, kHardMax, kHardLogsum, kTargetAgrees, kTeacherAgrees, kFirstTeacher };
enum { kTeacherMax, kTeacherLogsum, kOmega, kTeacherColumns };
enum { kLift, kStd, kCount, kMoments };

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();

// log sum exp relative to the maximum; NaN for a row with no finite logit.
double logsum(double sum);

inline int64_t state_width(const LogitProblem& p) {
    const auto teachers = static_cast<int64_t>(p.teachers.size());
    return kFirstTeacher + kTeacherColumns * teachers + (p.standardize ? kMoments * (1 + teachers) : 0);
}

// From a maximum and the natural logarithm of a sum, as the state has them.
Normaliser normaliser(const double* state, float scale);

// What the pieces need to know of one row, and which of its terms have a weight at all.
struct RowTask {
    LogitRow row;
    std::vector<Row> teachers;
    std::vector<float> teacher_scale;
    bool taught;  // by somebody, who need not be among the problem's teachers
    bool hard, soft;
    double alpha, temperature;
    double spread;  // what the student's logits are divided by before the temperature: 1, unless they are standardised
    float weight;
    int64_t label;

    RowTask(const LogitProblem&, bool taught);
    void set(const LogitProblem&, int64_t i);
    // Makes temperatures of the row's own of its moments, which the state has from this place on.
    void standardize(const LogitProblem&, int64_t i, const double* moments);
};

// Adds the id that no pass saw to the hard sums.
void add_absent(const RowTask&, StudentSums&);

// Fills the state's hard columns.
void hard_term(const LogitProblem&, const RowTask&, const StudentSums&, double* state);

// Fills the hard part of the gradient. `max` and `log_sum` are of the softmax that g.student has, if the row is soft.
void hard_terms(const LogitProblem&, const RowTask&, const double* state, double weight, double max, double log_sum, LogitGradient& g);

// A fresh allocation of hundreds of megabytes is paid for page by page: huge pages make that 512 times fewer.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace fastkd
