// SPDX-License-Identifier: Apache-2.0
// The miniature's packing and GEMM on the CPU: the same functions that the kernel runs, one block and thread after
// the other. Input and output are raw; check.py drives it and knows what must come out.
#include "cutlass/epilogue/collective/collective_epilogue.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/numeric_types.h"
#include "cutlass_extensions/gemm/collective/collective_mma_interleaved.hpp"
#include "tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.h"

#include <cstdio>
#include <cstdlib>
#include <string>

static int g_arch = 90;

// In the place of the CUDA runtime, which this program does not link: the preprocessor asks the device what it is.
extern "C" cudaError_t cudaGetDevice(int* device)
{
    *device = 0;
    return cudaSuccess;
}

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int)
{
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? g_arch / 10 : g_arch % 10;
    return cudaSuccess;
}

extern "C" char const* cudaGetErrorString(cudaError_t)
{
    return "none";
}

template <class T>
std::vector<T> read(size_t count)
{
    std::vector<T> values(count);
    if (std::fread(values.data(), sizeof(T), count, stdin) != count)
    {
        std::exit(2);
    }
    return values;
}

static void pack(tensorrt_llm::kernels::cutlass_kernels::QuantType type, size_t k, size_t n)
{
    auto const in = read<int8_t>(k * n * get_weight_quant_bits(type) / 8);
    std::vector<int8_t> out(in.size());
    preprocess_weights_for_mixed_gemm(out.data(), in.data(), {k, n}, type);
    std::fwrite(out.data(), 1, out.size(), stdout);
}

// The stored weights in plain order, [k, n], a byte each.
template <int Bits>
void unpack(int k, int n, int interleave)
{
    auto const words = read<uint32_t>(size_t(k) * n * Bits / 32);
    for (int i = 0; i < k * n; ++i)
    {
        std::putchar(cutlass::gemm::kernel::PackedLayout<Bits, 16>::load(words.data(), i / n, i % n, k, interleave));
    }
}

template <class... Zero>
void gemm(int m, int n, int k, int group)
{
    using cutlass::half_t;
    using Tile = cute::Shape<cute::Int<64>, cute::Int<16>, cute::Int<64>>;
    using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
    using Dispatch = cutlass::gemm::MainloopSm90TmaGmmaRmemAWarpSpecializedMixedInput<4, Cluster, void>;
    using Mainloop = cutlass::gemm::collective::CollectiveMmaInterleaved<Dispatch, Tile,
        cute::tuple<cutlass::uint4b_t, half_t, Zero...>, half_t, void>;
    using Epilogue = cutlass::epilogue::collective::CollectiveEpilogue<void, Tile, half_t, half_t>;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<void, Mainloop, Epilogue, void>;

    int const rows = (k + group - 1) / group;
    auto const a = read<half_t>(size_t(m) * k);
    auto const b = read<uint8_t>(size_t(n) * k / 2);
    auto const scales = read<half_t>(size_t(rows) * n);
    auto const zeros = read<half_t>(size_t(rows) * n);
    auto const bias = read<half_t>(n);
    std::vector<half_t> c(size_t(m) * n);
    typename Kernel::Params const params{n, m, k,
        {a.data(), reinterpret_cast<cutlass::uint4b_t const*>(b.data()), scales.data(), zeros.data(), group, rows},
        {1.f, bias.data(), c.data()}};
    for (int i = 0; i < cutlass::ceil_div(n, 64) * cutlass::ceil_div(m, 16) * 128; ++i)
    {
        Kernel::run_thread(params, i / 128 % cutlass::ceil_div(n, 64), i / 128 / cutlass::ceil_div(n, 64), i % 128);
    }
    std::fwrite(c.data(), sizeof(half_t), c.size(), stdout);
}

int main(int argc, char** argv)
{
    using tensorrt_llm::kernels::cutlass_kernels::QuantType;
    std::string const what = argc == 6 ? argv[1] : "";
    auto const number = [argv](int i) { return std::atoi(argv[i]); };
    if (what == "pack") // BITS ARCH K N
    {
        g_arch = number(3);
        pack(number(2) == 4 ? QuantType::W4_A16 : QuantType::W8_A16, number(4), number(5));
    }
    else if (what == "unpack") // BITS INTERLEAVE K N
    {
        number(2) == 4 ? unpack<4>(number(4), number(5), number(3)) : unpack<8>(number(4), number(5), number(3));
    }
    else if (what == "scale") // M N K GROUP
    {
        gemm<>(number(2), number(3), number(4), number(5));
    }
    else if (what == "zeros")
    {
        gemm<cutlass::half_t>(number(2), number(3), number(4), number(5));
    }
    else
    {
        return 1;
    }
}
