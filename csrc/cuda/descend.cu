// Behind GPTQ's loop: a search for the grid of one group of columns, and a round of descent on the group. What both do
// is said in common/descent.inl and cpu/descend.inl; results are the same bits as the CPU's.
//
//   search    weight fp32 [n, columns], importance fp32 [columns] -> scale, zero [n]; any number of columns
//   descend   gradient fp32 [n, columns], H fp32 [columns, columns]; codes, scale, zero in and out; moved fp32
//             [n, columns], gained fp32 [n]; up to 128 columns
//
// Rows are independent, and four lanes share one, as in gptq.cu: lane l has the columns 4i + l. For a descent they keep
// gradient, codes and v H of these in registers; H lies in shared memory, and a row's v = q - zero, which all its lanes
// read column by column. A search reads its weights anew for each share that it tries: they are in L1 or L2.
#include "../common/half.h"
#include "../common/layout.h"
#include "kernels.h"
#include "ptx.cuh"
#include "runtime.cuh"

namespace mmq::cuda {
namespace {

#include "../common/grid.inl"

#include "../common/descent.inl"

constexpr int kThreads = 128;
constexpr int kLanes = 4;                 // of a row
constexpr int kRows = kThreads / kLanes;  // of a block
constexpr int kColumns = kGptqColumns;    // of a group under descent
constexpr int kHeld = kColumns / kLanes;  // of a lane
constexpr int kChunk = 4;                 // of them, updated together or not at all
// The last chunk reaches past the last column; four neighbouring rows start in different banks.
constexpr int kHessianPitch = kColumns + kLanes * (kChunk - 1);
constexpr int kRowPitch = kColumns + 1;  // so that rows start in different banks
constexpr int kHessianFloats = kColumns * kHessianPitch, kRowFloats = kRows * kRowPitch;
constexpr int kSharedBytes = 4 * (kHessianFloats + kRowFloats + kColumns + 4 * kRows);

static_assert(kLanes == kSumParts, "each lane has one part of a sum");
static_assert(kThreads >= kColumns, "each thread adds up one column of H");

// A sum over the lanes of a row, in the order of common/descent.inl.
__device__ __forceinline__ float row_sum(float part, int thread) {
    for (int step = 1; step < kLanes; step *= 2) part += shuffle(part, (thread % 32) ^ step);
    return part;
}

// --- search ---

class Search {
  public:
    __device__ __forceinline__ explicit Search(const SearchArgs& args)
        : args_(args),
          rule_(args),
          thread_(static_cast<int>(threadIdx.x)),
          lane_(thread_ % kLanes),
          columns_(static_cast<int>(args.columns)),
          row_(static_cast<int64_t>(blockIdx.x) * kRows + thread_ / kLanes),
          // Lanes past the last row do its work again, and store nothing.
          weight_(args.weight + (row_ < args.n ? row_ : args.n - 1) * args.weight_stride) {}

    __device__ __forceinline__ void run() {
        find_range();
        Grid best = tried(coarse_share(0));
        for (int i = 1; i < kCoarseShares; ++i) keep_better(tried(coarse_share(i)), &best);
        for (int i = 0; i < kFineSteps; ++i) keep_better(tried(fine_share(i, best.share)), &best);
        if (lane_ != 0 || row_ >= args_.n) return;
        args_.scale[row_] = best.scale;
        args_.zero[row_] = static_cast<uint8_t>(best.zero);
    }

  private:
    struct Grid {
        float share, scale, zero, lost;
    };

    __device__ __forceinline__ void find_range() {
        for (int j = lane_; j < columns_; j += kLanes) {
            const float w = weight_[j];
            low_ = w < low_ ? w : low_;
            high_ = w > high_ ? w : high_;
        }
        for (int step = 1; step < kLanes; step *= 2) {
            const float low = shuffle(low_, (thread_ % 32) ^ step),
                        high = shuffle(high_, (thread_ % 32) ^ step);
            low_ = low < low_ ? low : low_;
            high_ = high > high_ ? high : high_;
        }
    }

    __device__ __forceinline__ Grid tried(float share) {
        Grid grid{share, 1.0f, 0.0f, 0.0f};
        rule_.find(low_ * share, high_ * share, &grid.scale, &grid.zero);
        float lost = 0.0f;
        for (int j = lane_; j < columns_; j += kLanes)
            lost += grid_error(weight_[j], args_.importance[j], grid.scale, grid.zero, rule_.max_code);
        grid.lost = row_sum(lost, thread_);
        return grid;
    }

    static __device__ __forceinline__ void keep_better(const Grid& other, Grid* best) {
        if (other.lost < best->lost) *best = other;
    }

    const SearchArgs& args_;
    const GridRule rule_;
    const int thread_, lane_, columns_;
    const int64_t row_;
    const float* const weight_;
    float low_ = 0.0f, high_ = 0.0f;
};

__global__ void __launch_bounds__(kThreads) search_kernel(const __grid_constant__ SearchArgs args) {
    Search(args).run();
}

// --- descent ---

class Descent {
  public:
    __device__ __forceinline__ Descent(const DescendArgs& args, unsigned char* shared)
        : args_(args),
          rule_(args),
          hessian_(reinterpret_cast<float*>(shared)),
          rows_(hessian_ + kHessianFloats),
          sums_(rows_ + kRowFloats),
          grids_(sums_ + kColumns),
          thread_(static_cast<int>(threadIdx.x)),
          row_(thread_ / kLanes),
          lane_(thread_ % kLanes),
          columns_(static_cast<int>(args.columns)),
          first_row_(static_cast<int64_t>(blockIdx.x) * kRows) {}

    __device__ __forceinline__ void run() {
        load();
        move_scale();
        if (!args_.symmetric) {
            move_zero(1.0f);
            move_zero(-1.0f);
        }
        move_codes();
        store();
    }

  private:
    __device__ __forceinline__ bool has_row(int row) const { return first_row_ + row < args_.n; }
    __device__ __forceinline__ int column(int held) const { return kLanes * held + lane_; }

    // H and what the rows are to begin with. Through shared memory, so that reading is coalesced: gradients first, then
    // the codes, which stay there.
    __device__ __forceinline__ void load() {
        const int padded = (columns_ + kLanes * kChunk - 1) / (kLanes * kChunk) * (kLanes * kChunk);
        for (int i = thread_; i < padded * kHessianPitch; i += kThreads) {
            const int j = i / kHessianPitch, c = i % kHessianPitch;
            const bool inside = j < columns_ && c < columns_;
            hessian_[i] = inside ? args_.hessian[j * args_.hessian_stride + c] : 0.0f;
        }
        for (int i = thread_; i < kRows * kColumns; i += kThreads) {
            const int r = i / kColumns, c = i % kColumns;
            const bool inside = has_row(r) && c < columns_;
            rows_[r * kRowPitch + c] =
                inside ? args_.gradient[(first_row_ + r) * args_.gradient_stride + c] : 0.0f;
        }
        const int64_t row = has_row(row_) ? first_row_ + row_ : args_.n - 1;
        scale_ = args_.scale[row];
        zero_ = static_cast<float>(args_.zero[row]);
        if (lane_ == 0) {
            grids_[row_] = scale_;
            grids_[kRows + row_] = zero_;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kHeld; ++i) gradient_[i] = rows_[row_ * kRowPitch + column(i)];
        if (thread_ < columns_) {
            float sum = 0.0f;
            for (int j = 0; j < columns_; ++j) sum += hessian_[j * kHessianPitch + thread_];
            sums_[thread_] = sum;
        }
        __syncthreads();
        for (int i = thread_; i < kRows * kColumns; i += kThreads) {
            const int r = i / kColumns, c = i % kColumns;
            const bool inside = has_row(r) && c < columns_;
            rows_[r * kRowPitch + c] =
                inside ? static_cast<float>(args_.codes[(first_row_ + r) * columns_ + c]) - grids_[kRows + r]
                       : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kHeld; ++i) centred_[i] = rows_[row_ * kRowPitch + column(i)];
    }

    __device__ __forceinline__ void move_scale() {
        float along[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) along[i] = 0.0f;
        for (int j = 0; j < columns_; ++j) {
            const float v = rows_[row_ * kRowPitch + j];
            // H is symmetric: its rows are read, as on the CPU.
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                if (kLanes * (i / kChunk * kChunk) < columns_)
                    along[i] += v * hessian_[column(i) * kHessianPitch + j];
            }
        }
        float slope = 0.0f, curvature = 0.0f;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            slope += gradient_[i] * centred_[i];
            curvature += along[i] * centred_[i];
        }
        slope = row_sum(slope, thread_);
        curvature = row_sum(curvature, thread_);
        const float scale = moved_scale(scale_, slope, curvature, args_.scale_dtype, &gained_);
        const float step = scale - scale_;
        scale_ = scale;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) gradient_[i] += step * along[i];
    }

    __device__ __forceinline__ void move_zero(float step) {
        float slope = 0.0f, total = 0.0f;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) slope += gradient_[i];
        slope = row_sum(slope, thread_);
        for (int j = 0; j < columns_; ++j) total += sums_[j];
        const float zero = moved_zero(zero_, step, scale_, slope, total, rule_.max_code, &gained_);
        const float taken = zero - zero_, shift = -scale_ * taken;
        zero_ = zero;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (column(i) < columns_) {
                gradient_[i] += shift * sums_[column(i)];
                centred_[i] -= taken;
            }
        }
    }

    // One column after another. Every lane moves its registers down after four, so that the column at hand is always in
    // the first of them; all lanes of a row compute its move, so that nobody waits for another shuffle.
    __device__ __forceinline__ void move_codes() {
        __syncwarp();  // the row's lanes have read its codes, which give way to new ones here
        for (int four = 0; four * kLanes < columns_; ++four) {
#pragma unroll
            for (int owner = 0; owner < kLanes; ++owner) {
                if (four * kLanes + owner < columns_) move_code(four, owner);
            }
#pragma unroll
            for (int i = 0; i + 1 < kHeld; ++i) {
                gradient_[i] = gradient_[i + 1];
                centred_[i] = centred_[i + 1];
            }
        }
    }

    __device__ __forceinline__ void move_code(int four, int owner) {
        const int j = four * kLanes + owner, from = thread_ % 32 / kLanes * kLanes + owner;
        const float* row = hessian_ + j * kHessianPitch;
        const float centred = shuffle(centred_[0], from), gradient = shuffle(gradient_[0], from);
        float moved;
        const float after =
            moved_code(centred, gradient, row[j], scale_, zero_, rule_.max_code, &moved, &gained_);
        if (lane_ == owner) rows_[row_ * kRowPitch + j] = after;
        // Columns up to j of these four are updated too; nobody reads them again.
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (four + i / kChunk * kChunk < kHeld) gradient_[i] += moved * row[kLanes * (four + i) + lane_];
        }
    }

    __device__ __forceinline__ void store() {
        if (lane_ == 0) {
            grids_[2 * kRows + row_] = scale_;
            grids_[3 * kRows + row_] = zero_;
            if (has_row(row_)) {
                args_.scale[first_row_ + row_] = scale_;
                args_.zero[first_row_ + row_] = static_cast<uint8_t>(zero_);
                args_.gained[first_row_ + row_] = gained_;
            }
        }
        __syncthreads();
        for (int i = thread_; i < kRows * columns_; i += kThreads) {
            const int r = i / columns_, c = i % columns_;
            if (!has_row(r)) break;
            const int64_t at = (first_row_ + r) * columns_ + c;
            const float after = rows_[r * kRowPitch + c];
            const float before = grids_[r] * (static_cast<float>(args_.codes[at]) - grids_[kRows + r]);
            args_.moved[at] = grids_[2 * kRows + r] * after - before;
            args_.codes[at] = static_cast<uint8_t>(static_cast<int>(after + grids_[3 * kRows + r]));
        }
    }

    const DescendArgs& args_;
    const GridRule rule_;
    float* const hessian_;  // [columns, kHessianPitch], rows up to the next multiple of a chunk zero
    float* const rows_;     // [kRows, kRowPitch]
    float* const sums_;     // [kColumns], of the columns of H
    float* const grids_;    // [4, kRows]: scale and zero before, and after
    const int thread_, row_, lane_, columns_;
    const int64_t first_row_;
    float scale_ = 1.0f, zero_ = 0.0f, gained_ = 0.0f;
    float gradient_[kHeld], centred_[kHeld];
};

__global__ void __launch_bounds__(kThreads) descend_kernel(const __grid_constant__ DescendArgs args) {
    MMQ_DYNAMIC_SHARED(shared);
    Descent(args, shared).run();
}

dim3 blocks_of(int64_t n) {
    return dim3(static_cast<unsigned>(ceil_div(n, kRows)));
}

}  // namespace

void search_grid(const SearchArgs& args, Target target) {
    if (args.n == 0 || args.columns == 0) return;
    MMQ_TRACK(args.weight, 4 * ((args.n - 1) * args.weight_stride + args.columns), kInput);
    MMQ_TRACK(args.importance, 4 * args.columns, kInput);
    MMQ_TRACK(args.scale, 4 * args.n, kOutput);
    MMQ_TRACK(args.zero, args.n, kOutput);
    launch("search_grid", &search_kernel, blocks_of(args.n), kThreads, 0, target, args);
}

void descend(const DescendArgs& args, Target target) {
    if (args.n == 0 || args.columns == 0) return;
    MMQ_TRACK(args.gradient, 4 * ((args.n - 1) * args.gradient_stride + args.columns), kInput);
    MMQ_TRACK(args.hessian, 4 * ((args.columns - 1) * args.hessian_stride + args.columns), kInput);
    MMQ_TRACK(args.codes, args.n * args.columns, kCounters);
    MMQ_TRACK(args.scale, 4 * args.n, kCounters);
    MMQ_TRACK(args.zero, args.n, kCounters);
    MMQ_TRACK(args.moved, 4 * args.n * args.columns, kOutput);
    MMQ_TRACK(args.gained, 4 * args.n, kOutput);
    launch("descend", &descend_kernel, blocks_of(args.n), kThreads, kSharedBytes, target, args);
}

}  // namespace mmq::cuda
