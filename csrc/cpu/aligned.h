// Scratch memory that vector loads never split a cache line of.
#pragma once

#include <cstdint>
#include <new>

namespace mmq {

class AlignedFloats {
  public:
    explicit AlignedFloats(int64_t count)
        : data_(
              static_cast<float*>(::operator new(static_cast<size_t>(count + 16) * sizeof(float), kAlign))) {}
    ~AlignedFloats() { ::operator delete(data_, kAlign); }
    AlignedFloats(const AlignedFloats&) = delete;
    AlignedFloats& operator=(const AlignedFloats&) = delete;

    float* data() const { return data_; }

  private:
    static constexpr std::align_val_t kAlign{64};
    float* data_;
};

}  // namespace mmq
