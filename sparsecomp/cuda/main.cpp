// Runs the sparse layers of this package on an NVIDIA card: each kernel gets its packed weight and the recorded input,
// its output is compared with the recorded one, and its launches are timed.
//
//     main [FOLDER [RUNS]]
//
// FOLDER is the package (. if not given), RUNS the timed launches of each layer (50). The status is 0 if every output is
// right, 1 if one is wrong, 2 if something cannot be read or the driver refuses a call.
#include <cuda.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "layers.h"

namespace {
constexpr int WARM_UP = 3;

void check(CUresult code, const std::string& what) {
    if (code == CUDA_SUCCESS) return;
    const char* text = nullptr;
    cuGetErrorString(code, &text);
    throw std::runtime_error(what + " failed with code " + std::to_string(code) + ": " + (text ? text : "unknown"));
}

// Memory of the card.
class Buffer {
public:
    explicit Buffer(size_t bytes) {
        check(cuMemAlloc(&at_, std::max<size_t>(bytes, 1)), "taking " + std::to_string(bytes) + " bytes of the card");
    }
    Buffer(const void* from, size_t bytes) : Buffer(bytes) {
        if (bytes) check(cuMemcpyHtoD(at_, from, bytes), "copying to the card");
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cuMemFree(at_); }
    CUdeviceptr at() const { return at_; }

private:
    CUdeviceptr at_ = 0;
};

std::vector<char> read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw std::runtime_error("cannot open " + path);
    std::vector<char> content(file.tellg());
    file.seekg(0);
    if (!file.read(content.data(), content.size())) throw std::runtime_error("cannot read " + path);
    return content;
}

// CRC-32 as in zip and PNG.
std::uint32_t crc32(const std::vector<char>& content) {
    std::uint32_t table[256], crc = ~0u;
    for (std::uint32_t i = 0; i < 256; ++i) {
        table[i] = i;
        for (int bit = 0; bit < 8; ++bit) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320u : 0);
    }
    for (char byte : content) crc = crc >> 8 ^ table[(crc ^ byte) & 0xff];
    return ~crc;
}

// A file of the package, if it is the one that layers.h was written for: kernels follow the places in it unchecked.
std::vector<char> read(const std::string& folder, const File& file) {
    const std::string path = folder + "/" + file.name;
    std::vector<char> content = read_file(path);
    if (content.size() != file.bytes)
        throw std::runtime_error(path + " has " + std::to_string(content.size()) + " bytes, not " +
                                 std::to_string(file.bytes) + " as layers.h says; export the package again");
    if (crc32(content) != file.crc32)
        throw std::runtime_error(path + " is damaged, or not of this package (its CRC-32 is not that of layers.h)");
    return content;
}

size_t size_of(Type type) { return type == Type::float16 || type == Type::bfloat16 ? 2 : 4; }

// Of an output, of its size plus the root mean square of all. Sums are float32 in another order than the model's; a
// 16-bit result is rounded, by the model perhaps once more before the bias. Sums of int8 are exact.
double tolerance(Type type) {
    return type == Type::float32 ? 1e-4 : type == Type::float16 ? 2e-3 : type == Type::bfloat16 ? 1.6e-2 : 0;
}

template <class T>
T entry(const char* from, size_t i) {
    T value;
    std::memcpy(&value, from + i * sizeof(T), sizeof(T));
    return value;
}

double value_at(const char* from, size_t i, Type type) {
    if (type == Type::float32) return entry<float>(from, i);
    if (type == Type::int32) return entry<std::int32_t>(from, i);
    const std::uint32_t bits = entry<std::uint16_t>(from, i), fraction = bits & 1023;
    if (type == Type::bfloat16) {
        const std::uint32_t wide = bits << 16;
        return entry<float>(reinterpret_cast<const char*>(&wide), 0);
    }
    const int exponent = bits >> 10 & 31;
    const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                        : exponent     ? std::ldexp(1024.0 + fraction, exponent - 25)
                                       : std::ldexp(double(fraction), -24);
    return bits >> 15 ? -size : size;
}

// The largest error of an output, over what is allowed there; up to 1 is right.
double error_of(const Layer& layer, const std::vector<char>& y, const char* expected) {
    double squares = 0, worst = 0;
    const size_t count = size_t(layer.rows) * layer.columns;
    for (size_t i = 0; i < count; ++i) squares += std::pow(value_at(expected, i, layer.type), 2);
    const double usual = std::sqrt(squares / count), least = 1e-30;
    for (size_t row = 0; row < layer.rows; ++row)
        for (size_t column = 0; column < layer.columns; ++column) {
            const double wanted = value_at(expected, row * layer.columns + column, layer.type);
            const double got = value_at(y.data(), row * layer.stride + column, layer.type);
            const double allowed = tolerance(layer.type) * (std::fabs(wanted) + usual) + least;
            const double error = std::fabs(got - wanted) / allowed;
            if (std::isnan(error)) return INFINITY;
            worst = std::max(worst, error);
        }
    return worst;
}

// The newest architecture of the package whose code the card can run: the same major version, at most its minor one.
int choose_architecture(int capability) {
    int best = 0;
    std::string known;
    for (int arch : ARCHITECTURES) {
        known += " sm_" + std::to_string(arch);
        if (arch / 10 == capability / 10 && arch <= capability) best = std::max(best, arch);
    }
    if (!best)
        throw std::runtime_error("the card is of sm_" + std::to_string(capability) + ", and this package has code for" +
                                 known + "; export it with --arch sm_" + std::to_string(capability));
    return best;
}

// Microseconds of a launch: the median of `runs`, after some that are not counted.
double time(CUfunction function, const Layer& layer, void** arguments, int runs) {
    CUevent start, end;
    check(cuEventCreate(&start, CU_EVENT_DEFAULT), "making an event");
    check(cuEventCreate(&end, CU_EVENT_DEFAULT), "making an event");
    std::vector<float> times;
    for (int run = -WARM_UP; run < runs; ++run) {
        check(cuEventRecord(start, nullptr), "recording an event");
        check(cuLaunchKernel(function, layer.blocks[0], layer.blocks[1], layer.blocks[2], layer.threads[0],
                             layer.threads[1], layer.threads[2], layer.shared, nullptr, arguments, nullptr),
              std::string("launching ") + layer.kernel);
        check(cuEventRecord(end, nullptr), "recording an event");
        check(cuEventSynchronize(end), std::string("running ") + layer.kernel);
        float milliseconds = 0;
        check(cuEventElapsedTime(&milliseconds, start, end), "reading the time");
        if (run >= 0) times.push_back(milliseconds);
    }
    cuEventDestroy(start);
    cuEventDestroy(end);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return 1e3 * times[times.size() / 2];
}

struct Result {
    double error, microseconds;
};

Result run(const Layer& layer, const std::string& cubins, CUdeviceptr weights, const std::vector<char>& recorded,
           int runs) {
    CUmodule module;
    CUfunction function;
    const std::vector<char> cubin = read_file(cubins + "/" + layer.kernel + ".cubin");
    check(cuModuleLoadData(&module, cubin.data()), std::string("loading ") + layer.kernel + ".cubin");
    check(cuModuleGetFunction(&function, module, layer.function), std::string("finding ") + layer.function);
    if (layer.shared > 48 << 10)
        check(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, layer.shared),
              "asking for " + std::to_string(layer.shared) + " bytes of shared memory");

    const Buffer x(recorded.data() + layer.x, layer.x_bytes);
    std::vector<char> y(size_t(layer.rows) * layer.stride * size_of(layer.type), char(0xff));  // NaN, or -1
    const Buffer y_there(y.data(), y.size());
    std::vector<CUdeviceptr> pointers(layer.arguments.size());
    std::vector<int> numbers(layer.arguments.size());
    std::vector<void*> arguments;
    for (size_t i = 0; i < layer.arguments.size(); ++i) {
        const Argument& given = layer.arguments[i];
        numbers[i] = int(given.value);
        pointers[i] = given.kind == Argument::weights  ? weights + given.value
                      : given.kind == Argument::input  ? x.at()
                      : given.kind == Argument::output ? y_there.at()
                                                       : 0;
        arguments.push_back(given.kind == Argument::number ? static_cast<void*>(&numbers[i]) : &pointers[i]);
    }
    const double microseconds = time(function, layer, arguments.data(), runs);
    check(cuMemcpyDtoH(y.data(), y_there.at(), y.size()), "copying from the card");
    check(cuModuleUnload(module), std::string("unloading ") + layer.kernel);
    return {error_of(layer, y, recorded.data() + layer.y), microseconds};
}

int run_all(const std::string& folder, int runs) {
    const std::vector<char> packed = read(folder, WEIGHTS), recorded = read(folder, RECORDED);
    check(cuInit(0), "starting NVIDIA's driver");
    int cards = 0, major = 0, minor = 0;
    check(cuDeviceGetCount(&cards), "counting the cards");
    if (!cards) throw std::runtime_error("there is no NVIDIA card here");
    CUdevice device;
    CUcontext context;
    char name[256] = "";
    check(cuDeviceGet(&device, 0), "finding the card");
    check(cuDeviceGetName(name, sizeof name, device), "asking for the card's name");
    check(cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "asking what it can");
    check(cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "asking what it can");
    const int arch = choose_architecture(10 * major + minor);
    const std::string cubins = folder + "/cubins/sm_" + std::to_string(arch);
    std::printf("%s, compute capability %d.%d, code for sm_%d\n", name, major, minor, arch);
    check(cuDevicePrimaryCtxRetain(&context, device), "taking the card's context");
    check(cuCtxSetCurrent(context), "choosing the card");

    const Buffer weights(packed.data(), packed.size());
    double microseconds = 0;
    size_t wrong = 0;
    for (const Layer& layer : LAYERS) {
        const Result result = run(layer, cubins, weights.at(), recorded, runs);
        const bool right = result.error <= 1;
        microseconds += result.microseconds;
        wrong += !right;
        std::printf("%-40s %-24s %9.2f us   error %.2g of what is allowed: %s\n", layer.name, layer.kernel,
                    result.microseconds, result.error, right ? "ok" : "WRONG");
    }
    std::printf("%zu layers, %.2f us, %zu wrong\n", LAYERS.size(), microseconds, wrong);
    return wrong ? 1 : 0;
}
}  // namespace

int main(int count, char** given) {
    const std::string folder = count > 1 ? given[1] : ".";
    const int runs = count > 2 ? std::atoi(given[2]) : 50;
    if (count > 3 || runs < 1) {
        std::fprintf(stderr, "usage: %s [FOLDER [RUNS]], with at least one run\n", given[0]);
        return 2;
    }
    try {
        return run_all(folder, runs);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
}
