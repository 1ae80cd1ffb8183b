/* Numbers of three types as float32, one block at a time. */
#ifndef GRADMERGE_COMMON_H
#define GRADMERGE_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#ifdef __GNUC__
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

#define BLOCK 512 /* entries */

enum { FLOAT32, BFLOAT16, FLOAT16 };

static INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Entry `i` as float32. Inlined where `type` is a constant, so loops over it are vectorised. */
static INLINE float load(const void *data, int type, int64_t i) {
    if (type == BFLOAT16) {
        uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
#ifdef __FLT16_MAX__
    if (type == FLOAT16) return (float)((const _Float16 *)data)[i];
#endif
    return ((const float *)data)[i];
}

static INLINE const void *from_entry(const void *data, int type, int64_t start) {
    return (const char *)data + start * (type == FLOAT32 ? 4 : 2);
}

/* Prefetch the next `n` entries, which hides the latency of new pages. */
static INLINE void prefetch(const void *data, int type, int64_t start, int64_t n) {
#ifdef __GNUC__
    const char *first = from_entry(data, type, start);
    const char *end = from_entry(data, type, start + n);
    for (; first < end; first += 64) __builtin_prefetch(first);
#else
    (void)data, (void)type, (void)start, (void)n;
#endif
}

static INLINE void widen_as(const void *data, int type, int64_t n, float *buffer) {
    for (int64_t i = 0; i < n; i++) buffer[i] = load(data, type, i);
}

/* Return `n` entries from `start` as float32: in place, or widened into `buffer`. */
static INLINE const float *widen(const void *data, int type, int64_t start, int64_t n, float *buffer) {
    const void *first = from_entry(data, type, start);
    if (type == FLOAT32) return (const float *)first;
    if (type == BFLOAT16)
        widen_as(first, BFLOAT16, n, buffer);
    else
        widen_as(first, FLOAT16, n, buffer);
    return buffer;
}

/* Rounds to nearest, ties to even, as torch does. */
static INLINE void narrow(void *out, int type, int64_t start, int64_t n, const float *values) {
    if (type == BFLOAT16) {
        uint16_t *halves = (uint16_t *)out + start;
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, values + i, 4);
            uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
            halves[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
        }
    }
#ifdef __FLT16_MAX__
    if (type == FLOAT16) {
        _Float16 *halves = (_Float16 *)out + start;
        for (int64_t i = 0; i < n; i++) halves[i] = (_Float16)values[i];
    }
#endif
}

#endif
