// What every .cu file needs.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fastsae {

inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

}  // namespace fastsae

// Throws if a call of the CUDA runtime failed. After a launch: FASTSAE_CHECK(cudaGetLastError());
#define FASTSAE_CHECK(call) ::fastsae::check((call), #call)
