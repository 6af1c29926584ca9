// NVIDIA's driver on the CPU, as far as packages use it: memory is the host's, an event is the clock, and the image of a
// module is a text, "entry\npath", with the name of a kernel and the library that launch.cpp made of it.
#include <cuda.h>
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {
struct Module {
    std::string entry;
    void* library;
    unsigned shared = 48 << 10;  // bytes that a launch may have
};
std::map<char*, size_t> memory;

int number(const char* name, int otherwise) {
    const char* given = std::getenv(name);
    return given ? std::atoi(given) : otherwise;
}

double now() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class F>
F* find(void* library, const char* name) {
    return reinterpret_cast<F*>(dlsym(library, name));
}

bool inside(char* at, size_t bytes) {
    auto next = memory.upper_bound(at);
    if (next == memory.begin()) return false;
    --next;
    return at + bytes <= next->first + next->second;
}

Module* module_of(void* handle) { return static_cast<Module*>(handle); }
}  // namespace

extern "C" {
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult code, const char** text) {
    *text = code == CUDA_ERROR_LAUNCH_FAILED   ? "the kernel failed"
            : code == CUDA_ERROR_INVALID_VALUE ? "invalid value"
            : code == CUDA_ERROR_INVALID_IMAGE ? "invalid image"
            : code == CUDA_ERROR_NOT_FOUND     ? "not found"
                                               : "no description";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    *count = number("EMULATED_CARDS", 1);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int index) {
    *device = index;
    return index ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice) {
    std::snprintf(name, length, "the emulator");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    const int capability = number("EMULATED_CAPABILITY", 90);
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? capability / 10 : capability % 10;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    *context = reinterpret_cast<CUcontext>(&memory);
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }

CUresult cuMemAlloc(CUdeviceptr* at, size_t bytes) {
    char* made = static_cast<char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    std::memset(made, 0xff, bytes);  // NaN in every type, so that what nobody wrote shows
    memory[made] = bytes;
    *at = reinterpret_cast<CUdeviceptr>(made);
    return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr at) {
    char* made = reinterpret_cast<char*>(at);
    if (!memory.erase(made)) return CUDA_ERROR_INVALID_VALUE;
    std::free(made);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
    char* there = reinterpret_cast<char*>(to);
    if (!inside(there, bytes)) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(there, from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
    char* there = reinterpret_cast<char*>(from);
    if (!inside(there, bytes)) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(to, there, bytes);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    const std::string text(static_cast<const char*>(image));
    const size_t end = text.find('\n');
    void* library = end == std::string::npos ? nullptr : dlopen(text.c_str() + end + 1, RTLD_NOW | RTLD_LOCAL);
    if (!library) return CUDA_ERROR_INVALID_IMAGE;
    *module = reinterpret_cast<CUmodule>(new Module{text.substr(0, end), library});
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
    delete module_of(module);  // the library stays: the emulator's fibers have been in it
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = reinterpret_cast<CUfunction>(module);
    return module_of(module)->entry == name ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > 227 << 10) return CUDA_ERROR_INVALID_VALUE;
    module_of(function)->shared = value;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream, void** parameters, void**) {
    const Module& module = *module_of(function);
    if (shared > module.shared) return CUDA_ERROR_INVALID_VALUE;
    auto add = find<void(void*, size_t)>(module.library, "emu_memory");
    for (auto& [at, bytes] : memory) add(at, bytes);
    auto launch = find<int(int, int, int, int, int, int, size_t, void**, unsigned, const char*)>(module.library, "emu_launch");
    const int failed = launch(grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, parameters, 0, "");
    find<void()>(module.library, "emu_clear")();
    if (failed) std::fprintf(stderr, "%s\n", find<const char*()>(module.library, "emu_message")());
    return failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned) {
    *event = reinterpret_cast<CUevent>(new double(0));
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) {
    delete reinterpret_cast<double*>(event);
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream) {
    *reinterpret_cast<double*>(event) = now();
    return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }

CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    *milliseconds = static_cast<float>(*reinterpret_cast<double*>(end) - *reinterpret_cast<double*>(start));
    return CUDA_SUCCESS;
}
}
