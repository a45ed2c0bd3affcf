#include <cuda_runtime_api.h>

#include "device.h"

namespace fastkd {

int cuda_device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    return error == cudaSuccess ? count : -static_cast<int>(error);
}

}  // namespace fastkd
