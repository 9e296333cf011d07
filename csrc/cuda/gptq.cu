// One block of up to 128 columns of GPTQ, for one or many layers of the same shape, in one launch.
//
//   column j of every row:  q_j = nearest code of w_j;  e_j = (w_j - scale * (q_j - zero)) / U[j, j]
//                           w_i -= e_j * U[j, i] for i > j
//   (Frantar et al., arXiv 2210.17323, algorithm 1; U: upper Cholesky factor of the inverse Hessian)
//
//   weight fp32 [n, columns], U fp32 [columns, columns] -> codes uint8, errors fp32 [n, columns], grids [n, groups]
//
// The columns are a chain, the rows are independent. Four lanes share a row; lane l keeps the columns 4i + l in
// registers, U lies in shared memory, where the lanes of a row read 16 neighbouring bytes and all rows the same ones:
//
//   lane 0 | w0 w4 w8  ...        after four columns every lane moves its registers down by one, so that the column at
//   lane 1 | w1 w5 w9  ...        hand is always in the first, the loop stays rolled, and no register is indexed at run
//   lane 2 | w2 w6 w10 ...        time
//   lane 3 | w3 w7 w11 ...
//
// Every step is one fp32 operation rounded once, in the order of backends/reference.py: the codes are the same bits.
#include "../common/half.h"
#include "../common/layout.h"
#include "kernels.h"
#include "ptx.cuh"
#include "runtime.cuh"

namespace mmq::cuda {
namespace {

#include "../common/grid.inl"

constexpr int kThreads = 128;
constexpr int kLanes = 4;                                     // of a row
constexpr int kRows = kThreads / kLanes;                      // of a block
constexpr int kHeld = kGptqColumns / kLanes;                  // columns of a lane
constexpr int kChunk = 4;                                     // of them, updated together or not at all
constexpr int kFactorPitch = kGptqColumns + kLanes * kChunk;  // the last chunk reaches past the last column
constexpr int kRowPitch = kGptqColumns + 1;                   // so that rows start in different banks
constexpr int kFactorFloats = kGptqColumns * kFactorPitch, kRowFloats = kRows * kRowPitch;
constexpr int kSharedBytes = 4 * (kFactorFloats + kRowFloats) + kRows * kGptqColumns;

class Rows {
  public:
    __device__ __forceinline__ Rows(const GptqBatch& batch, unsigned char* shared)
        : args_(batch.layer),
          rule_(batch.layer),
          layer_(blockIdx.y),
          weight_(batch.layer.weight + layer_ * batch.weight_step),
          hinv_(batch.layer.hinv + layer_ * batch.hinv_step),
          factor_(reinterpret_cast<float*>(shared)),
          rows_(factor_ + kFactorFloats),
          codes_(shared + 4 * (kFactorFloats + kRowFloats)),
          thread_(static_cast<int>(threadIdx.x)),
          row_(thread_ / kLanes),
          lane_(thread_ % kLanes),
          columns_(static_cast<int>(batch.layer.columns)),
          group_columns_(
              static_cast<int>(batch.layer.group_size < columns_ ? batch.layer.group_size : columns_)),
          groups_((columns_ + group_columns_ - 1) / group_columns_),
          first_row_(static_cast<int64_t>(blockIdx.x) * kRows) {}

    __device__ __forceinline__ void run() {
        load();
        for (int four = 0; four * kLanes < columns_; ++four) {
            if (four * kLanes % group_columns_ == 0) enter_group(four * kLanes);
#pragma unroll
            for (int owner = 0; owner < kLanes; ++owner) {
                if (four * kLanes + owner < columns_) quantize_column(four, owner);
            }
#pragma unroll
            for (int i = 0; i + 1 < kHeld; ++i) w_[i] = w_[i + 1];
        }
        store();
    }

  private:
    __device__ __forceinline__ bool has_row(int row) const { return first_row_ + row < args_.n; }

    // U and the rows of W -> shared memory, coalesced; then the rows -> registers.
    __device__ __forceinline__ void load() {
        for (int i = thread_; i < columns_ * kFactorPitch; i += kThreads) {
            const int j = i / kFactorPitch, c = i % kFactorPitch;
            factor_[i] = c < columns_ ? hinv_[j * args_.hinv_stride + c] : 0.0f;
        }
        for (int i = thread_; i < kRows * kGptqColumns; i += kThreads) {
            const int r = i / kGptqColumns, c = i % kGptqColumns;
            const bool inside = has_row(r) && c < columns_;
            rows_[r * kRowPitch + c] = inside ? weight_[(first_row_ + r) * args_.weight_stride + c] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kHeld; ++i) w_[i] = rows_[row_ * kRowPitch + kLanes * i + lane_];
        // Errors will come to the same place, each from the lane that read there: no second barrier.
    }

    // The grid of the group that begins at column `begin`, from its columns as they stand now, or the one given.
    __device__ __forceinline__ void enter_group(int begin) {
        const int64_t row = has_row(row_) ? first_row_ + row_ : args_.n - 1;
        const int64_t at = (layer_ * args_.n + row) * groups_ + begin / group_columns_;
        if (!args_.search) {
            scale_ = args_.scale[at];
            zero_ = static_cast<float>(args_.zero[at]);
            return;
        }
        const int left = columns_ - begin, length = group_columns_ < left ? group_columns_ : left;
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (kLanes * i + lane_ < length) {
                const float w = w_[i];
                low = fminf(w, low);
                high = fmaxf(w, high);
            }
        }
        for (int step = 1; step < kLanes; step *= 2) {
            const float other_low = shuffle(low, (thread_ % 32) ^ step),
                        other_high = shuffle(high, (thread_ % 32) ^ step);
            low = other_low < low ? other_low : low;
            high = other_high > high ? other_high : high;
        }
        float scale, zero;
        rule_.find(low, high, &scale, &zero);
        scale_ = scale;
        zero_ = zero;
        if (lane_ == 0 && has_row(row_)) {
            args_.scale[at] = scale_;
            args_.zero[at] = static_cast<uint8_t>(zero_);
        }
    }

    // Column 4 * four + owner. All lanes of a row compute its error, so that nobody waits for another shuffle.
    __device__ __forceinline__ void quantize_column(int four, int owner) {
        const int j = four * kLanes + owner;
        const float* factor = factor_ + j * kFactorPitch;
        const float w = shuffle(w_[0], thread_ % 32 / kLanes * kLanes + owner);
        const float code = encode(w, scale_, zero_, rule_.max_code);
        const float error = (w - scale_ * (code - zero_)) / factor[j];
        if (lane_ == owner) {
            codes_[row_ * kGptqColumns + j] = static_cast<uint8_t>(static_cast<int>(code));
            rows_[row_ * kRowPitch + j] = error;
        }
        // Columns up to j of these four are updated too; nobody reads them again.
        // One flat loop: nested ones keep the compiler from holding w_ in registers.
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (four + i / kChunk * kChunk < kHeld) w_[i] -= error * factor[kLanes * (four + i) + lane_];
        }
    }

    __device__ __forceinline__ void store() {
        __syncthreads();
        for (int i = thread_; i < kRows * columns_; i += kThreads) {
            const int r = i / columns_, c = i % columns_;
            if (!has_row(r)) break;
            const int64_t at = (layer_ * args_.n + first_row_ + r) * columns_ + c;
            args_.error[at] = rows_[r * kRowPitch + c];
            args_.codes[at] = codes_[r * kGptqColumns + c];
        }
    }

    const GptqArgs& args_;
    const GridRule rule_;
    const int64_t layer_;
    const float* const weight_;
    const float* const hinv_;
    float* const factor_;
    float* const rows_;
    uint8_t* const codes_;
    const int thread_, row_, lane_, columns_, group_columns_, groups_;
    const int64_t first_row_;
    float scale_ = 1.0f, zero_ = 0.0f;
    float w_[kHeld];
};

__global__ void __launch_bounds__(kThreads) gptq_kernel(const __grid_constant__ GptqBatch batch) {
    MMQ_DYNAMIC_SHARED(shared);
    Rows(batch, shared).run();
}

}  // namespace

void gptq_block(const GptqBatch& batch, Target target) {
    const GptqArgs& args = batch.layer;
    if (args.n == 0 || args.columns == 0 || batch.layers == 0) return;
    [[maybe_unused]] const int64_t rows = batch.layers * args.n,
                                   groups = ceil_div(args.columns, args.group_size);
    [[maybe_unused]] const int64_t last = batch.layers - 1;
    MMQ_TRACK(args.weight, 4 * (last * batch.weight_step + (args.n - 1) * args.weight_stride + args.columns),
              kInput);
    MMQ_TRACK(args.hinv, 4 * (last * batch.hinv_step + (args.columns - 1) * args.hinv_stride + args.columns),
              kInput);
    MMQ_TRACK(args.codes, rows * args.columns, kOutput);
    MMQ_TRACK(args.error, rows * args.columns * 4, kOutput);
    if (args.search) {
        MMQ_TRACK(args.scale, rows * groups * 4, kOutput);
        MMQ_TRACK(args.zero, rows * groups, kOutput);
    } else {
        MMQ_TRACK(args.scale, rows * groups * 4, kInput);
        MMQ_TRACK(args.zero, rows * groups, kInput);
    }
    launch("gptq_block", &gptq_kernel,
           dim3(static_cast<unsigned>(ceil_div(args.n, kRows)), static_cast<unsigned>(batch.layers)),
           kThreads, kSharedBytes, target, batch);
}

}  // namespace mmq::cuda
