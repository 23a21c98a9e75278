// Which CUDA runtime is linked in: what the driver must be able to serve.
#include <cuda_runtime_api.h>

#include <cstdint>

namespace d2v {

// As 13000 for CUDA 13.0.
int64_t cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace d2v
