// The functions of the .cu files, as the bindings see them, without a CUDA header. Pointers are device
// addresses, sizes int64_t, a stream the integer of torch.cuda.Stream.cuda_stream. Python has checked every
// argument before the call; a CUDA error is thrown as std::runtime_error.
#pragma once

namespace fastsae {

// runtime.cu. Versions as CUDA writes them: 1000 * major + 10 * minor.
int runtime_version();
int driver_version();
int device_count();

}  // namespace fastsae
