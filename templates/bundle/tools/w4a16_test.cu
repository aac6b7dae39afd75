// Rendered from templates/bundle/tools/w4a16_test.cu; do not edit.

// Runs tactics on random data, checks them against float64 arithmetic on the stored scales and zeros, and times them.
//
// Exit code: 0 all passed; 1 something failed; 2 bad arguments; 3 no usable GPU.
//
// With --json FILE the results are also written as
//
//   {"library": {"version", "release", "bundle_digest"},
//    "device": name, "driver": "13.0", "sm_count": int, "passed": bool,
//    "rows": [{"tactic", "quant_op", "group" (0: per column), "m", "n", "k", "bias": bool,
//              "check": "product" | "identity",
//              "rel_err": Frobenius norm of the error over that of the result, "limit": what rel_err may be,
//              "max_err": largest absolute error, "ok": bool, "workspace": bytes,
//              "us": median time of a launch or null, "tflops": or null, "gbps": or null}]}
//
// Limits of rel_err: 4.5e-4 for the GEMM, about twice what rounding the result to half costs; the GEMV also adds up in
// half, which costs up to 2e-3 without zeros and 5e-3 with them.  The identity check wants exact equality.

#include "w4a16.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int exit_failed = 1;
constexpr int exit_usage = 2;
constexpr int exit_no_device = 3;

const char *const quant_op_names[] = {"per_column", "group_scale", "group_scale_zero"};

// ---- Errors ----

void check(cudaError_t error, const char *what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
    }
}

void check(w4a16_status status, const char *what) {
    if (status != W4A16_OK) {
        throw std::runtime_error(std::string(what) + ": " + w4a16_status_name(status) + ": " + w4a16_last_error());
    }
}

// ---- Options ----

struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Options {
    std::int64_t m = 0;
    std::int64_t n = 0;
    std::int64_t k = 0;
    std::int64_t group = 128;
    int quant_op = W4A16_GROUP_SCALE;
    std::string tactic = "all";
    std::string json;
    bool bias = false;
    bool list = false;
    bool time = false;
    bool identity = false;
    bool sweep = false;
    bool help = false;
};

const char usage_text[] =
    "usage: w4a16_test M N K [--group G] [--quant-op per_column|group_scale|group_scale_zero] [--bias]\n"
    "                  [--tactic NAME|all|auto] [--time] [--identity] [--json FILE]\n"
    "       w4a16_test --sweep [--tactic NAME|all|auto] [--json FILE]\n"
    "       w4a16_test --list\n"
    "\n"
    "  --group G      rows of W that share a scale (default 128)\n"
    "  --quant-op     default group_scale\n"
    "  --tactic       default all\n"
    "  --time         median time of a launch in a CUDA graph, weights from memory and not from the L2\n"
    "  --identity     A = identity (M is ignored) must give the FP16 weights exactly\n"
    "  --sweep        a grid of quant ops, groups and shapes, correctness and time\n"
    "  --list         the tactics of this library; needs no GPU\n";

std::int64_t parse_number(const char *text, const char *name) {
    char *end = nullptr;
    const long long value = std::strtoll(text, &end, 10);
    if (end == text || *end != '\0') {
        throw UsageError(std::string(name) + " is \"" + text + "\", expected a whole number");
    }
    return value;
}

Options parse(int argc, char **argv) {
    Options options;
    std::vector<std::int64_t> shape;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        const auto value = [&]() -> const char * {
            if (i + 1 >= argc) {
                throw UsageError(argument + " wants a value");
            }
            return argv[++i];
        };
        if (argument == "--group") {
            options.group = parse_number(value(), "--group");
        } else if (argument == "--quant-op") {
            const std::string name = value();
            const auto end = std::end(quant_op_names);
            const auto found = std::find(std::begin(quant_op_names), end, name);
            if (found == end) {
                throw UsageError("--quant-op is \"" + name + "\", expected per_column, group_scale or group_scale_zero");
            }
            options.quant_op = static_cast<int>(found - std::begin(quant_op_names));
        } else if (argument == "--tactic") {
            options.tactic = value();
        } else if (argument == "--json") {
            options.json = value();
        } else if (argument == "--bias") {
            options.bias = true;
        } else if (argument == "--list") {
            options.list = true;
        } else if (argument == "--time") {
            options.time = true;
        } else if (argument == "--identity") {
            options.identity = true;
        } else if (argument == "--sweep") {
            options.sweep = true;
        } else if (argument == "--help" || argument == "-h") {
            options.help = true;
        } else if (argument.compare(0, 1, "-") == 0) {
            throw UsageError("unknown option " + argument);
        } else {
            shape.push_back(parse_number(argument.c_str(), "a size"));
        }
    }
    const bool needs_shape = !options.list && !options.sweep && !options.help;
    if (shape.size() != (needs_shape ? 3u : 0u)) {
        throw UsageError(needs_shape ? "expected M N K" : "expected no sizes");
    }
    if (needs_shape) {
        options.m = shape[0];
        options.n = shape[1];
        options.k = shape[2];
    }
    if (needs_shape && options.m < 1) {
        throw UsageError("M is " + std::to_string(options.m) + ", expected 1 or more");
    }
    if (options.quant_op == W4A16_PER_COLUMN) {
        options.group = 0;
    }
    return options;
}

// ---- Device memory ----

class Buffer {
public:
    explicit Buffer(std::size_t bytes) : bytes_(bytes) {
        if (bytes > 0) {
            check(cudaMalloc(&data_, bytes), "cudaMalloc");
        }
    }
    Buffer(Buffer &&other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    Buffer &operator=(Buffer &&) = delete;
    ~Buffer() { cudaFree(data_); }

    template <typename T = void>
    T *as() const {
        return static_cast<T *>(data_);
    }
    char *bytes_at(std::size_t offset) const { return static_cast<char *>(data_) + offset; }
    std::size_t size() const { return bytes_; }

    template <typename T>
    static Buffer of(const std::vector<T> &values) {
        Buffer buffer(values.size() * sizeof(T));
        check(cudaMemcpy(buffer.data_, values.data(), buffer.bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
        return buffer;
    }

private:
    void *data_ = nullptr;
    std::size_t bytes_ = 0;
};

// ---- Kernels of the check ----

__device__ half stored_weight(const std::uint8_t *q, const half *scales, const half *zeros, std::int64_t row,
    std::int64_t column, std::int64_t n, std::int64_t group) {
    const std::uint8_t pair = q[row * (n / 2) + column / 2];
    const int nibble = column % 2 == 0 ? pair & 15 : pair >> 4;
    const std::int64_t at = row / group * n + column;
    const half zero = zeros == nullptr ? half(0.0f) : zeros[at];
    return __hfma(half(static_cast<float>(nibble - 8)), scales[at], zero);
}

constexpr int reference_rows = 8;

// One column and `reference_rows` rows a thread.
__global__ void reference_kernel(const half *a, const std::uint8_t *q, const half *scales, const half *zeros,
    const half *bias, double *out, std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * reference_rows;
    if (column >= n) {
        return;
    }
    double sums[reference_rows] = {};
    for (std::int64_t i = 0; i < k; ++i) {
        const double weight = __half2float(stored_weight(q, scales, zeros, i, column, n, group));
#pragma unroll
        for (int row = 0; row < reference_rows; ++row) {
            if (first + row < m) {
                sums[row] += static_cast<double>(__half2float(a[(first + row) * k + i])) * weight;
            }
        }
    }
    for (int row = 0; row < reference_rows && first + row < m; ++row) {
        out[(first + row) * n + column] = sums[row] + (bias == nullptr ? 0.0 : __half2float(bias[column]));
    }
}

struct Sums {
    double error;     // squared
    double reference; // squared
    unsigned long long largest_bits; // of the largest absolute error, a non-negative double
    unsigned long long broken;       // results that are no numbers
};

__global__ void compare_kernel(const half *given, const double *wanted, std::int64_t count, Sums *sums) {
    double error = 0.0;
    double reference = 0.0;
    double largest = 0.0;
    unsigned long long broken = 0;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const double value = __half2float(given[i]);
        if (!isfinite(value)) {
            ++broken;
            continue;
        }
        const double difference = value - wanted[i];
        error += difference * difference;
        reference += wanted[i] * wanted[i];
        largest = fmax(largest, fabs(difference));
    }
    atomicAdd(&sums->error, error);
    atomicAdd(&sums->reference, reference);
    atomicMax(&sums->largest_bits, static_cast<unsigned long long>(__double_as_longlong(largest)));
    atomicAdd(&sums->broken, broken);
}

// Row i of A picks row first + i of W.
__global__ void identity_kernel(half *a, std::int64_t m, std::int64_t k, std::int64_t first) {
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < m * k) {
        a[at] = half(at % k == first + at / k ? 1.0f : 0.0f);
    }
}

__global__ void identity_compare_kernel(const half *given, const std::uint8_t *q, const half *scales, const half *zeros,
    std::int64_t m, std::int64_t n, std::int64_t group, std::int64_t first, unsigned long long *different) {
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= m * n) {
        return;
    }
    const half wanted = stored_weight(q, scales, zeros, first + at / n, at % n, n, group);
    // As numbers: a sum with zeros has no negative zero.
    if (!__heq(given[at], wanted)) {
        atomicAdd(different, 1ull);
    }
}

unsigned blocks_for(std::int64_t count, std::int64_t block) {
    return static_cast<unsigned>((count + block - 1) / block);
}

// ---- Problems ----

class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    std::uint64_t bits() { // xorshift64*
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545f4914f6cdd1du;
    }
    float uniform() { return static_cast<float>(bits() >> 40) * 0x1p-24f; }
    // Near enough to normal: a sum of four.
    float normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0f) * 1.7320508f; }

private:
    std::uint64_t state_;
};

struct Weights {
    int quant_op;
    std::int64_t n;
    std::int64_t k;
    std::int64_t group; // K for per column
    Buffer q;           // plain
    Buffer packed;
    Buffer scales;
    Buffer zeros;
    Buffer bias;

    std::size_t bytes() const { return packed.size() + scales.size() + zeros.size(); }
};

Weights make_weights(int quant_op, std::int64_t n, std::int64_t k, std::int64_t group_size) {
    const std::int64_t group = quant_op == W4A16_PER_COLUMN ? k : group_size;
    Random random(static_cast<std::uint64_t>(n * 131 + k * 17 + group + quant_op));
    std::size_t bytes = 0;
    check(w4a16_packed_size(nullptr, k, n, &bytes), "w4a16_packed_size");
    std::vector<std::uint8_t> q(bytes);
    for (std::size_t i = 0; i + 8 <= bytes; i += 8) {
        const std::uint64_t word = random.bits();
        std::memcpy(q.data() + i, &word, 8);
    }
    std::vector<std::uint8_t> packed(bytes);
    check(w4a16_pack(nullptr, q.data(), k, n, packed.data(), 0), "w4a16_pack");

    const std::size_t groups = static_cast<std::size_t>(k / group * n);
    const bool has_zeros = quant_op == W4A16_GROUP_SCALE_ZERO;
    std::vector<half> scales(groups);
    std::vector<half> zeros(has_zeros ? groups : 0);
    for (std::size_t i = 0; i < groups; ++i) {
        // Results of about unit size, whatever K is.
        scales[i] = half((0.5f + random.uniform()) * 0.22f / std::sqrt(static_cast<float>(k)));
        if (has_zeros) {
            const int zero_point = static_cast<int>(random.bits() >> 60);
            zeros[i] = half(static_cast<float>(8 - zero_point) * __half2float(scales[i]));
        }
    }
    std::vector<half> bias(static_cast<std::size_t>(n));
    for (half &value : bias) {
        value = half(random.normal());
    }
    return Weights{quant_op, n, k, group, Buffer::of(q), Buffer::of(packed), Buffer::of(scales), Buffer::of(zeros),
        Buffer::of(bias)};
}

Buffer make_activations(std::int64_t m, std::int64_t k) {
    Random random(static_cast<std::uint64_t>(m * 7 + k));
    std::vector<half> a(static_cast<std::size_t>(m * k));
    for (half &value : a) {
        value = half(random.normal());
    }
    return Buffer::of(a);
}

w4a16_problem make_problem(int quant_op, std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t group, bool bias) {
    w4a16_problem problem{};
    problem.struct_size = sizeof problem;
    problem.quant_op = quant_op;
    problem.m = m;
    problem.n = n;
    problem.k = k;
    problem.group_size = quant_op == W4A16_PER_COLUMN ? 0 : group;
    problem.has_bias = bias ? 1 : 0;
    return problem;
}

w4a16_problem make_problem(const Weights &weights, std::int64_t m, bool bias) {
    return make_problem(weights.quant_op, m, weights.n, weights.k, weights.group, bias);
}

// ---- Results ----

struct Row {
    std::string tactic;
    int quant_op;
    std::int64_t group; // 0: per column
    std::int64_t m;
    std::int64_t n;
    std::int64_t k;
    bool bias;
    bool identity;
    double rel_err;
    double limit;
    double max_err;
    bool ok;
    std::size_t workspace;
    double us; // 0: not timed

    double tflops() const { return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / us * 1e-6; }
    double gbps() const {
        const double groups = group == 0 ? 1.0 : static_cast<double>(k / group);
        const double columns = static_cast<double>(n);
        const double tables = quant_op == W4A16_GROUP_SCALE_ZERO ? 2.0 : 1.0;
        const double bytes = static_cast<double>(k) * columns / 2 + 2.0 * columns * (groups * tables + (bias ? 1.0 : 0.0))
            + 2.0 * static_cast<double>(m) * static_cast<double>(k + n);
        return bytes / us * 1e-3;
    }
};

void print_row(const Row &row) {
    std::printf("%-26s %-16s group %-5lld M %-5lld N %-6lld K %-6lld %-7s", row.tactic.c_str(),
        quant_op_names[row.quant_op], static_cast<long long>(row.group), static_cast<long long>(row.m),
        static_cast<long long>(row.n), static_cast<long long>(row.k), row.bias ? "bias" : "");
    if (row.identity) {
        std::printf(" %-24s", row.ok ? "identity exact" : "identity NOT EXACT");
    } else {
        std::printf(" error %.2e max %.1e", row.rel_err, row.max_err);
    }
    if (row.us > 0) {
        std::printf("  %9.2f us %7.1f TFLOP/s %7.0f GB/s", row.us, row.tflops(), row.gbps());
    }
    std::printf("  %s\n", row.ok ? "ok" : "FAILED");
}

std::string json_string(const char *text) {
    std::string quoted = "\"";
    for (; *text != '\0'; ++text) {
        if (*text == '"' || *text == '\\') {
            quoted += '\\';
        }
        quoted += static_cast<unsigned char>(*text) < 0x20 ? ' ' : *text;
    }
    return quoted + "\"";
}

// JSON has neither infinity nor NaN.
std::string json_number(double value) {
    char text[40] = "null";
    if (std::isfinite(value)) {
        std::snprintf(text, sizeof text, "%.6g", value);
    }
    return text;
}

void write_json(const std::string &path, const w4a16_device &device, const std::vector<Row> &rows, bool passed) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "w"), std::fclose);
    if (file == nullptr) {
        throw std::runtime_error("cannot write " + path);
    }
    w4a16_build build{};
    build.struct_size = sizeof build;
    check(w4a16_build_info(&build), "w4a16_build_info");
    std::fprintf(file.get(), "{\"library\": {\"version\": %s, \"release\": %s, \"bundle_digest\": %s},\n",
        json_string(build.version).c_str(), json_string(build.release).c_str(), json_string(build.bundle_digest).c_str());
    std::fprintf(file.get(), " \"device\": %s, \"driver\": \"%d.%d\", \"sm_count\": %d, \"passed\": %s,\n \"rows\": [",
        json_string(device.name).c_str(), device.driver_version / 1000, device.driver_version % 1000 / 10, device.sm_count,
        passed ? "true" : "false");
    const char *separator = "\n";
    for (const Row &row : rows) {
        std::fprintf(file.get(),
            "%s  {\"tactic\": %s, \"quant_op\": \"%s\", \"group\": %lld, \"m\": %lld, \"n\": %lld, \"k\": %lld, "
            "\"bias\": %s, \"check\": \"%s\", \"rel_err\": %s, \"limit\": %s, \"max_err\": %s, \"ok\": %s, "
            "\"workspace\": %zu, \"us\": %s, \"tflops\": %s, \"gbps\": %s}",
            separator, json_string(row.tactic.c_str()).c_str(), quant_op_names[row.quant_op],
            static_cast<long long>(row.group), static_cast<long long>(row.m), static_cast<long long>(row.n),
            static_cast<long long>(row.k), row.bias ? "true" : "false", row.identity ? "identity" : "product",
            json_number(row.rel_err).c_str(), json_number(row.limit).c_str(), json_number(row.max_err).c_str(),
            row.ok ? "true" : "false", row.workspace, row.us > 0 ? json_number(row.us).c_str() : "null",
            row.us > 0 ? json_number(row.tflops()).c_str() : "null", row.us > 0 ? json_number(row.gbps()).c_str() : "null");
        separator = ",\n";
    }
    std::fprintf(file.get(), "\n ]}\n");
    if (std::fflush(file.get()) != 0 || std::ferror(file.get()) != 0) {
        throw std::runtime_error("cannot write " + path);
    }
}

// ---- Running ----

// A buffer whose every byte is 0xff (as halves: NaN), with a tail that nobody may write.
class Poisoned {
public:
    explicit Poisoned(std::size_t bytes) : buffer_(bytes + guard), bytes_(bytes) {
        check(cudaMemset(buffer_.as(), 0xff, buffer_.size()), "cudaMemset");
    }
    template <typename T = void>
    T *as() const {
        return buffer_.as<T>();
    }
    std::size_t size() const { return bytes_; }
    bool tail_untouched() const {
        std::vector<unsigned char> tail(guard);
        check(cudaMemcpy(tail.data(), buffer_.bytes_at(bytes_), guard, cudaMemcpyDeviceToHost), "cudaMemcpy");
        return std::all_of(tail.begin(), tail.end(), [](unsigned char byte) { return byte == 0xff; });
    }

private:
    static constexpr std::size_t guard = 4096;
    Buffer buffer_;
    std::size_t bytes_;
};

w4a16_args make_args(const w4a16_problem &problem, const Weights &weights, const void *a, void *c,
    const Poisoned &workspace) {
    w4a16_args args{};
    args.struct_size = sizeof args;
    args.problem = &problem;
    args.a = a;
    args.b = weights.packed.as();
    args.scales = weights.scales.as();
    args.zeros = weights.zeros.as();
    args.bias = problem.has_bias != 0 ? weights.bias.as() : nullptr;
    args.c = c;
    args.workspace = workspace.as();
    args.workspace_bytes = workspace.size();
    return args;
}

double limit_of(const std::string &tactic, int quant_op) {
    if (tactic != "gemv") {
        return 4.5e-4;
    }
    return quant_op == W4A16_GROUP_SCALE_ZERO ? 5e-3 : 2e-3;
}

Row blank_row(const std::string &tactic, const w4a16_problem &problem) {
    Row row{};
    row.tactic = tactic;
    row.quant_op = problem.quant_op;
    row.group = problem.group_size;
    row.m = problem.m;
    row.n = problem.n;
    row.k = problem.k;
    row.bias = problem.has_bias != 0;
    return row;
}

Buffer make_reference(const w4a16_problem &problem, const Weights &weights, const Buffer &a) {
    Buffer reference(static_cast<std::size_t>(problem.m * problem.n) * sizeof(double));
    const dim3 grid(blocks_for(problem.n, 128), blocks_for(problem.m, reference_rows));
    reference_kernel<<<grid, 128>>>(a.as<half>(), weights.q.as<std::uint8_t>(), weights.scales.as<half>(),
        weights.zeros.as<half>(), problem.has_bias != 0 ? weights.bias.as<half>() : nullptr, reference.as<double>(),
        problem.m, problem.n, problem.k, weights.group);
    check(cudaGetLastError(), "reference");
    return reference;
}

Row check_product(int index, const std::string &tactic, const w4a16_problem &problem, const Weights &weights,
    const Buffer &a, const Buffer &reference) {
    Row row = blank_row(tactic, problem);
    check(w4a16_workspace_size(index, &problem, &row.workspace), "w4a16_workspace_size");
    const std::int64_t count = problem.m * problem.n;
    const Poisoned c(static_cast<std::size_t>(count) * sizeof(half));
    const Poisoned workspace(row.workspace);
    const w4a16_args args = make_args(problem, weights, a.as(), c.as(), workspace);
    check(w4a16_run(index, &args, nullptr), tactic.c_str());

    Buffer device_sums(sizeof(Sums));
    check(cudaMemset(device_sums.as(), 0, sizeof(Sums)), "cudaMemset");
    compare_kernel<<<std::min(blocks_for(count, 256), 512u), 256>>>(c.as<half>(), reference.as<double>(), count,
        device_sums.as<Sums>());
    Sums sums{};
    check(cudaMemcpy(&sums, device_sums.as(), sizeof sums, cudaMemcpyDeviceToHost), tactic.c_str());

    row.limit = limit_of(tactic, problem.quant_op);
    row.rel_err = sums.broken > 0 ? INFINITY : std::sqrt(sums.error / std::max(sums.reference, 1e-300));
    std::memcpy(&row.max_err, &sums.largest_bits, sizeof row.max_err);
    const bool inside = c.tail_untouched() && workspace.tail_untouched();
    if (!inside) {
        std::printf("%s wrote beyond its output or workspace\n", tactic.c_str());
    }
    row.ok = inside && row.rel_err <= row.limit;
    return row;
}

Row check_identity(int index, const std::string &tactic, const Weights &weights, std::int64_t m_max) {
    const std::int64_t rows_at_once = std::min<std::int64_t>({m_max, weights.k, 4096});
    Row row = blank_row(tactic, make_problem(weights, weights.k, false));
    row.identity = true;
    unsigned long long different = 0;
    Buffer count(sizeof different);
    check(cudaMemset(count.as(), 0, sizeof different), "cudaMemset");
    Buffer a(static_cast<std::size_t>(rows_at_once * weights.k) * sizeof(half));
    for (std::int64_t first = 0; first < weights.k; first += rows_at_once) {
        const std::int64_t m = std::min(rows_at_once, weights.k - first);
        const w4a16_problem problem = make_problem(weights, m, false);
        std::size_t bytes = 0;
        check(w4a16_workspace_size(index, &problem, &bytes), "w4a16_workspace_size");
        row.workspace = std::max(row.workspace, bytes);
        const Poisoned c(static_cast<std::size_t>(m * weights.n) * sizeof(half));
        const Poisoned workspace(bytes);
        identity_kernel<<<blocks_for(m * weights.k, 256), 256>>>(a.as<half>(), m, weights.k, first);
        const w4a16_args args = make_args(problem, weights, a.as(), c.as(), workspace);
        check(w4a16_run(index, &args, nullptr), tactic.c_str());
        identity_compare_kernel<<<blocks_for(m * weights.n, 256), 256>>>(c.as<half>(), weights.q.as<std::uint8_t>(),
            weights.scales.as<half>(), weights.zeros.as<half>(), m, weights.n, weights.group, first,
            count.as<unsigned long long>());
        check(cudaDeviceSynchronize(), tactic.c_str());
    }
    check(cudaMemcpy(&different, count.as(), sizeof different, cudaMemcpyDeviceToHost), "cudaMemcpy");
    row.rel_err = static_cast<double>(different) / (static_cast<double>(weights.k) * static_cast<double>(weights.n));
    row.ok = different == 0;
    return row;
}

// ---- Timing ----

// Copies of a weight that together exceed the L2 twice, so that each launch reads its own from memory.
class Rotation {
public:
    explicit Rotation(const Weights &weights) {
        int device = 0;
        int l2_bytes = 0;
        check(cudaGetDevice(&device), "cudaGetDevice");
        check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device), "cudaDeviceGetAttribute");
        const std::size_t copies = 2 * static_cast<std::size_t>(l2_bytes) / weights.bytes() + 2;
        for (std::size_t i = 0; i < copies; ++i) {
            packed_.push_back(copy(weights.packed));
            scales_.push_back(copy(weights.scales));
            zeros_.push_back(copy(weights.zeros));
        }
    }
    std::size_t copies() const { return packed_.size(); }
    void select(w4a16_args &args, std::size_t index) const {
        args.b = packed_[index].as();
        args.scales = scales_[index].as();
        args.zeros = zeros_[index].as();
    }

private:
    static Buffer copy(const Buffer &source) {
        Buffer target(source.size());
        if (source.size() > 0) {
            check(cudaMemcpy(target.as(), source.as(), source.size(), cudaMemcpyDeviceToDevice), "cudaMemcpy");
        }
        return target;
    }
    std::vector<Buffer> packed_;
    std::vector<Buffer> scales_;
    std::vector<Buffer> zeros_;
};

struct StreamOwner {
    cudaStream_t stream = nullptr;
    StreamOwner() { check(cudaStreamCreate(&stream), "cudaStreamCreate"); }
    StreamOwner(const StreamOwner &) = delete;
    StreamOwner &operator=(const StreamOwner &) = delete;
    ~StreamOwner() { cudaStreamDestroy(stream); }
};

struct EventOwner {
    cudaEvent_t event = nullptr;
    EventOwner() { check(cudaEventCreate(&event), "cudaEventCreate"); }
    EventOwner(const EventOwner &) = delete;
    EventOwner &operator=(const EventOwner &) = delete;
    ~EventOwner() { cudaEventDestroy(event); }
};

// Median microseconds of a launch, from replays of a graph of several.
double time_launch(int index, const w4a16_problem &problem, const Weights &weights, const Rotation &rotation,
    const Buffer &a) {
    constexpr std::size_t least_launches = 16;
    constexpr int warm_up = 3;
    constexpr int replays = 11;
    std::size_t bytes = 0;
    check(w4a16_workspace_size(index, &problem, &bytes), "w4a16_workspace_size");
    const Poisoned workspace(bytes);
    const Poisoned c(static_cast<std::size_t>(problem.m * problem.n) * sizeof(half));
    w4a16_args args = make_args(problem, weights, a.as(), c.as(), workspace);

    const StreamOwner owner;
    // The first launch of a kernel loads it, which a capture need not allow.
    check(w4a16_run(index, &args, owner.stream), "w4a16_run");
    check(cudaStreamSynchronize(owner.stream), "w4a16_run");
    const std::size_t launches = std::max(rotation.copies(), least_launches);
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(owner.stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (std::size_t i = 0; i < launches; ++i) {
        rotation.select(args, i % rotation.copies());
        check(w4a16_run(index, &args, owner.stream), "w4a16_run in a capture");
    }
    check(cudaStreamEndCapture(owner.stream, &graph), "capture");
    const std::unique_ptr<CUgraph_st, cudaError_t (*)(cudaGraph_t)> graph_owner(graph, cudaGraphDestroy);
    cudaGraphExec_t executable = nullptr;
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    const std::unique_ptr<CUgraphExec_st, cudaError_t (*)(cudaGraphExec_t)> executable_owner(executable, cudaGraphExecDestroy);

    const EventOwner begin;
    const EventOwner end;
    std::vector<float> times;
    for (int replay = 0; replay < warm_up + replays; ++replay) {
        check(cudaEventRecord(begin.event, owner.stream), "cudaEventRecord");
        check(cudaGraphLaunch(executable, owner.stream), "cudaGraphLaunch");
        check(cudaEventRecord(end.event, owner.stream), "cudaEventRecord");
        check(cudaEventSynchronize(end.event), "replay");
        float milliseconds = 0.0f;
        check(cudaEventElapsedTime(&milliseconds, begin.event, end.event), "cudaEventElapsedTime");
        if (replay >= warm_up) {
            times.push_back(milliseconds);
        }
    }
    std::nth_element(times.begin(), times.begin() + replays / 2, times.end());
    return static_cast<double>(times[replays / 2]) * 1e3 / static_cast<double>(launches);
}

// ---- What to run ----

w4a16_tactic_info describe(int index) {
    w4a16_tactic_info info{};
    info.struct_size = sizeof info;
    check(w4a16_tactic(index, &info), "w4a16_tactic");
    return info;
}

// The tactics that `name` stands for on this problem.
std::vector<int> tactics_for(const std::string &name, const w4a16_problem &problem) {
    std::vector<int> indices;
    if (name == "all") {
        for (int index = 0; index < w4a16_tactic_count(); ++index) {
            indices.push_back(index);
        }
        return indices;
    }
    std::int32_t index = 0;
    check(w4a16_find_tactic(name.c_str(), &index), "--tactic");
    if (index == W4A16_AUTO) {
        check(w4a16_auto_tactic(&problem, &index), "w4a16_auto_tactic");
    }
    indices.push_back(index);
    return indices;
}

bool report(std::vector<Row> &rows, const Row &row) {
    print_row(row);
    std::fflush(stdout);
    rows.push_back(row);
    return row.ok;
}

bool run_one(const Options &options, std::vector<Row> &rows) {
    const Weights weights = make_weights(options.quant_op, options.n, options.k, options.group);
    const w4a16_problem problem = make_problem(weights, options.m, options.bias);
    const bool only = options.tactic != "all";
    bool passed = true;
    bool any = false;
    const Buffer a = make_activations(options.m, options.k);
    const Buffer reference = options.identity ? Buffer(0) : make_reference(problem, weights, a);
    const std::unique_ptr<Rotation> rotation(options.time ? new Rotation(weights) : nullptr);
    for (const int index : tactics_for(options.tactic, problem)) {
        const w4a16_tactic_info info = describe(index);
        const w4a16_problem wanted
            = options.identity ? make_problem(weights, std::min(info.m_max, weights.k), false) : problem;
        if (w4a16_supports(index, &wanted) != W4A16_OK) {
            std::printf("%-26s %s: %s\n", info.name, only ? "FAILED" : "skipped", w4a16_last_error());
            passed = passed && !only;
            continue;
        }
        any = true;
        if (options.identity) {
            passed = report(rows, check_identity(index, info.name, weights, info.m_max)) && passed;
            continue;
        }
        Row row = check_product(index, info.name, problem, weights, a, reference);
        if (rotation != nullptr) {
            row.us = time_launch(index, problem, weights, *rotation, a);
        }
        passed = report(rows, row) && passed;
    }
    if (!any) {
        std::printf("no tactic takes this problem\n");
    }
    return passed && any;
}

bool run_sweep(const Options &options, std::vector<Row> &rows) {
    // 2056 and 4352 are 8 * 257 and 256 * 17: partial tiles everywhere.
    constexpr struct {
        std::int64_t n;
        std::int64_t k;
        bool bias;
        bool time;
    } shapes[] = {{4096, 4096, false, true}, {2056, 4352, true, false}, {14336, 4096, true, true}, {4096, 14336, false, true}};
    constexpr struct {
        int quant_op;
        std::int64_t group;
    } quantizations[] = {{W4A16_PER_COLUMN, 0}, {W4A16_GROUP_SCALE, 64}, {W4A16_GROUP_SCALE, 128}, {W4A16_GROUP_SCALE, 256},
        {W4A16_GROUP_SCALE_ZERO, 64}, {W4A16_GROUP_SCALE_ZERO, 128}, {W4A16_GROUP_SCALE_ZERO, 256}};
    constexpr struct {
        std::int64_t m;
        bool time;
    } batches[] = {{1, true}, {2, true}, {3, false}, {7, true}, {15, false}, {16, true}, {17, false}, {64, true},
        {100, false}, {300, true}, {1024, true}};
    bool passed = true;
    for (const auto &shape : shapes) {
        std::vector<Buffer> activations;
        for (const auto &batch : batches) {
            activations.push_back(make_activations(batch.m, shape.k));
        }
        for (const auto &quantization : quantizations) {
            const Weights weights = make_weights(quantization.quant_op, shape.n, shape.k, quantization.group);
            const std::unique_ptr<Rotation> rotation(shape.time ? new Rotation(weights) : nullptr);
            for (std::size_t i = 0; i < activations.size(); ++i) {
                const auto &batch = batches[i];
                const Buffer &a = activations[i];
                const w4a16_problem problem = make_problem(weights, batch.m, shape.bias);
                const Buffer reference = make_reference(problem, weights, a);
                for (const int index : tactics_for(options.tactic, problem)) {
                    if (w4a16_supports(index, &problem) != W4A16_OK) {
                        continue;
                    }
                    const w4a16_tactic_info info = describe(index);
                    Row row = check_product(index, info.name, problem, weights, a, reference);
                    if (rotation != nullptr && batch.time) {
                        row.us = time_launch(index, problem, weights, *rotation, a);
                    }
                    passed = report(rows, row) && passed;
                }
            }
        }
    }
    return passed && !rows.empty();
}

void print_list() {
    for (int index = 0; index < w4a16_tactic_count(); ++index) {
        std::printf("%s\n", describe(index).name);
    }
}

// What is wrong with the arguments is said even where no GPU is.
void check_options(const Options &options) {
    std::int32_t index = 0;
    if (options.tactic != "all" && w4a16_find_tactic(options.tactic.c_str(), &index) != W4A16_OK) {
        throw UsageError(w4a16_last_error());
    }
    if (options.sweep) {
        return;
    }
    const w4a16_problem problem
        = make_problem(options.quant_op, options.m, options.n, options.k, options.group, options.bias);
    if (w4a16_supports(W4A16_AUTO, &problem) == W4A16_ERROR_INVALID_ARGUMENT) {
        throw UsageError(w4a16_last_error());
    }
}

int run(const Options &options) {
    if (options.help) {
        std::fputs(usage_text, stdout);
        return 0;
    }
    if (options.list) {
        print_list();
        return 0;
    }
    check_options(options);
    w4a16_device device{};
    device.struct_size = sizeof device;
    if (w4a16_check_device(-1, &device) != W4A16_OK) {
        std::fprintf(stderr, "w4a16_test: %s\n", w4a16_last_error());
        return exit_no_device;
    }
    w4a16_build build{};
    build.struct_size = sizeof build;
    check(w4a16_build_info(&build), "w4a16_build_info");
    std::printf("w4a16 %s from TensorRT-LLM %s, built for %s\n", build.version, build.release, build.architecture);
    std::printf("%s, sm_%d%d, %d SMs, driver for CUDA %d.%d\n", device.name, device.cc_major, device.cc_minor,
        device.sm_count, device.driver_version / 1000, device.driver_version % 1000 / 10);
    std::vector<Row> rows;
    const bool passed = options.sweep ? run_sweep(options, rows) : run_one(options, rows);
    const auto good = std::count_if(rows.begin(), rows.end(), [](const Row &row) { return row.ok; });
    std::printf("%zu of %zu passed\n", static_cast<std::size_t>(good), rows.size());
    if (!options.json.empty()) {
        write_json(options.json, device, rows, passed);
    }
    return passed ? 0 : exit_failed;
}

} // namespace

int main(int argc, char **argv) {
    try {
        return run(parse(argc, argv));
    } catch (const UsageError &error) {
        std::fprintf(stderr, "w4a16_test: %s\n\n%s", error.what(), usage_text);
        return exit_usage;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "w4a16_test: %s\n", error.what());
        return exit_failed;
    }
}
