/* Merging and contracting frozen tensors on a CPU. Formulas: linear.py; caller: kernels.py.
 *
 * A tensor is seen as [outer, width, inner] with weights along `width`; entry e of the flat tensor
 * has weight e / inner % width, or parts[e]. Both functions work on entries [begin, end), so that
 * threads share a tensor. They work block by block: each stored byte is read from memory once, and
 * temporaries stay in the core's first-level cache. 16-bit numbers are
 * widened one block at a time; sums are float32 over at most 512 / 64 entries, and float64 beyond.
 */
#include "common.h"

#define LANES 64  /* independent float32 sums of an inner product */

/* Weights as given, or one coefficient per entry and source, from which weights follow by origin. */
enum { GIVEN, FROM_ZERO, FROM_BASE, FROM_MEAN, FROM_DIRECTIONS };

EXPORT int gradmerge_has_float16(void) {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}

/* Weights of term `s` for `n` entries from `column`, where each entry has its own. `rest` is the
 * weight of the origin: 1 - sum of the entry's coefficients, or 1 where the terms are directions. */
static const float *entry_weights(const float *weights, int rule, int s, int sources, int64_t width,
                                  int64_t column, const int64_t *parts, int64_t n,
                                  const float *rest, float *buffer) {
    int has_origin = rule == FROM_BASE || rule == FROM_DIRECTIONS;
    if (has_origin && s == 0) return rest;
    const float *own = weights + (has_origin ? s - 1 : s) * width;
    if (parts != NULL) {
        for (int64_t i = 0; i < n; i++) buffer[i] = own[parts[i]];
        return buffer;
    }
    if (rule != FROM_MEAN) return own + column;
    for (int64_t i = 0; i < n; i++) buffer[i] = own[column + i] + rest[i] / (float)sources;
    return buffer;
}

static INLINE void add_scaled_as(float *total, const void *term, int type, int64_t n, float w,
                                 int first) {
    if (first)
        for (int64_t i = 0; i < n; i++) total[i] = w * load(term, type, i);
    else
        for (int64_t i = 0; i < n; i++) total[i] += w * load(term, type, i);
}

/* total += w * term; the first term sets it. */
static void add_scaled(float *total, const void *term, int type, int64_t start, int64_t n, float w,
                       int first) {
    const void *data = from_entry(term, type, start);
    if (type == FLOAT32)
        add_scaled_as(total, data, FLOAT32, n, w, first);
    else if (type == BFLOAT16)
        add_scaled_as(total, data, BFLOAT16, n, w, first);
    else
        add_scaled_as(total, data, FLOAT16, n, w, first);
}

/* out = sum_s weight_s * term_s, over entries [begin, end).
 *
 * weights: [count, width] with rule GIVEN; else coefficients [sources, width] with one column per
 * entry, where FROM_BASE and FROM_DIRECTIONS mean that term 0 is the origin, without coefficient.
 */
EXPORT void gradmerge_merge(void *out, int out_type, const void *const *terms, const int *types,
                            int count, const float *weights, int rule, int64_t width,
                            int64_t inner, const int64_t *parts, int64_t begin, int64_t end) {
    float term_buffer[BLOCK], weight_buffer[BLOCK], rest[BLOCK], narrow_buffer[BLOCK];
    int sources = rule == FROM_BASE || rule == FROM_DIRECTIONS ? count - 1 : count;
    for (int64_t at = begin; at < end;) {
        int own = inner == 1 && width > 1; /* each entry has its own weight */
        int64_t column = parts != NULL ? 0 : at / inner % width;
        int64_t left = parts != NULL ? end - at : own ? width - column : inner - at % inner;
        int64_t n = least(least(left, BLOCK), end - at);
        float *total = out_type == FLOAT32 ? (float *)out + at : narrow_buffer;
        if (rule == FROM_DIRECTIONS)
            for (int64_t i = 0; i < n; i++) rest[i] = 1;
        if (rule == FROM_BASE || rule == FROM_MEAN) {
            for (int64_t i = 0; i < n; i++) rest[i] = 1;
            for (int k = 0; k < sources; k++)
                for (int64_t i = 0; i < n; i++) rest[i] -= weights[k * width + column + i];
        }
        int64_t after = least(n, end - at - n);
        for (int s = 0; s < count; s++) {
            if (s + 1 < count)
                prefetch(terms[s + 1], types[s + 1], at, n);
            else
                prefetch(terms[0], types[0], at + n, after);
            if (!own && parts == NULL) {
                float w = weights[s * width + column];
                add_scaled(total, terms[s], types[s], at, n, w, s == 0);
                continue;
            }
            const float *term = widen(terms[s], types[s], at, n, term_buffer);
            const int64_t *part = parts == NULL ? NULL : parts + at;
            const float *w = entry_weights(weights, rule, s, sources, width, column, part, n, rest,
                                           weight_buffer);
            if (s == 0)
                for (int64_t i = 0; i < n; i++) total[i] = w[i] * term[i];
            else
                for (int64_t i = 0; i < n; i++) total[i] += w[i] * term[i];
        }
        if (out_type != FLOAT32) narrow(out, out_type, at, n, total);
        at += n;
    }
}

static INLINE double inner_product_as(const float *grad, const void *term, int type,
                                      const float *from, const float *shift, int64_t n) {
    float lanes[LANES] = {0};
    double total = 0;
    int64_t i = 0;
#define DIRECTION(e) \
    (load(term, type, e) - (from == NULL ? 0 : from[e]) - (shift == NULL ? 0 : shift[e]))
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) lanes[j] += grad[i + j] * DIRECTION(i + j);
    for (int j = 0; j < LANES; j++) total += lanes[j];
    for (; i < n; i++) total += (double)(grad[i] * DIRECTION(i));
#undef DIRECTION
    return total;
}

static INLINE double inner_product_for(const float *grad, const void *term, int type,
                                       const float *from, const float *shift, int64_t n) {
    if (from == NULL) return inner_product_as(grad, term, type, NULL, NULL, n);
    if (shift == NULL) return inner_product_as(grad, term, type, from, NULL, n);
    return inner_product_as(grad, term, type, from, shift, n);
}

/* <grad, (term - from) - shift>; `from` and `shift` may be NULL. */
static double inner_product(const float *grad, const void *term, int type, int64_t start,
                            const float *from, const float *shift, int64_t n) {
    const void *data = from_entry(term, type, start);
    if (type == FLOAT32) return inner_product_for(grad, data, FLOAT32, from, shift, n);
    if (type == BFLOAT16) return inner_product_for(grad, data, BFLOAT16, from, shift, n);
    return inner_product_for(grad, data, FLOAT16, from, shift, n);
}

/* Mean over the terms of term - from: the differences of similar terms lose no digits. */
static void mean_difference(float *mean, const void *const *terms, const int *types, int count,
                            const float *from, int64_t at, int64_t n) {
    float buffer[BLOCK];
    for (int64_t i = 0; i < n; i++) mean[i] = 0;
    for (int k = 0; k < count; k++) {
        const float *term = widen(terms[k], types[k], at, n, buffer);
        for (int64_t i = 0; i < n; i++) mean[i] += term[i] - from[i];
    }
    for (int64_t i = 0; i < n; i++) mean[i] /= (float)count;
}

/* sums[k, w] += sum over the entries of w of grad * (term_k - anchor), over entries [begin, end).
 *
 * anchor: the origin's tensor; NULL: zero, or with `mean` the mean of the terms.
 * sums: float64 [count, width]. With `products` the sums have one entry each: the product itself is
 * written there, float32 [count, width], and `sums` is not used.
 */
EXPORT void gradmerge_contract(double *sums, float *products, const void *grad, int grad_type,
                               const void *anchor, int anchor_type, int mean,
                               const void *const *terms, const int *types, int count,
                               int64_t width, int64_t inner, const int64_t *parts, int64_t begin,
                               int64_t end) {
    float grad_buffer[BLOCK], anchor_buffer[BLOCK], term_buffer[BLOCK], direction[BLOCK];
    float shift_buffer[BLOCK], product[BLOCK];
    for (int64_t at = begin; at < end;) {
        int own = inner == 1 && width > 1;
        int64_t column = parts != NULL ? 0 : at / inner % width;
        int64_t left = parts != NULL ? end - at : own ? width - column : inner - at % inner;
        int64_t n = least(least(left, BLOCK), end - at);
        const float *g = widen(grad, grad_type, at, n, grad_buffer);
        const float *from = NULL, *shift = NULL;
        if (anchor != NULL) from = widen(anchor, anchor_type, at, n, anchor_buffer);
        if (anchor == NULL && mean) {
            from = widen(terms[0], types[0], at, n, anchor_buffer);
            mean_difference(shift_buffer, terms, types, count, from, at, n);
            shift = shift_buffer;
        }
        int64_t after = least(n, end - at - n);
        prefetch(grad, grad_type, at + n, after);
        if (anchor != NULL) prefetch(anchor, anchor_type, at + n, after);
        for (int k = 0; k < count; k++) {
            if (k + 1 < count)
                prefetch(terms[k + 1], types[k + 1], at, n);
            else
                prefetch(terms[0], types[0], at + n, after);
            if (!own && parts == NULL && products == NULL) {
                sums[k * width + column] +=
                    inner_product(g, terms[k], types[k], at, from, shift, n);
                continue;
            }
            const float *b = widen(terms[k], types[k], at, n, term_buffer);
            if (from != NULL) {
                for (int64_t i = 0; i < n; i++) direction[i] = b[i] - from[i];
                b = direction;
            }
            if (shift != NULL)
                for (int64_t i = 0; i < n; i++) direction[i] -= shift[i];
            float *p = products != NULL ? products + k * width + at : product;
            for (int64_t i = 0; i < n; i++) p[i] = g[i] * b[i];
            if (products != NULL) continue;
            double *sum = sums + k * width;
            if (parts != NULL)
                for (int64_t i = 0; i < n; i++) sum[parts[at + i]] += p[i];
            else
                for (int64_t i = 0; i < n; i++) sum[column + i] += p[i];
        }
        at += n;
    }
}
