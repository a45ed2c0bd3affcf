#pragma once

namespace fastkd {

// How many CUDA devices the driver shows, or minus the CUDA error: -35 where the driver is missing or too old.
int cuda_device_count();

}  // namespace fastkd
