// The Python face of launch.h: names and docstrings, no logic, no CUDA header.
#include <pybind11/pybind11.h>

#include "launch.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA runtime as fastsae doctor sees it: versions and devices.";
  m.def("runtime_version", &fastsae::runtime_version,
        "Version of the CUDA runtime linked in, 1000 * major + 10 * minor. Needs no driver.");
  m.def("driver_version", &fastsae::driver_version,
        "Newest CUDA version the driver supports, written the same way. RuntimeError if there is no driver.");
  m.def("device_count", &fastsae::device_count,
        "Number of usable GPUs. RuntimeError if there is no driver, no device, or the driver is too old.");
}
