/* Whether all numbers are finite: those that are not have all bits of the exponent set. */
#include "common.h"

/* A loop without branches, which is vectorised. */
#define ALL_FINITE(type)                                                                           \
    do {                                                                                           \
        const type *words = (const type *)data;                                                    \
        type bits = (type)mask, found = 0;                                                         \
        for (int64_t i = 0; i < n; i++) found |= (type)((words[i] & bits) == bits);                \
        return found == 0;                                                                         \
    } while (0)

/* data: `n` words of `width` bytes; mask: the bits that are all set in NaN and infinity. */
EXPORT int gradmerge_finite(const void *data, int64_t n, int width, uint64_t mask) {
    switch (width) {
        case 1: ALL_FINITE(uint8_t);
        case 2: ALL_FINITE(uint16_t);
        case 4: ALL_FINITE(uint32_t);
        default: ALL_FINITE(uint64_t);
    }
}
