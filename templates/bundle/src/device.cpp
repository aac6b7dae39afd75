// Rendered from templates/bundle/src/device.cpp; do not edit.

// Asks the CUDA runtime about devices, once each.

#include "device.h"

#include "config.h"
#include "driver.h"
#include "status.h"

#include <atomic>
#include <cstdio>

#include <cuda_runtime_api.h>

namespace w4a16 {
namespace {

constexpr int cached_devices = 64;

// SM counts of the devices that were found right; 0: not asked yet, or not right.  Asking twice does no harm.
std::atomic<int> sm_counts[cached_devices];

// The first driver branch for a CUDA major version, as NVIDIA's compatibility table has it.
int first_driver(int cuda_version) {
    switch (cuda_version / 1000) {
    case 12:
        return 525;
    case 13:
        return 580;
    default:
        return 0;
    }
}

w4a16_status device_error(cudaError_t error) {
    // Leave no error behind for the next call to stumble over.
    (void)cudaGetLastError();
    int driver = 0;
    const bool known = cudaDriverGetVersion(&driver) == cudaSuccess;
    if (known && driver == 0) {
        return fail(W4A16_ERROR_NO_DEVICE,
            "no NVIDIA driver is loaded (libcuda.so.1 was not found or has no GPU to drive)");
    }
    if (error == cudaErrorInsufficientDriver) {
        char branch[64] = "";
        if (first_driver(CUDART_VERSION) != 0) {
            std::snprintf(branch, sizeof branch, " (%d or newer)", first_driver(CUDART_VERSION));
        }
        return fail(W4A16_ERROR_OLD_DRIVER,
            "the NVIDIA driver supports CUDA %d.%d; this library needs a driver for CUDA %d.%d%s", driver / 1000,
            driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10, branch);
    }
    if (error == cudaErrorNoDevice) {
        return fail(W4A16_ERROR_NO_DEVICE, "no CUDA device is visible (is CUDA_VISIBLE_DEVICES empty?)");
    }
    if (error == cudaErrorInvalidDevice) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "there is no such CUDA device");
    }
    return fail(W4A16_ERROR_CUDA, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
}

bool runs_here(int major, int minor) {
    if (major != config::cc_major) {
        return false;
    }
    return config::exact_architecture ? minor == config::cc_minor : minor >= config::cc_minor;
}

w4a16_status query(int device, w4a16_device &found) {
    found.device = device;
    struct {
        cudaDeviceAttr attribute;
        int32_t *value;
    } const wanted[] = {
        {cudaDevAttrComputeCapabilityMajor, &found.cc_major},
        {cudaDevAttrComputeCapabilityMinor, &found.cc_minor},
        {cudaDevAttrMultiProcessorCount, &found.sm_count},
    };
    for (const auto &item : wanted) {
        int value = 0;
        if (const cudaError_t error = cudaDeviceGetAttribute(&value, item.attribute, device); error != cudaSuccess) {
            return device_error(error);
        }
        *item.value = value;
    }
    if (!runs_here(found.cc_major, found.cc_minor)) {
        return fail(W4A16_ERROR_WRONG_DEVICE, "built for %s, this device (%d) is sm_%d%d", config::architecture, device,
            found.cc_major, found.cc_minor);
    }
    return W4A16_OK;
}

} // namespace

w4a16_status check_current_device(int &sm_count) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
        return device_error(error);
    }
    const bool cached = device < cached_devices;
    if (cached) {
        sm_count = sm_counts[device].load(std::memory_order_relaxed);
        if (sm_count > 0) {
            return W4A16_OK;
        }
    }
    w4a16_device found{};
    if (const w4a16_status status = query(device, found); status != W4A16_OK) {
        return status;
    }
    sm_count = found.sm_count;
    if (cached) {
        sm_counts[device].store(sm_count, std::memory_order_relaxed);
    }
    return W4A16_OK;
}

w4a16_status ensure_context() {
    static const auto current_context = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent", 4000);
    CUcontext context = nullptr;
    if (current_context != nullptr && current_context(&context) == CUDA_SUCCESS && context != nullptr) {
        return W4A16_OK;
    }
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaSetDevice(device);
    }
    return error == cudaSuccess ? W4A16_OK : device_error(error);
}

int sm_count_or_default() {
    int sm_count = 0;
    return check_current_device(sm_count) == W4A16_OK ? sm_count : 132;
}

} // namespace w4a16

w4a16_status w4a16_check_device(int32_t device, w4a16_device *info) {
    using namespace w4a16;
    if (info != nullptr) {
        if (const w4a16_status status = check_output(info, "info"); status != W4A16_OK) {
            return status;
        }
    }
    if (device < -1) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "device is %d, expected -1 (the current one) or more",
            static_cast<int>(device));
    }
    w4a16_device found{};
    found.device = device;
    int driver = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess) {
        found.driver_version = driver;
    }
    w4a16_status status = W4A16_OK;
    int current = device;
    if (device == -1) {
        if (const cudaError_t error = cudaGetDevice(&current); error != cudaSuccess) {
            status = device_error(error);
        }
    }
    if (status == W4A16_OK) {
        status = query(current, found);
        cudaDeviceProp properties;
        if (info != nullptr && found.cc_major != 0 && cudaGetDeviceProperties(&properties, current) == cudaSuccess) {
            std::snprintf(found.name, sizeof found.name, "%s", properties.name);
        }
    }
    if (info != nullptr) {
        fill_output(info, found);
    }
    return status;
}
