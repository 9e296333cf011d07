// Every function of ptx.cuh alone, so that a GPU and the emulation can be compared instruction by instruction.
//
// One warp; lane l reads in[l, 0..8) and writes out[l, 0..4). What the eight words mean stands beside each instruction.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "ptx.cuh"
#include "runtime.cuh"

namespace mmq::cuda {
namespace {

enum class Instruction {
    kHalfToFloat,
    kBFloatToFloat,
    kFloatToHalf,
    kFloatToBFloat,
    kAndOr,
    kFunnelRight,
    kPickBytes,
    kFmaHalf,
    kFmaBFloat,
    kCopy16,
    kCopy16Once,
    kCopy8,
    kCopiesInFlight,
    kLoadMatrices,
    kMultiplyAddHalf,
    kMultiplyAddBFloat,
    kShuffle,
    kAddToCounter,
    kStore16,
    kLoad16,
};

const std::vector<std::string> kNames = {
    "half_to_float",   "bfloat_to_float", "float_to_half",    "float_to_bfloat", "and_or",
    "funnel_right",    "pick_bytes",      "fma_half",         "fma_bfloat",      "copy_16",
    "copy_16_once",    "copy_8",          "copies_in_flight", "load_matrices",   "multiply_half",
    "multiply_bfloat", "shuffle",         "add_to_counter",   "store_16",        "load_16",
};

struct ProbeCall {
    Instruction instruction;
    const uint32_t* in;
    uint32_t* out;
};

template <class T>
__device__ void probe_multiply(const uint32_t* in, uint32_t* out) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
    float c[4] = {bitcast<float>(in[6]), bitcast<float>(in[7]), bitcast<float>(in[6]), bitcast<float>(in[7])};
    multiply_add<T>(c, a, b);
    for (int i = 0; i < 4; ++i) out[i] = bitcast<uint32_t>(c[i]);
}

__device__ void read_back(const unsigned char* mine, int words, uint32_t* out) {
    for (int i = 0; i < words; ++i) out[i] = reinterpret_cast<const uint32_t*>(mine)[i];
}

__global__ void __launch_bounds__(32) probe_kernel(const __grid_constant__ ProbeCall call) {
    MMQ_DYNAMIC_SHARED(shared);
    const int lane = static_cast<int>(threadIdx.x);
    const uint32_t* in = call.in + lane * 8;
    uint32_t* out = call.out + lane * 4;
    unsigned char* mine = shared + lane * 32;
    switch (call.instruction) {
        case Instruction::kHalfToFloat:  // a half
            out[0] = bitcast<uint32_t>(to_float<Half>(static_cast<uint16_t>(in[0])));
            break;
        case Instruction::kBFloatToFloat:
            out[0] = bitcast<uint32_t>(to_float<BFloat>(static_cast<uint16_t>(in[0])));
            break;
        case Instruction::kFloatToHalf:  // a float
            out[0] = from_float<Half>(bitcast<float>(in[0]));
            break;
        case Instruction::kFloatToBFloat:
            out[0] = from_float<BFloat>(bitcast<float>(in[0]));
            break;
        case Instruction::kAndOr:  // a, mask, c
            out[0] = and_or(in[0], in[1], in[2]);
            break;
        case Instruction::kFunnelRight:  // low, high, shift
            out[0] = funnel_right(in[0], in[1], in[2] % 32);
            break;
        case Instruction::kPickBytes:  // low, high, selector
            out[0] = pick_bytes(in[0], in[1], in[2] & 0x7777);
            break;
        case Instruction::kFmaHalf:  // a, b, c, two halves each
            out[0] = fma2<Half>(in[0], in[1], in[2]);
            break;
        case Instruction::kFmaBFloat:
            out[0] = fma2<BFloat>(in[0], in[1], in[2]);
            break;
        case Instruction::kCopy16:  // four words; the fourth odd: zeros instead
            copy_16(mine, in, in[3] % 2 == 0);
            commit_copies();
            wait_copies<0>();
            read_back(mine, 4, out);
            break;
        case Instruction::kCopy16Once:
            copy_16_once(mine, in);
            commit_copies();
            wait_copies<0>();
            read_back(mine, 4, out);
            break;
        case Instruction::kCopy8:  // two words
            copy_8(mine, in);
            commit_copies();
            wait_copies<0>();
            read_back(mine, 2, out);
            break;
        case Instruction::kCopiesInFlight:  // two groups of 8 bytes: the older one has landed, then the other
            copy_8(mine, in);
            commit_copies();
            copy_8(mine + 8, in + 2);
            commit_copies();
            wait_copies<1>();
            read_back(mine, 2, out);
            wait_copies<0>();
            read_back(mine + 8, 2, out + 2);
            break;
        case Instruction::kLoadMatrices: {  // lane 8i + r: row r of matrix i
            for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(mine)[i] = in[i];
            __syncthreads();
            uint32_t r[4];
            load_matrices(r, mine);
            for (int i = 0; i < 4; ++i) out[i] = r[i];
            break;
        }
        case Instruction::kMultiplyAddHalf:  // fragments a (4), b (2), and c (2, for both rows)
            probe_multiply<Half>(in, out);
            break;
        case Instruction::kMultiplyAddBFloat:
            probe_multiply<BFloat>(in, out);
            break;
        case Instruction::kShuffle:  // a float, a lane
            out[0] = bitcast<uint32_t>(shuffle(bitcast<float>(in[0]), static_cast<int>(in[1] % 32)));
            break;
        case Instruction::kStore16:  // four words
            store_16(out, in[0], in[1], in[2], in[3]);
            break;
        case Instruction::kLoad16: {
            uint32_t r[4];
            load_16(in, r);
            for (int i = 0; i < 4; ++i) out[i] = r[i];
            break;
        }
        case Instruction::kAddToCounter:  // what each lane adds to out[0, 0]; out[l, 1]: the value before
            call.out[lane * 4 + 1] = add_to_counter(call.out, in[0]);
            break;
    }
}

}  // namespace

std::vector<std::string> probe_names() {
    return kNames;
}

void probe(const std::string& instruction, const uint32_t* in, uint32_t* out, Target target) {
    const auto found = std::find(kNames.begin(), kNames.end(), instruction);
    if (found == kNames.end())
        throw std::invalid_argument("instruction must be one of probe_names(), got " + instruction);
    MMQ_TRACK(in, 32 * 8 * 4, kInput);
    MMQ_TRACK(out, 32 * 4 * 4, kCounters);
    launch("probe", &probe_kernel, dim3(1), 32, 32 * 32, target,
           ProbeCall{static_cast<Instruction>(found - kNames.begin()), in, out});
}

}  // namespace mmq::cuda
