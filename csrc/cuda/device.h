#pragma once

namespace fastkd::cuda {

// How many CUDA devices the driver shows, or minus the CUDA error: -35 where the driver is missing or too old.
int device_count();

// What CUDA calls an error, and what it says of it.
const char* error_name(int error);
const char* error_text(int error);

}  // namespace fastkd::cuda
