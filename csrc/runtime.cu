// Whether CUDA works here at all: the versions and the number of devices, for `fastsae doctor`.
#include "common.cuh"
#include "launch.h"

namespace fastsae {

int runtime_version() {
  int version = 0;
  FASTSAE_CHECK(cudaRuntimeGetVersion(&version));
  return version;
}

int driver_version() {
  int version = 0;
  FASTSAE_CHECK(cudaDriverGetVersion(&version));
  // CUDA reports a missing driver as version 0 and success.
  if (version == 0) throw std::runtime_error("no NVIDIA driver is installed");
  return version;
}

int device_count() {
  driver_version();
  int count = 0;
  FASTSAE_CHECK(cudaGetDeviceCount(&count));
  return count;
}

}  // namespace fastsae
