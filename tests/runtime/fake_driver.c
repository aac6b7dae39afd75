/* Enough of libcuda for the tests of arrays.py and driver.py: one GPU whose memory is malloc's.
 *
 * Nothing is asynchronous, but who waits for whom is kept: fake_work() puts a piece of work on a
 * stream, and each stream and event knows the pieces that come before it.  What would crash, race or
 * spoil a capture with the real driver is noted in fake_misuse().  fake_log() is what was called, in
 * order.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID_HANDLE = 400, CAPTURE_UNSUPPORTED = 900, CAPTURE_ISOLATION = 905, CAPTURE_IMPLICIT = 906 };

/* A stream or an event; handles are never given twice. */
struct thing { int alive, event, blocking; uint64_t before, capture; };
enum { STEP = 16, FIRST = 16, COUNT = 1 << 16 };
static struct thing things[COUNT] = {{.alive = 1, .blocking = 1}, {.alive = 1, .blocking = 1}};
static unsigned made = FIRST;

static char calls[1 << 20], misuse[1 << 14];
static int live_blocks, pools = 1, fail_next;
static void *context;
static uint64_t captures, pieces, done, before_last_free;

#define LOG() (strlen(calls) < sizeof calls - 64 ? (void)strcat(strcat(calls, __func__), " ") : (void)0)
#define CALL(name, ...) int name(__VA_ARGS__)

static int wrong(const char *call, const char *what, int status) {
    size_t length = strlen(misuse);
    snprintf(misuse + length, sizeof misuse - length, "%s %s\n", call, what);
    return status;
}
static struct thing *thing_of(void *handle, int event) {
    uintptr_t number = (uintptr_t)handle;
    if (!event && number <= 2) return &things[number == 2];
    struct thing *found = number % STEP || number / STEP >= made ? NULL : &things[number / STEP];
    return found && found->alive && found->event == event ? found : NULL;
}
static int create(void **handle, int event, int blocking) {
    if (made == COUNT) return 2;
    *handle = (void *)(uintptr_t)(made * STEP);
    things[made++] = (struct thing){.alive = 1, .event = event, .blocking = blocking};
    return 0;
}
static int destroy(const char *call, void *handle, int event) {
    struct thing *found = thing_of(handle, event);
    if (!found) return wrong(call, "on what is not there", INVALID_HANDLE);
    found->alive = 0;
    return 0;
}
static int implicit(const struct thing *stream) {
    if (stream != things) return 0;
    for (unsigned i = FIRST; i < made; ++i)
        if (!things[i].event && things[i].alive && things[i].blocking && things[i].capture) return 1;
    return 0;
}
/* The stream, when something is about to be put there. */
static int use(const char *call, void *handle, struct thing **stream) {
    struct thing *found = thing_of(handle, 0);
    if (!found) return wrong(call, "on a stream that is not there", INVALID_HANDLE);
    if (implicit(found)) return wrong(call, "on the legacy stream in a capture", CAPTURE_IMPLICIT);
    if (found->blocking && found != things) found->before |= things->before;
    for (unsigned i = 1; found == things && i < made; ++i)
        if (!things[i].event && things[i].blocking) found->before |= things[i].before;
    if (stream) *stream = found;
    return 0;
}
static int wait_for(const char *call, void *handle) {
    struct thing *stream;
    int status = use(call, handle, &stream);
    if (status) return status;
    if (stream->capture) return wrong(call, "in a capture", CAPTURE_UNSUPPORTED);
    done |= stream->before;
    return 0;
}

const char *fake_log(void) { return calls; }
const char *fake_misuse(void) { return misuse; }
void fake_reset(void) { calls[0] = 0; }
int fake_live(void) { return live_blocks; }
void fake_pools(int on) { pools = on; }
void fake_fail(int status) { fail_next = status; }
uint64_t fake_work(void *s) {
    struct thing *stream;
    if (use(__func__, s, &stream)) return 0;
    uint64_t piece = pieces ? pieces << 1 : 1;
    pieces = piece;
    stream->before |= piece;
    return piece;
}
uint64_t fake_before(void *s) { return use(__func__, s, NULL) ? 0 : thing_of(s, 0)->before | done; }
uint64_t fake_before_last_free(void) { return before_last_free; }

CALL(cuInit, unsigned flags) { LOG(); (void)flags; int s = fail_next; fail_next = 0; return s; }
CALL(cuDriverGetVersion, int *v) { *v = 13000; return 0; }
CALL(cuGetErrorName, int s, const char **t) { *t = s == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_FAKE"; return 0; }
CALL(cuGetErrorString, int s, const char **t) { (void)s; *t = "it failed"; return 0; }
CALL(cuDeviceGetCount, int *n) { *n = 1; return 0; }
CALL(cuDeviceGet, int *d, int i) { *d = i; return i == 0 ? 0 : 101; }
CALL(cuDeviceGetName, char *t, int n, int d) { (void)d; strncpy(t, "Fake H200", n); return 0; }
CALL(cuDeviceGetAttribute, int *v, int a, int d) {
    (void)d;
    *v = a == 16 ? 132 : a == 38 ? 60 << 20 : a == 75 ? 9 : a == 115 ? pools : 0;
    return 0;
}
CALL(cuDeviceTotalMem_v2, size_t *n, int d) { (void)d; *n = (size_t)1 << 30; return 0; }
CALL(cuDevicePrimaryCtxRetain, void **c, int d) { (void)d; *c = &context; return 0; }
CALL(cuCtxGetCurrent, void **c) { *c = context; return 0; }
CALL(cuCtxSetCurrent, void *c) { context = c; return 0; }
CALL(cuCtxGetDevice, int *d) { *d = 0; return context ? 0 : 201; }
CALL(cuCtxSynchronize, void) { LOG(); done = ~(uint64_t)0; return 0; }
CALL(cuPointerGetAttribute, void *v, int a, uint64_t p) { (void)a; *(int *)v = 0; return p > 4096 ? 0 : 1; }
CALL(cuMemGetInfo_v2, size_t *f, size_t *t) { *f = 1 << 20; *t = 1 << 30; return 0; }
CALL(cuMemPoolCreate, void **p, void *q) { LOG(); (void)q; *p = calls; return 0; }
CALL(cuMemPoolSetAttribute, void *p, int a, void *v) { (void)p; (void)a; (void)v; return 0; }
CALL(cuMemPoolTrimTo, void *p, size_t n) { LOG(); (void)p; (void)n; return 0; }

static int take(uint64_t *p, size_t n) {
    if (n > (size_t)1 << 30) return 2;
    void *block = NULL;
    if (posix_memalign(&block, 256, n)) return 2;
    memset(block, 0xA5, n);
    *p = (uint64_t)(uintptr_t)block;
    ++live_blocks;
    return 0;
}
static int drop(uint64_t p) { free((void *)(uintptr_t)p); --live_blocks; return 0; }
static int move(const char *call, void *s, void *to, const void *from, size_t n) {
    int status = use(call, s, NULL);
    if (!status) memcpy(to, from, n);
    return status;
}

CALL(cuMemAllocFromPoolAsync, uint64_t *p, size_t n, void *q, void *s) {
    LOG();
    (void)q;
    int status = use(__func__, s, NULL);
    return status ? status : take(p, n);
}
CALL(cuMemAllocAsync, uint64_t *p, size_t n, void *s) {
    LOG();
    int status = use(__func__, s, NULL);
    return status ? status : take(p, n);
}
CALL(cuMemAlloc_v2, uint64_t *p, size_t n) { LOG(); return take(p, n); }
CALL(cuMemFreeAsync, uint64_t p, void *s) {
    LOG();
    struct thing *stream;
    int status = use(__func__, s, &stream);
    if (status) return status;
    before_last_free = stream->before | done;
    return drop(p);
}
CALL(cuMemFree_v2, uint64_t p) { LOG(); return drop(p); }
CALL(cuMemcpyHtoDAsync_v2, uint64_t d, const void *s, size_t n, void *t) {
    return move(__func__, t, (void *)(uintptr_t)d, s, n);
}
CALL(cuMemcpyDtoHAsync_v2, void *d, uint64_t s, size_t n, void *t) {
    return move(__func__, t, d, (void *)(uintptr_t)s, n);
}
CALL(cuMemcpyAsync, uint64_t d, uint64_t s, size_t n, void *t) {
    return move(__func__, t, (void *)(uintptr_t)d, (void *)(uintptr_t)s, n);
}
CALL(cuMemsetD8Async, uint64_t d, unsigned char v, size_t n, void *t) {
    int status = use(__func__, t, NULL);
    if (!status) memset((void *)(uintptr_t)d, v, n);
    return status;
}
CALL(cuStreamCreate, void **s, unsigned f) { return create(s, 0, f == 0); }
CALL(cuStreamDestroy_v2, void *s) { LOG(); return destroy(__func__, s, 0); }
CALL(cuStreamSynchronize, void *s) { LOG(); return wait_for(__func__, s); }
CALL(cuStreamWaitEvent, void *s, void *e, unsigned f) {
    LOG();
    (void)f;
    struct thing *stream, *event = thing_of(e, 1);
    int status = use(__func__, s, &stream);
    if (status) return status;
    if (!event) return wrong(__func__, "for an event that is not there", INVALID_HANDLE);
    if (event->capture != stream->capture) return wrong(__func__, "across a capture", CAPTURE_ISOLATION);
    stream->before |= event->before;
    return 0;
}
CALL(cuStreamBeginCapture_v2, void *s, int m) {
    (void)m;
    struct thing *stream;
    int status = use(__func__, s, &stream);
    if (!status) stream->capture = ++captures;
    return status;
}
CALL(cuStreamEndCapture, void *s, void **g) {
    struct thing *stream;
    int status = use(__func__, s, &stream);
    if (status) return status;
    stream->capture = 0;
    *g = calls;
    return 0;
}
CALL(cuStreamGetCaptureInfo_v2, void *s, int *status, uint64_t *id, void *a, void *b, void *c) {
    (void)a, (void)b, (void)c;
    struct thing *stream = thing_of(s, 0);
    if (!stream) return wrong(__func__, "on a stream that is not there", INVALID_HANDLE);
    if (implicit(stream)) return CAPTURE_IMPLICIT;
    *status = stream->capture != 0;
    *id = stream->capture;
    return 0;
}
CALL(cuGraphInstantiateWithFlags, void **e, void *g, unsigned long long f) { (void)f; *e = g; return 0; }
CALL(cuGraphLaunch, void *e, void *s) { LOG(); (void)e; return use(__func__, s, NULL); }
CALL(cuGraphExecDestroy, void *e) { LOG(); (void)e; return 0; }
CALL(cuGraphDestroy, void *g) { LOG(); (void)g; return 0; }
CALL(cuEventCreate, void **e, unsigned f) { (void)f; return create(e, 1, 0); }
CALL(cuEventDestroy_v2, void *e) { return destroy(__func__, e, 1); }
CALL(cuEventRecord, void *e, void *s) {
    LOG();
    struct thing *stream, *event = thing_of(e, 1);
    int status = use(__func__, s, &stream);
    if (status) return status;
    if (!event) return wrong(__func__, "of an event that is not there", INVALID_HANDLE);
    event->before = stream->before;
    event->capture = stream->capture;
    return 0;
}
CALL(cuEventSynchronize, void *e) { (void)e; return 0; }
CALL(cuEventElapsedTime, float *t, void *a, void *b) { (void)a; (void)b; *t = 1.5f; return 0; }
/* Events that are there; they must not pile up. */
int fake_events(void) {
    int count = 0;
    for (unsigned i = FIRST; i < made; ++i) count += things[i].event && things[i].alive;
    return count;
}
