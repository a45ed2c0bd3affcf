// Rows over threads. OpenMP, because torch's CPU build brings its libgomp: loaded after torch, this extension shares that
// pool instead of running a second one against it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastkd {

// After a fork the pool's threads are gone and libgomp would wait for them for ever: a child runs on its one thread.
bool forked();

// Rows that are worth a thread: waking one costs microseconds.
inline int64_t least_chunk(int64_t ids_per_row) {
    constexpr int64_t kChunk = 16384;  // ids
    return std::max<int64_t>(1, kChunk / std::max<int64_t>(1, ids_per_row));
}

// The chunks of a loop, a share of them for each thread. One that has done its own helps the others, chunk by chunk. Its own
// are the same ones in every loop over the same rows: what it read or wrote before is then in its own cache, not in one that
// on a processor of several dies is five times as far away.
class Shares {
  public:
    Shares(int64_t chunks, int threads) : chunks_(chunks), next_(threads) {
        for (int64_t i = 0; i < threads; ++i) next_[i].chunk = begin(i);
    }

    template <class Take>
    void take(int64_t mine, const Take& body) {
        const int64_t count = static_cast<int64_t>(next_.size());
        for (int64_t turn = 0; turn < count; ++turn) {
            const int64_t share = (mine + turn) % count, end = begin(share + 1);
            std::atomic<int64_t>& next = next_[share].chunk;
            while (next.load(std::memory_order_relaxed) < end) {
                const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
                if (chunk < end) body(chunk);
            }
        }
    }

  private:
    int64_t begin(int64_t share) const { return share * chunks_ / static_cast<int64_t>(next_.size()); }

    struct alignas(64) Next {
        std::atomic<int64_t> chunk{0};
    };
    const int64_t chunks_;
    std::vector<Next> next_;
};

// Calls body(begin, end) for chunks of so many rows. Which thread takes a chunk does not matter to the result: a row is
// computed by one thread, in one order.
template <class Body>
void in_chunks(int64_t rows, int64_t chunk, int threads, const Body& body) {
    const int64_t chunks = (rows + chunk - 1) / chunk;
    if (threads < 2 || chunks < 2 || forked()) {
        body(int64_t{0}, rows);
        return;
    }
    Shares shares(chunks, threads);
#pragma omp parallel num_threads(threads)
    {
#if defined(_OPENMP)
        const int64_t mine = omp_get_thread_num();
#else
        const int64_t mine = 0;
#endif
        shares.take(mine, [&](int64_t c) { body(c * chunk, std::min(rows, (c + 1) * chunk)); });
    }
}

template <class Body>
void for_each_chunk(int64_t rows, int64_t ids_per_row, int threads, const Body& body) {
    in_chunks(rows, least_chunk(ids_per_row), threads, body);
}

}  // namespace fastkd
