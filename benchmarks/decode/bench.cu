// Checks decode kernels against float64 and times them, as a plan says.
//
// Usage: bench PLAN OUT.  A line of the plan is one case:
//     check|time N K GROUP ZEROS BIAS M CONFIGURATION SHARES DEPENDENCE
// with GROUP = K per column and DEPENDENCE as the enumeration of kernels/decode/problem.h.  Consecutive lines with the same
// mode and problem share its data; those with the same M besides are timed in turns.  OUT gets one JSON object a line.
// Exits with 1 if a result is wrong.

#include "config.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace w4a16::decode {

extern const Config *const configs[]; // generated, ends with null

namespace {

constexpr int launches = 40;                // in a graph
constexpr int rounds = 7;                   // timed replays of each graph
constexpr int warm_up = 2;                  // replays before those
constexpr std::size_t rotation = 400 << 20; // bytes of weights, several times the L2
constexpr int guard_bytes = 4096;           // behind the result
constexpr double flops = 790e12;            // rate of a dense 16-bit matmul on an H200, measured beforehand

void require(cudaError_t error, const char *call, int line) {
    if (error != cudaSuccess) {
        std::fprintf(stderr, "bench.cu:%d: %s: %s\n", line, call, cudaGetErrorString(error));
        std::exit(2);
    }
}
#define REQUIRE(call) require((call), #call, __LINE__)

// ---- data: random, and computable anywhere without being stored ----

__host__ __device__ std::uint32_t hash(std::uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

__device__ int nibble(int n, int k, int all_k) {
    const std::size_t at = static_cast<std::size_t>(n) * all_k + k;
    return hash(static_cast<std::uint32_t>(at) * 2654435761u + 12345u) & 15;
}

// Word w of 32 rows holds row 2w + 8j in nibble j and the next one in nibble j + 4: column_permuted of kernels/packing.
__global__ void pack(std::uint32_t *words, int all_n, int all_k) {
    const std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= static_cast<std::size_t>(all_n) * all_k / 8) {
        return;
    }
    const int n = i / (all_k / 8);
    const int first_k = i % (all_k / 8) / 4 * 32 + i % 4 * 2;
    std::uint32_t word = 0;
    for (int j = 0; j < 4; ++j) {
        word |= static_cast<std::uint32_t>(nibble(n, first_k + 8 * j, all_k)) << (4 * j);
        word |= static_cast<std::uint32_t>(nibble(n, first_k + 8 * j + 1, all_k)) << (4 * (j + 4));
    }
    words[i] = word;
}

__global__ void fill_normal(__half *x, std::size_t count, std::uint32_t seed) {
    const std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) {
        const float u = (hash(i * 2 + seed) + 1.f) / 4294967808.f;
        const float v = hash(i * 2 + 1 + seed) / 4294967296.f;
        x[i] = __float2half(sqrtf(-2 * logf(u)) * cospif(2 * v));
    }
}

__global__ void fill_uniform(__half *x, std::size_t count, std::uint32_t seed, float low, float high) {
    const std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) {
        x[i] = __float2half(low + (high - low) * (hash(i + seed) / 4294967296.f));
    }
}

unsigned blocks_for(std::size_t count) { return static_cast<unsigned>((count + 255) / 256); }

// ---- what is right ----

// One column of the result in double: `exact` of x * (s (q - 8) + z), `rounded` with the weights rounded to half, which
// is what a perfect FP16 product of dequantised weights would give.
__global__ void reference(const __half *x, const __half *scales, const __half *zeros, const __half *bias, double *exact,
    double *rounded, int m, int all_n, int all_k, int group) {
    constexpr int chunk = 1024;
    __shared__ double exact_weight[chunk];
    __shared__ double rounded_weight[chunk];
    extern __shared__ double sums[];
    const int n = blockIdx.x;
    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < 2 * m; i += blockDim.x) {
        sums[i] = 0;
    }
    for (int first = 0; first < all_k; first += chunk) {
        const int count = min(chunk, all_k - first);
        __syncthreads();
        for (int k = threadIdx.x; k < count; k += blockDim.x) {
            const std::size_t at = static_cast<std::size_t>((first + k) / group) * all_n + n;
            const double zero = zeros != nullptr ? static_cast<double>(__half2float(zeros[at])) : 0.0;
            const double scale = __half2float(scales[at]);
            const double weight = (nibble(n, first + k, all_k) - 8) * scale + zero;
            exact_weight[k] = weight;
            rounded_weight[k] = __half2float(__double2half(weight));
        }
        __syncthreads();
        for (int row = warp; row < m; row += blockDim.x / 32) {
            double a = 0;
            double b = 0;
            for (int k = lane; k < count; k += 32) {
                const double value = __half2float(x[static_cast<std::size_t>(row) * all_k + first + k]);
                a += value * exact_weight[k];
                b += value * rounded_weight[k];
            }
            for (int other = 16; other != 0; other >>= 1) {
                a += __shfl_xor_sync(0xffffffffu, a, other);
                b += __shfl_xor_sync(0xffffffffu, b, other);
            }
            if (lane == 0) {
                sums[2 * row] += a;
                sums[2 * row + 1] += b;
            }
        }
    }
    __syncthreads();
    const double constant = bias != nullptr ? static_cast<double>(__half2float(bias[n])) : 0.0;
    for (int row = threadIdx.x; row < m; row += blockDim.x) {
        exact[static_cast<std::size_t>(row) * all_n + n] = sums[2 * row] + constant;
        rounded[static_cast<std::size_t>(row) * all_n + n] = sums[2 * row + 1] + constant;
    }
}

struct Sums {
    double error;              // squared, of the result
    double base;               // of the rounded reference, rounded once more
    double norm;               // of the exact reference
    unsigned long long digest; // of the result's bits
};

__global__ void compare(const __half *c, const double *exact, const double *rounded, std::size_t count, Sums *out) {
    double error = 0;
    double base = 0;
    double norm = 0;
    unsigned long long digest = 0;
    const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
    for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const double here = static_cast<double>(__half2float(c[i])) - exact[i];
        const double best = static_cast<double>(__half2float(__double2half(rounded[i]))) - exact[i];
        error += here * here;
        base += best * best;
        norm += exact[i] * exact[i];
        digest += hash(static_cast<std::uint32_t>(i) * 2654435761u ^ hash(__half_as_ushort(c[i]) + 77u));
    }
    for (int other = 16; other != 0; other >>= 1) {
        error += __shfl_xor_sync(0xffffffffu, error, other);
        base += __shfl_xor_sync(0xffffffffu, base, other);
        norm += __shfl_xor_sync(0xffffffffu, norm, other);
        digest += __shfl_xor_sync(0xffffffffu, digest, other);
    }
    if (threadIdx.x % 32 == 0) {
        atomicAdd(&out->error, error);
        atomicAdd(&out->base, base);
        atomicAdd(&out->norm, norm);
        atomicAdd(&out->digest, digest); // integers: the order does not matter
    }
}

// ---- the floor: a kernel that only reads ----

template <int in_flight>
__global__ void __launch_bounds__(256) read_only(const uint4 *from, std::size_t count, unsigned *sink) {
    const std::size_t step = static_cast<std::size_t>(gridDim.x) * blockDim.x;
    std::size_t i = static_cast<std::size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    unsigned all = 0;
    for (; i + (in_flight - 1) * step < count; i += in_flight * step) {
        uint4 value[in_flight];
#pragma unroll
        for (int j = 0; j < in_flight; ++j) {
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(value[j].x), "=r"(value[j].y), "=r"(value[j].z), "=r"(value[j].w)
                         : "l"(from + i + j * step));
        }
#pragma unroll
        for (int j = 0; j < in_flight; ++j) {
            all ^= value[j].x ^ value[j].y ^ value[j].z ^ value[j].w;
        }
    }
    for (; i < count; i += step) {
        all ^= from[i].x ^ from[i].y ^ from[i].z ^ from[i].w;
    }
    if (all == 0x12345678u) { // else the loads would be dead
        *sink = all;
    }
}

// ---- time ----

cudaStream_t stream;

// `launches` calls as one graph.
class Graph {
public:
    cudaError_t capture(const std::function<cudaError_t(int)> &launch) {
        REQUIRE(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        cudaError_t error = cudaSuccess;
        for (int i = 0; i < launches && error == cudaSuccess; ++i) {
            error = launch(i);
        }
        cudaGraph_t graph = nullptr;
        const cudaError_t end = cudaStreamEndCapture(stream, &graph);
        if (error == cudaSuccess) {
            error = end;
        }
        if (error == cudaSuccess) {
            error = cudaGraphInstantiate(&executable_, graph, 0);
        }
        if (graph != nullptr) {
            REQUIRE(cudaGraphDestroy(graph));
        }
        static_cast<void>(cudaGetLastError());
        return error;
    }

    void replay(bool keep) {
        static const std::pair<cudaEvent_t, cudaEvent_t> events = [] {
            std::pair<cudaEvent_t, cudaEvent_t> made;
            REQUIRE(cudaEventCreate(&made.first));
            REQUIRE(cudaEventCreate(&made.second));
            return made;
        }();
        REQUIRE(cudaEventRecord(events.first, stream));
        REQUIRE(cudaGraphLaunch(executable_, stream));
        REQUIRE(cudaEventRecord(events.second, stream));
        REQUIRE(cudaStreamSynchronize(stream));
        float milliseconds = 0;
        REQUIRE(cudaEventElapsedTime(&milliseconds, events.first, events.second));
        if (keep) {
            times_.push_back(milliseconds / launches * 1e3);
        }
    }

    // Microseconds of a launch.
    std::vector<double> sorted() const {
        std::vector<double> times = times_;
        std::sort(times.begin(), times.end());
        return times;
    }
    double median() const { return sorted()[times_.size() / 2]; }

    void destroy() { REQUIRE(cudaGraphExecDestroy(executable_)); }

private:
    cudaGraphExec_t executable_ = nullptr;
    std::vector<double> times_;
};

// ---- the plan ----

struct Case {
    std::string mode;
    int n, k, group, zeros, bias;
    int m;
    std::string name;
    int shares, dependence;
    const Config *config = nullptr;
    Graph graph;
    unsigned long long digest = 0;
    double error = 0;
    double base = 0;

    auto problem() const { return std::tie(mode, n, k, group, zeros, bias); }
};

std::vector<Case> read_plan(const char *path) {
    std::map<std::string, const Config *> known;
    for (const Config *const *config = configs; *config != nullptr; ++config) {
        known[(*config)->name] = *config;
    }
    std::ifstream file(path);
    if (!file) {
        std::fprintf(stderr, "cannot read %s\n", path);
        std::exit(2);
    }
    std::vector<Case> plan;
    for (Case c; file >> c.mode >> c.n >> c.k >> c.group >> c.zeros >> c.bias >> c.m >> c.name >> c.shares
        >> c.dependence;) {
        const auto found = known.find(c.name);
        if (found == known.end()) {
            std::fprintf(stderr, "not built: %s\n", c.name.c_str());
            std::exit(2);
        }
        c.config = found->second;
        plan.push_back(c);
    }
    return plan;
}

// ---- one problem ----

class Bench {
public:
    explicit Bench(std::FILE *out) : out_(out) {
        REQUIRE(cudaStreamCreate(&stream));
        REQUIRE(cudaMalloc(&sums_, sizeof(Sums)));
        REQUIRE(cudaMalloc(&sink_, 64));
    }

    // Cases of one mode and problem.
    void run(Case *begin, Case *end) {
        allocate(begin, end);
        const bool timed = begin->mode == "time";
        const double read = timed ? measure_floor(*begin) : 0;
        for (Case *first = begin; first != end;) {
            Case *last = std::find_if(first, end, [&](const Case &c) { return c.m != first->m; });
            if (timed) {
                const double product = 2.0 * first->m * first->n * first->k / flops * 1e6;
                time(first, last, std::max(read, product));
            } else {
                for (Case *c = first; c != last; ++c) {
                    // Twice, for the same bits.
                    static_cast<void>(first_launch(*c) && first_launch(*c));
                }
            }
            first = last;
        }
        for (char *buffer : buffers_) {
            REQUIRE(cudaFree(buffer));
        }
        for (void *data : {static_cast<void *>(x_), static_cast<void *>(c_), static_cast<void *>(bias_),
                 static_cast<void *>(exact_), static_cast<void *>(rounded_)}) {
            REQUIRE(cudaFree(data));
        }
    }

    int wrong() const { return wrong_; }

    void summary() const {
        std::fprintf(out_, "{\"kind\": \"summary\", \"checked\": %d, \"wrong\": %d}\n", checked_, wrong_);
    }

private:
    void allocate(const Case *begin, const Case *end) {
        const Case &c = *begin;
        int most = 0;
        for (const Case *other = begin; other != end; ++other) {
            most = std::max(most, other->m);
        }
        const std::size_t weights = static_cast<std::size_t>(c.n) * c.k;
        const std::size_t scales = static_cast<std::size_t>(c.k / c.group) * c.n;
        const std::size_t results = static_cast<std::size_t>(most) * c.n;
        const std::size_t activations = static_cast<std::size_t>(most) * c.k;
        scales_at_ = (weights / 2 + 255) / 256 * 256;
        zeros_at_ = scales_at_ + (scales * 2 + 255) / 256 * 256;
        bytes_ = c.zeros ? zeros_at_ + (zeros_at_ - scales_at_) : zeros_at_;
        const std::size_t wanted = c.mode == "time" ? rotation / bytes_ + 1 : 1;
        buffers_.resize(std::min<std::size_t>(launches, wanted));
        for (char *&buffer : buffers_) {
            REQUIRE(cudaMalloc(&buffer, bytes_));
        }
        REQUIRE(cudaMalloc(&x_, activations * 2));
        REQUIRE(cudaMalloc(&c_, results * 2 + guard_bytes));
        REQUIRE(cudaMalloc(&bias_, c.n * 2));
        REQUIRE(cudaMalloc(&exact_, results * 8));
        REQUIRE(cudaMalloc(&rounded_, results * 8));

        char *first = buffers_[0];
        __half *const scale = reinterpret_cast<__half *>(first + scales_at_);
        __half *const zero = c.zeros ? reinterpret_cast<__half *>(first + zeros_at_) : nullptr;
        REQUIRE(cudaMemsetAsync(first, 0, bytes_, stream));
        pack<<<blocks_for(weights / 8), 256, 0, stream>>>(reinterpret_cast<std::uint32_t *>(first), c.n, c.k);
        fill_uniform<<<blocks_for(scales), 256, 0, stream>>>(scale, scales, 777, 0.005f, 0.015f);
        if (zero != nullptr) {
            fill_uniform<<<blocks_for(scales), 256, 0, stream>>>(zero, scales, 991, -0.05f, 0.05f);
        }
        fill_normal<<<blocks_for(activations), 256, 0, stream>>>(x_, activations, 99);
        fill_normal<<<blocks_for(c.n), 256, 0, stream>>>(bias_, c.n, 5);
        reference<<<c.n, 256, 2 * most * sizeof(double), stream>>>(
            x_, scale, zero, c.bias ? bias_ : nullptr, exact_, rounded_, most, c.n, c.k, c.group);
        REQUIRE(cudaGetLastError());
        for (std::size_t i = 1; i < buffers_.size(); ++i) {
            REQUIRE(cudaMemcpyAsync(buffers_[i], first, bytes_, cudaMemcpyDeviceToDevice, stream));
        }
        REQUIRE(cudaStreamSynchronize(stream));
    }

    // Of the settings of the read-only kernel, the fastest.
    double measure_floor(const Case &c) {
        std::vector<Graph> graphs;
        for (int grid : {528, 660, 792, 1056, 1584, 2112}) {
            for (int in_flight : {1, 2, 4}) {
                const auto kernel = in_flight == 1 ? read_only<1> : in_flight == 2 ? read_only<2> : read_only<4>;
                graphs.emplace_back();
                REQUIRE(graphs.back().capture([&](int i) {
                    const uint4 *from = reinterpret_cast<const uint4 *>(buffers_[i % buffers_.size()]);
                    kernel<<<grid, 256, 0, stream>>>(from, bytes_ / 16, sink_);
                    return cudaGetLastError();
                }));
            }
        }
        for (int round = 0; round < warm_up + rounds; ++round) {
            for (Graph &graph : graphs) {
                graph.replay(round >= warm_up);
            }
        }
        double best = HUGE_VAL;
        for (Graph &graph : graphs) {
            best = std::min(best, graph.median());
            graph.destroy();
        }
        std::fprintf(out_,
            "{\"kind\": \"floor\", \"n\": %d, \"k\": %d, \"group\": %d, \"zeros\": %d, \"bytes\": %zu, \"us\": %.3f}\n",
            c.n, c.k, c.group, c.zeros, bytes_, best);
        return best;
    }

    cudaError_t launch(const Case &c, int i) const {
        const char *buffer = buffers_[i % buffers_.size()];
        return decode::launch(c.config->kernel, {x_, buffer, buffer + scales_at_, c.zeros ? buffer + zeros_at_ : nullptr,
            c.bias ? bias_ : nullptr, {c_, c_, c_}, {c.n, c.n, c.n}, c.m, c.n, c.k, c.group, stream, static_cast<Dependence>(c.dependence),
            c.shares});
    }

    void poison(const Case &c) const { REQUIRE(cudaMemsetAsync(c_, 0xff, result_bytes(c) + guard_bytes, stream)); }

    // A launch of its own, and its result.
    bool first_launch(Case &c) {
        poison(c);
        if (const cudaError_t error = launch(c, 0); error != cudaSuccess) {
            static_cast<void>(cudaGetLastError());
            note(c, "refused", cudaGetErrorString(error));
            return false;
        }
        return right(c);
    }

    // Whether the result is, to 1.05 of the least error, with the bits it had before, and nothing behind it.
    bool right(Case &c) {
        Sums sums;
        std::vector<unsigned char> guard(guard_bytes);
        REQUIRE(cudaMemsetAsync(sums_, 0, sizeof sums, stream));
        compare<<<264, 256, 0, stream>>>(c_, exact_, rounded_, static_cast<std::size_t>(c.m) * c.n, sums_);
        REQUIRE(cudaGetLastError());
        REQUIRE(cudaMemcpyAsync(&sums, sums_, sizeof sums, cudaMemcpyDeviceToHost, stream));
        REQUIRE(cudaMemcpyAsync(guard.data(), reinterpret_cast<const char *>(c_) + result_bytes(c), guard_bytes,
            cudaMemcpyDeviceToHost, stream));
        if (const cudaError_t error = cudaStreamSynchronize(stream); error != cudaSuccess) {
            note(c, "wrong", cudaGetErrorString(error)); // the context is lost
            std::fflush(out_);
            std::exit(1);
        }
        ++checked_;
        c.error = std::sqrt(sums.error / sums.norm);
        c.base = std::sqrt(sums.base / sums.norm);
        const char *reason = nullptr;
        if (!(c.error <= 1.05 * c.base)) { // NaN is wrong too
            reason = "error";
        } else if (c.digest != 0 && c.digest != sums.digest) {
            reason = "other bits than before";
        } else if (std::any_of(guard.begin(), guard.end(), [](unsigned char byte) { return byte != 0xff; })) {
            reason = "wrote beyond the result";
        }
        c.digest = sums.digest;
        if (reason != nullptr) {
            ++wrong_;
            note(c, "wrong", reason);
        }
        return reason == nullptr;
    }

    void time(Case *begin, Case *end, double floor) {
        std::vector<Case *> good;
        for (Case *c = begin; c != end; ++c) {
            if (!first_launch(*c)) {
                continue;
            }
            if (const cudaError_t error = c->graph.capture([&](int i) { return launch(*c, i); });
                error != cudaSuccess) {
                note(*c, "refused", cudaGetErrorString(error));
                continue;
            }
            good.push_back(c);
        }
        for (int round = 0; round < warm_up + rounds; ++round) {
            for (Case *c : good) {
                c->graph.replay(round >= warm_up);
            }
        }
        for (Case *c : good) { // what the last launch of a further replay leaves
            poison(*c);
            c->graph.replay(false);
            if (right(*c)) {
                const std::vector<double> times = c->graph.sorted();
                put(*c, "time");
                std::fprintf(out_,
                    ", \"us\": %.3f, \"min\": %.3f, \"max\": %.3f, \"floor\": %.3f, \"error\": %.4e, "
                    "\"base_error\": %.4e}\n",
                    c->graph.median(), times.front(), times.back(), floor, c->error, c->base);
            }
            c->graph.destroy();
        }
    }

    void note(const Case &c, const char *kind, const char *reason) const {
        put(c, kind);
        std::fprintf(out_, ", \"reason\": \"%s\"}\n", reason);
    }

    void put(const Case &c, const char *kind) const {
        std::fprintf(out_,
            "{\"kind\": \"%s\", \"n\": %d, \"k\": %d, \"group\": %d, \"zeros\": %d, \"bias\": %d, \"m\": %d, "
            "\"name\": \"%s\", \"shares\": %d, \"dependence\": %d",
            kind, c.n, c.k, c.group, c.zeros, c.bias, c.m, c.name.c_str(), c.shares, c.dependence);
    }

    static std::size_t result_bytes(const Case &c) { return static_cast<std::size_t>(c.m) * c.n * 2; }

    std::FILE *out_;
    std::vector<char *> buffers_; // the same weights, scales and zeros in each
    std::size_t bytes_ = 0;
    std::size_t scales_at_ = 0;
    std::size_t zeros_at_ = 0;
    __half *x_ = nullptr;
    __half *c_ = nullptr;
    __half *bias_ = nullptr;
    double *exact_ = nullptr;
    double *rounded_ = nullptr;
    Sums *sums_ = nullptr;
    unsigned *sink_ = nullptr;
    int checked_ = 0;
    int wrong_ = 0;
};

int run(const char *plan_path, const char *out_path) {
    std::vector<Case> plan = read_plan(plan_path);
    std::FILE *out = std::fopen(out_path, "w");
    if (out == nullptr) {
        std::fprintf(stderr, "cannot write %s\n", out_path);
        return 2;
    }
    cudaDeviceProp device;
    int driver = 0;
    REQUIRE(cudaGetDeviceProperties(&device, 0));
    REQUIRE(cudaDriverGetVersion(&driver));
    std::fprintf(out, "{\"kind\": \"device\", \"name\": \"%s\", \"sms\": %d, \"driver_cuda\": %d, \"toolkit\": %d}\n",
        device.name, device.multiProcessorCount, driver, CUDART_VERSION);
    Bench bench(out);
    for (auto first = plan.begin(); first != plan.end();) {
        const auto last =
            std::find_if(first, plan.end(), [&](const Case &c) { return c.problem() != first->problem(); });
        bench.run(&*first, &*first + (last - first));
        std::fflush(out);
        first = last;
    }
    bench.summary();
    std::fclose(out);
    return bench.wrong() != 0;
}

} // namespace
} // namespace w4a16::decode

int main(int count, char **arguments) {
    if (count != 3) {
        std::fprintf(stderr, "usage: bench PLAN OUT\n");
        return 2;
    }
    return w4a16::decode::run(arguments[1], arguments[2]);
}
