/* Masked directions: choosing the entries to keep, and merging the others.
 * Formulas: operators/masked.py and disjoint.py; caller: selection.py.
 *
 * A direction is `term - anchor` in float32 (the term itself without an anchor), and zero where its
 * mask (one byte per entry) is 0. It is never stored: each function forms it block by block.
 */
#include <math.h>
#include <stdlib.h>

#include "common.h"

typedef struct {
    const void *term;
    const void *anchor;  /* NULL: none */
    const uint8_t *mask; /* NULL: nothing is zeroed */
    int32_t type;
    int32_t anchor_type;
} direction_t;

/* Write `n` entries of a direction from `at` into `out`. */
static INLINE void form(const direction_t *d, int64_t at, int64_t n, float *out) {
    float buffer[BLOCK];
    const float *term = widen(d->term, d->type, at, n, out);
    if (d->anchor != NULL) {
        const float *anchor = widen(d->anchor, d->anchor_type, at, n, buffer);
        for (int64_t i = 0; i < n; i++) out[i] = term[i] - anchor[i];
    } else if (term != out) {
        memcpy(out, term, (size_t)n * sizeof(float));
    }
    if (d->mask != NULL)
        for (int64_t i = 0; i < n; i++) out[i] = d->mask[at + i] ? out[i] : 0.0f;
}

/* Magnitudes as integers of the same order: the bits without the sign. */
static INLINE void magnitudes(const direction_t *d, int64_t at, int64_t n, uint32_t *bits) {
    float values[BLOCK];
    form(d, at, n, values);
    memcpy(bits, values, (size_t)n * 4);
    for (int64_t i = 0; i < n; i++) bits[i] &= 0x7fffffff;
}

/* Write a direction, float32. */
EXPORT void gradmerge_direction(float *out, const direction_t *d, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += BLOCK)
        form(d, at, least(BLOCK, end - at), out + at);
}

/* Counts of the upper 16 bits of the magnitudes, 32768 of them. */
EXPORT void gradmerge_count_upper(int64_t *counts, const direction_t *d, int64_t begin,
                                  int64_t end) {
    uint32_t bits[BLOCK];
    /* two tables: neighbours are often equal, and an increment would wait for the previous one */
    int64_t *other = calloc(32768, sizeof(int64_t));
    for (int64_t at = begin; at < end; at += BLOCK) {
        int64_t n = least(BLOCK, end - at), i = 0;
        magnitudes(d, at, n, bits);
        if (other != NULL)
            for (; i + 2 <= n; i += 2) counts[bits[i] >> 16]++, other[bits[i + 1] >> 16]++;
        for (; i < n; i++) counts[bits[i] >> 16]++;
    }
    if (other != NULL)
        for (int i = 0; i < 32768; i++) counts[i] += other[i];
    free(other);
}

/* Counts of the lower 16 bits, 65536 of them, of the magnitudes whose upper bits are `upper`, in
 * one table for each of `num` values. */
EXPORT void gradmerge_count_lower(int64_t *counts, const int32_t *upper, int num, const direction_t *d, int64_t begin, int64_t end) {
    uint32_t bits[BLOCK];
    for (int64_t at = begin; at < end; at += BLOCK) {
        int64_t n = least(BLOCK, end - at);
        magnitudes(d, at, n, bits);
        for (int j = 0; j < num; j++) {
            uint32_t wanted = (uint32_t)upper[j];
            int64_t *own = counts + (int64_t)j * 65536;
            for (int64_t i = 0; i < n; i++)
                if (bits[i] >> 16 == wanted) own[bits[i] & 0xffff]++;
        }
    }
}

/* kept = 1 where a magnitude lies from `low` to `high`, else 0. Of those equal to `low` the first
 * `low_skip` are dropped, of those equal to `high` all but the first `high_take`; equal ones are
 * counted from `low_seen` and `high_seen`. Masked entries stay zero; `kept` may be the mask
 * itself. */
EXPORT void gradmerge_keep_between(uint8_t *kept, int64_t low, int64_t low_skip, int64_t low_seen,
                                   int64_t high, int64_t high_take, int64_t high_seen,
                                   const direction_t *d, int64_t begin,
                                   int64_t end) {
    uint32_t bits[BLOCK];
    uint8_t before[BLOCK];
    for (int64_t at = begin; at < end; at += BLOCK) {
        int64_t n = least(BLOCK, end - at);
        int equals = 0;
        magnitudes(d, at, n, bits);
        if (d->mask != NULL)
            memcpy(before, d->mask + at, (size_t)n);
        else
            memset(before, 1, (size_t)n);
        for (int64_t i = 0; i < n; i++) {
            int32_t b = (int32_t)bits[i];
            kept[at + i] = before[i] & (uint8_t)((b > (int32_t)low) & (b < (int32_t)high));
            equals |= (b == (int32_t)low) | (b == (int32_t)high);
        }
        if (!equals) continue;
        for (int64_t i = 0; i < n; i++) {
            int64_t b = bits[i];
            int keep = b > low && b < high;
            if (b == low) keep = low_seen++ >= low_skip && (b < high || high_seen < high_take);
            if (b == high) {
                int within = high_seen++ < high_take;
                keep = b == low ? keep : within && b > low;
            }
            kept[at + i] = before[i] & (uint8_t)keep;
        }
    }
}

/* Sum of magnitudes. */
EXPORT double gradmerge_sum_magnitudes(const direction_t *d, int64_t begin,
                                       int64_t end) {
    float values[BLOCK];
    double total = 0;
    for (int64_t at = begin; at < end; at += BLOCK) {
        int64_t n = least(BLOCK, end - at);
        form(d, at, n, values);
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += (double)fabsf(values[i]);
        total += sum;
    }
    return total;
}

#define DOUBLES 16 /* independent float64 sums of an inner product */

/* gram[i, j] += sum over the entries of B_i B_j, in float64, [count, count]. Returns 1 if out of
 * memory. */
EXPORT int gradmerge_gram(double *gram, const direction_t *directions, int count, int64_t begin,
                          int64_t end) {
    float *formed = malloc((size_t)count * BLOCK * sizeof(float));
    if (formed == NULL) return 1;
    for (int64_t at = begin; at < end; at += BLOCK) {
        int64_t n = least(BLOCK, end - at), after = least(BLOCK, end - at - n);
        for (int k = 0; k < count; k++) {
            const direction_t *d = directions + k;
            prefetch(d->term, d->type, at + n, after);
            if (k == 0 && d->anchor != NULL) prefetch(d->anchor, d->anchor_type, at + n, after);
            form(d, at, n, formed + (int64_t)k * BLOCK);
        }
        for (int i = 0; i < count; i++)
            for (int j = i; j < count; j++) {
                const float *a = formed + (int64_t)i * BLOCK, *b = formed + (int64_t)j * BLOCK;
                double sums[DOUBLES] = {0}, total = 0;
                int64_t e = 0;
                for (; e + DOUBLES <= n; e += DOUBLES)
                    for (int l = 0; l < DOUBLES; l++)
                        sums[l] += (double)a[e + l] * (double)b[e + l];
                for (int l = 0; l < DOUBLES; l++) total += sums[l];
                for (; e < n; e++) total += (double)a[e] * (double)b[e];
                gram[(int64_t)i * count + j] += total;
                if (i != j) gram[(int64_t)j * count + i] += total;
            }
    }
    free(formed);
    return 0;
}

/* kept = draw < density for `n` draws, and-ed with its previous value unless fresh. */
EXPORT void gradmerge_keep_below(uint8_t *kept, const float *draws, float density, int fresh,
                                 int64_t n) {
    if (fresh)
        for (int64_t i = 0; i < n; i++) kept[i] = (uint8_t)(draws[i] < density);
    else
        for (int64_t i = 0; i < n; i++) kept[i] &= (uint8_t)(draws[i] < density);
}

/* kept = draw < low + slope * rank for `n` draws, and-ed with its previous value unless fresh. */
EXPORT void gradmerge_keep_ranked(uint8_t *kept, const int32_t *ranks, const float *draws,
                                  float low, float slope, int fresh, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint8_t keep = (uint8_t)(draws[i] < (float)ranks[i] * slope + low);
        kept[i] = fresh ? keep : kept[i] & keep;
    }
}

/* Rules for merging directions. */
enum { SUM, ELECT_BY_SUM, ELECT_BY_COUNT };

/* out = origin + sum_k w_k (.) B_k, or with an election the disjoint mean (operators/disjoint.py).
 *
 * weights: [count, width], with neighbours of `inner` entries sharing one (see merging.c); factors:
 * [count], multiplied to each direction before its weight. An election divides by the sum of the
 * agreeing weights with `normalise`, and multiplies by `scale`. Returns 1 if out of memory.
 */
EXPORT int gradmerge_merge_directions(void *out, int out_type, const void *origin, int origin_type,
                                      const direction_t *directions, int count,
                                      const float *factors, const float *weights, int64_t width,
                                      int64_t inner, const int64_t *parts, int rule, int normalise,
                                      float scale, int64_t begin, int64_t end) {
    float total[BLOCK], base[BLOCK], votes[BLOCK], divisor[BLOCK], one[BLOCK];
    float *weighted = malloc((size_t)count * BLOCK * sizeof(float));
    if (weighted == NULL) return 1;
    for (int64_t at = begin; at < end;) {
        int own = inner == 1 && width > 1; /* each entry has its own weight */
        int64_t column = parts != NULL ? 0 : at / inner % width;
        int64_t left = parts != NULL ? end - at : own ? width - column : inner - at % inner;
        int64_t n = least(least(left, BLOCK), end - at);
        const float *anchor = NULL;
        if (origin != NULL) anchor = widen(origin, origin_type, at, n, base);
        for (int64_t i = 0; i < n; i++) total[i] = votes[i] = divisor[i] = 0;
        for (int k = 0; k < count; k++) {
            float *d = weighted + (int64_t)k * BLOCK;
            form(directions + k, at, n, d);
            float factor = factors[k];
            if (factor != 1.0f)
                for (int64_t i = 0; i < n; i++) d[i] *= factor;
            const float *w = weights + (int64_t)k * width;
            if (parts != NULL) {
                for (int64_t i = 0; i < n; i++) one[i] = w[parts[at + i]];
                w = one;
            } else if (own) {
                w += column;
            }
            if (own || parts != NULL)
                for (int64_t i = 0; i < n; i++) d[i] *= w[i];
            else
                for (int64_t i = 0; i < n; i++) d[i] *= w[column];
            if (rule == ELECT_BY_COUNT)
                for (int64_t i = 0; i < n; i++) votes[i] += (float)((d[i] > 0) - (d[i] < 0));
            else
                for (int64_t i = 0; i < n; i++) votes[i] += d[i];
        }
        if (rule == SUM) {
            for (int64_t i = 0; i < n; i++) total[i] = votes[i];
        } else {
            for (int k = 0; k < count; k++) {
                const float *d = weighted + (int64_t)k * BLOCK;
                const float *w = weights + (int64_t)k * width;
                for (int64_t i = 0; i < n; i++) {
                    int agrees = votes[i] >= 0 ? d[i] > 0 : d[i] < 0;
                    agrees |= d[i] != d[i]; /* NaN must propagate */
                    float weight = parts != NULL ? w[parts[at + i]] : own ? w[column + i] : w[column];
                    total[i] += agrees ? d[i] : 0.0f;
                    divisor[i] += agrees ? weight : 0.0f;
                }
            }
            if (normalise)
                for (int64_t i = 0; i < n; i++)
                    total[i] /= divisor[i] == 0.0f ? 1.0f : divisor[i];
            if (scale != 1.0f)
                for (int64_t i = 0; i < n; i++) total[i] *= scale;
        }
        if (anchor != NULL)
            for (int64_t i = 0; i < n; i++) total[i] = anchor[i] + total[i];
        if (out_type == FLOAT32)
            memcpy((float *)out + at, total, (size_t)n * sizeof(float));
        else
            narrow(out, out_type, at, n, total);
        at += n;
    }
    free(weighted);
    return 0;
}

/* Rank of each entry by magnitude in its row of `size`, 0 for the smallest, equal ones in order: a
 * radix sort. scratch: 2 * size numbers. */
EXPORT void gradmerge_row_ranks(int32_t *ranks, uint64_t *scratch, int64_t rows, int64_t size,
                                const direction_t *d, int64_t first_row) {
    uint32_t bits[BLOCK];
    uint64_t *from = scratch, *to = scratch + size;
    for (int64_t row = 0; row < rows; row++) {
        int64_t start = (first_row + row) * size;
        int64_t counts[3][2048] = {{0}};
        for (int64_t at = 0; at < size; at += BLOCK) {
            int64_t n = least(BLOCK, size - at);
            magnitudes(d, start + at, n, bits);
            for (int64_t i = 0; i < n; i++) {
                uint32_t b = bits[i];
                from[at + i] = (uint64_t)b << 32 | (uint64_t)(at + i);
                counts[0][b & 2047]++, counts[1][b >> 11 & 2047]++, counts[2][b >> 22]++;
            }
        }
        for (int pass = 0; pass < 3; pass++) {
            int64_t sum = 0;
            for (int i = 0; i < 2048; i++) {
                int64_t own = counts[pass][i];
                counts[pass][i] = sum;
                sum += own;
            }
            for (int64_t i = 0; i < size; i++) {
                uint32_t b = (uint32_t)(from[i] >> 32) >> (11 * pass);
                to[counts[pass][b & 2047]++] = from[i];
            }
            uint64_t *swap = from;
            from = to;
            to = swap;
        }
        for (int64_t i = 0; i < size; i++) ranks[row * size + (int64_t)(uint32_t)from[i]] = (int32_t)i;
    }
}
