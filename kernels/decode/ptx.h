// Hopper instructions that CUDA C++ has no names for: barriers, bulk copies, matrix loads, clusters, dependent launch.

#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace w4a16::decode {

// L2 policies, as CUTLASS's TMA::CacheHintSm90 spells them: weights are read once, activations by every CTA.
constexpr std::uint64_t evict_first = 0x12F0000000000000ull;
constexpr std::uint64_t evict_normal = 0x1000000000000000ull;
constexpr std::uint64_t evict_last = 0x14F0000000000000ull;

__device__ __forceinline__ std::uint32_t shared_address(const void *pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers, by shared-memory address ----

__device__ __forceinline__ void barrier_init(std::uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives once for the warp, whose lanes are all here; does so without a branch, which wgmma in flight cannot stand.
__device__ __forceinline__ void barrier_arrive_by_warp(std::uint32_t barrier, bool enabled = true) {
    asm volatile("{\n.reg .pred p, q;\n"
                 "elect.sync _|p, 0xFFFFFFFF;\n"
                 "setp.ne.and.u32 q, %1, 0, p;\n"
                 "@q mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
                 "r"(static_cast<std::uint32_t>(enabled))
                 : "memory");
}

// Arrives and announces how many bytes copies will bring.
__device__ __forceinline__ void barrier_arrive_expecting(std::uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_try(std::uint32_t barrier, int parity) {
    std::uint32_t done;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}

__device__ __forceinline__ void barrier_wait(std::uint32_t barrier, int parity, bool enabled = true) {
    while (enabled && !barrier_try(barrier, parity)) {
    }
}

// ---- bulk copies from global to shared memory ----

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void copy_tile_2d(std::uint32_t to, const CUtensorMap *map, int x, int y,
    std::uint32_t barrier, std::uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void copy_tile_3d(std::uint32_t to, const CUtensorMap *map, int x, int y, int z,
    std::uint32_t barrier, std::uint64_t policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(policy)
                 : "memory");
}

// ---- shared memory to registers ----

__device__ __forceinline__ std::uint32_t load_word(std::uint32_t address) {
    std::uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
    return word;
}

__device__ __forceinline__ float4 load_floats(std::uint32_t address) {
    float4 value;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(address));
    return value;
}

__device__ __forceinline__ __half load_half(std::uint32_t address) {
    std::uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address));
    return __ushort_as_half(bits);
}

// Four 8 x 8 matrices of halves; lane 8i + r gives the address of row r of matrix i.
__device__ __forceinline__ void load_matrices(std::uint32_t (&fragment)[4], std::uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address));
}

// An 8 x 8 matrix of halves, a row in four lanes, to its transpose.
__device__ __forceinline__ std::uint32_t transposed(std::uint32_t fragment) {
    std::uint32_t result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
    return result;
}

// ---- global memory that CTAs share ----

// By one lane of a warp whose lanes are all here, without a branch.  What was written before, also by other threads that it
// has waited for, is seen by whoever sees this.
__device__ __forceinline__ void store_release_by_warp(std::uint64_t *to, std::uint64_t value) {
    asm volatile("{\n.reg .pred p;\n"
                 "elect.sync _|p, 0xFFFFFFFF;\n"
                 "@p st.release.gpu.global.u64 [%0], %1;\n}" ::"l"(to),
                 "l"(value)
                 : "memory");
}

__device__ __forceinline__ void store_by_warp(std::uint64_t *to, std::uint64_t value) {
    asm volatile("{\n.reg .pred p;\n"
                 "elect.sync _|p, 0xFFFFFFFF;\n"
                 "@p st.global.u64 [%0], %1;\n}" ::"l"(to),
                 "l"(value)
                 : "memory");
}

// Without a branch.
__device__ __forceinline__ void store_word(void *to, std::uint32_t value, bool enabled) {
    asm volatile("{\n.reg .pred p;\n"
                 "setp.ne.u32 p, %2, 0;\n"
                 "@p st.global.u32 [%0], %1;\n}" ::"l"(to),
                 "r"(value), "r"(static_cast<std::uint32_t>(enabled))
                 : "memory");
}

__device__ __forceinline__ std::uint64_t load_acquire(const std::uint64_t *from) {
    std::uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
}

// Between what is seen of memory and what the copy engine then reads there.
__device__ __forceinline__ void copies_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Of `bytes`, a multiple of 16 like both addresses.
__device__ __forceinline__ void copy_bytes(std::uint32_t to, const void *from, int bytes, std::uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// ---- mma.sync m16n8k16, FP16 in, FP32 out: d = a * b + c ----

__device__ __forceinline__ void mma_16x8x16(float (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2,
    std::uint32_t a3, std::uint32_t b0, std::uint32_t b1, const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// ---- warps, named barriers, clusters, dependent launch ----

// True in one lane of a warp whose lanes are all here.  Unlike with lane == 0, the compiler then knows that what
// follows runs once, and does not wrap every bulk copy into a loop over lanes.
__device__ __forceinline__ bool elect_lane() {
    std::uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

// Waits for the first `threads` threads of the CTA; barrier 0 is __syncthreads.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Counts for those who wait, and waits for nobody.
__device__ __forceinline__ void arrive_at_threads(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Of the warpgroup that is here as a whole.
template <int registers>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

__device__ __forceinline__ int cluster_size() {
    std::uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return static_cast<int>(size);
}

__device__ __forceinline__ int cluster_rank() {
    std::uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// Every thread of the cluster that has not exited arrives, and then waits for the others: what they wrote to shared
// memory before they arrived is visible after it.
__device__ __forceinline__ void arrive_at_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The place of a shared-memory address of this CTA in the CTA `rank` of the cluster.
__device__ __forceinline__ std::uint32_t remote_address(std::uint32_t address, int rank) {
    std::uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

__device__ __forceinline__ void store_remote(std::uint32_t address, float4 value) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x), "f"(value.y),
                 "f"(value.z), "f"(value.w)
                 : "memory");
}

// Lets the next kernel's CTAs start as soon as there is room for them.
__device__ __forceinline__ void release_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Waits until the kernels before this one have finished and their writes are visible.
__device__ __forceinline__ void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

} // namespace w4a16::decode
