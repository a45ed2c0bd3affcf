// The row pieces of the logit losses, on pointers and sizes: what every instruction set implements, once per table entry.
// The mathematics is in fastkd/reference/logit.py; log here is base 2 unless a name says otherwise.
#pragma once
#include <stdint.h>

namespace fastkd {

enum class Dtype : int32_t { float32, bfloat16, float16 };

enum class Divergence : int32_t { forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd, cross_entropy, mse };

// How exp(s) comes from exp(s / T): for T = 1, 2, 4 it is a power, otherwise one more exponential.
enum class Hard : int32_t { none, same, square, fourth, separate };

constexpr float kSkipped = -1;  // as a teacher's scale

struct Row {
    const void* data;
    Dtype dtype;
};

struct StudentSums {
    float max = -3.402823466e38f;       // over the shared ids
    double sum = 0;                     // sum 2^((s - max) scale)
    float hard_max = -3.402823466e38f;  // over all ids
    double hard_sum = 0;                // sum exp(s - hard_max)
    double total = 0;                   // sum s over all ids, if asked for
    bool masked = false;                // some shared id is at -inf
};

struct TeacherSums {
    float max = -3.402823466e38f;
    double sum = 0;    // sum 2^((t - max) scale)
    double cross = 0;  // the one-pass divergences: see Cross
    double count = 0;  // mse: ids that are not at -inf on both sides
    bool masked = false;
};

struct LogitRow {
    Row student;
    const Row* teachers;
    int32_t teacher_count;
    int64_t vocabulary, shared;
    Divergence divergence;
    double beta;
    bool soft;                   // off: no shared part, the hard sums run over all ids
    Hard hard;
    bool total;
    float scale;                 // log2(e) / T
    const float* teacher_scale;  // log2(e) / T_teacher; kSkipped for a teacher that has no weight here
    int64_t absent;              // an id that the soft term leaves out, and with it both passes; -1: none
};

// What turns a side's logits into probabilities: with x_j = (s_j - max) * scale, q_j = 2^x_j / sum.
struct Normaliser {
    float max, scale, inverse_sum;
    double log_sum;
};

struct LogitGradient {
    Normaliser student;
    const Normaliser* teachers;
    const float* teacher_coefficient;  // of q_j (h_j - omega), for mse of s_j - t_j; 0 skips this teacher
    const double* omega;
    float student_coefficient;         // of q_j: the hard term at T = 1
    float power_coefficient;           // of q_j^2 or q_j^4, which is q_j at temperature 1 up to a factor
    float hard_coefficient;            // of 2^x_j at temperature 1, where it takes an exponential of its own
    Normaliser hard;
    float constant;                    // added to every id
    float label_coefficient;           // added to the label
    int64_t label;                     // -1: none
    float along, lift;                 // of standardised logits: along * (s_j - max + lift) is added to each that counts
};

// Of the logits of a row that are no masks: how many, and about what they are spread.
struct Moments {
    float highest = -3.402823466e38f;
    double count = 0, mean = 0;
    double squares = 0;  // sum (s - mean)^2
};

struct LogitKernels {
    // One pass over the logits: the sums, and for forward_kl, cross_entropy and mse the divergence.
    void (*statistics)(const LogitRow&, StudentSums&, TeacherSums*);
    // The other divergences: sum v and omega of one teacher.
    void (*divergence)(const LogitRow&, int32_t teacher, const Normaliser& student, const Normaliser& teacher_normaliser,
                       double* value, double* omega);
    // One row of the gradient, in the student's dtype; it may be the student's own memory.
    void (*gradient)(const LogitRow&, const LogitGradient&, void* grad);
    // Whether an id at -inf in `absent` is not at -inf in `present`: there the divergence is infinite. Not id `but`.
    bool (*unmatched)(const Row& absent, const Row& present, int64_t n, int64_t but);
    // The first of the best ids.
    int64_t (*best)(const Row&, int64_t n);
    Moments (*moments)(const Row&, int64_t n);
    // sum_j (s_j - mean) times the soft part of the gradient, of standardised logits.
    double (*along)(const LogitRow&, const LogitGradient&);
};

}  // namespace fastkd
