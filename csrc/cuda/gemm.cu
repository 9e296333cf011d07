// The product of any width: plan, then the kernel that the plan names.
#include "gemm_launch.cuh"
#include "kernels.h"
#include "weight.cuh"

namespace mmq::cuda {

#define MMQ_EXTERN(bits)                                                   \
    extern template void launch_gemm<Half, bits>(const GemmCall&, Target); \
    extern template void launch_gemm<BFloat, bits>(const GemmCall&, Target);
MMQ_EXTERN(2)
MMQ_EXTERN(3)
MMQ_EXTERN(4)
MMQ_EXTERN(5)
MMQ_EXTERN(6)
MMQ_EXTERN(7)
MMQ_EXTERN(8)
#undef MMQ_EXTERN

void gemm(const GemmArgs& args, Target target) {
    const int64_t m = args.m, n = args.weight.n, k = args.weight.k;
    if (m == 0 || n == 0) return;
    const GemmCall call{args, gemm_plan(args, device_limits(target.device))};
    track_weight(args.weight);
    MMQ_TRACK(args.x, m * k * 2, kInput);
    MMQ_TRACK(args.perm, k * 4, kInput);
    MMQ_TRACK(args.input_scale, k * 2, kInput);
    MMQ_TRACK(args.bias, n * 2, kInput);
    MMQ_TRACK(args.y, m * n * 2, kOutput);
    MMQ_TRACK(args.partials, call.plan.partial_floats * 4, kWorkspace);
    MMQ_TRACK(args.counters, call.plan.counters * 4, kCounters);
    with_bits(args.weight.bits, [&](auto bits) {
        if (args.dtype == Dtype::kFloat16) {
            launch_gemm<Half, bits>(call, target);
        } else {
            launch_gemm<BFloat, bits>(call, target);
        }
    });
}

}  // namespace mmq::cuda
