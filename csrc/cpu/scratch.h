// Memory for the length of a call.
#pragma once
#include <cstdint>
#include <memory>

namespace fastkd {

// Aligned to a line of the cache, and with anything in it. A thread keeps some of what it gives back for its next call: malloc
// returns the memory of a thread that is not the main one to the system at once, and fetching it again, page by page, takes
// longer than many a layer.
class Scratch {
  public:
    explicit Scratch(int64_t bytes);
    char* data() const { return data_.get(); }

  private:
    struct Return {
        int64_t bytes;
        void operator()(char* data) const;
    };
    std::unique_ptr<char, Return> data_;
};

}  // namespace fastkd
