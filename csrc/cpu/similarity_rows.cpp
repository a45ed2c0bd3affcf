#include "similarity_rows.h"

#include <vector>

#include "isa.h"
#include "threads.h"

namespace fastkd {

double compare_similarities(const double* student, const double* teacher, int64_t rows, int64_t columns, double eps, int threads,
                            double* slopes) {
    const auto row = active_instruction_set().similarity.row;
    std::vector<double> sums(rows);
    for_each_chunk(rows, columns, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t at = i * columns;
            sums[i] = row(student + at, teacher + at, columns, eps, slopes == nullptr ? nullptr : slopes + at);
        }
    });
    double total = 0;
    for (const double one : sums) total += one;
    return total;
}

}  // namespace fastkd
