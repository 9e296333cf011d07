#include "gemm_launch.cuh"

namespace mmq::cuda {

template void launch_gemm<Half, 5>(const GemmCall&, Target);
template void launch_gemm<BFloat, 5>(const GemmCall&, Target);

}  // namespace mmq::cuda
