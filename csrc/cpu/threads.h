// Rows over threads. OpenMP, because torch's CPU build brings its libgomp: loaded after torch, this extension shares that
// pool instead of running a second one against it.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastkd {

// After a fork the pool's threads are gone and libgomp would wait for them for ever: a child runs on its one thread.
bool forked();

// Rows that are worth a thread: waking one costs microseconds.
inline int64_t least_chunk(int64_t ids_per_row) {
    constexpr int64_t kChunk = 16384;  // ids
    return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, ids_per_row));
}

// Calls body(begin, end) for chunks of so many rows. Which thread takes a chunk does not matter to the result: a row is
// computed by one thread, in one order.
template <class Body>
void in_chunks(int64_t rows, int64_t chunk, int threads, const Body& body) {
    const int64_t chunks = (rows + chunk - 1) / chunk;
    if (threads < 2 || chunks < 2 || forked()) {
        body(int64_t{0}, rows);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t c = 0; c < chunks; ++c) body(c * chunk, std::min(rows, (c + 1) * chunk));
}

template <class Body>
void for_each_chunk(int64_t rows, int64_t ids_per_row, int threads, const Body& body) {
    in_chunks(rows, least_chunk(ids_per_row), threads, body);
}

}  // namespace fastkd
