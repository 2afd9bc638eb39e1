/* The loops over every byte of a checkpoint, for hosts that have a C compiler when the package is built.
 *
 * Each function here does exactly what its NumPy or torch counterpart does, bit for bit, in one pass over memory
 * instead of several; whoever calls it has the slow way too. No allocation, no state, no Python: callers pass memory
 * they own, and may run other threads meanwhile. Words are little-endian, as the host must be.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "little-endian hosts only"
#endif

/* One version for each of these instruction sets; the dynamic linker picks the host's. Not every compiler can. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && !defined(PLAIN)
#define VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define VECTORIZED
#endif
#define INLINE static inline __attribute__((always_inline))

/* Changes whenever a function's arguments or its meaning do; the loader refuses any other. */
#define ABI 2

int ckptstore_abi(void) { return ABI; }

/* --- copying ------------------------------------------------------------------------------------------------------ */

/* From here on a copy goes past the caches: what it would have read into them first is overwritten anyway. */
#define STREAMED (32 << 10)

static void stream(unsigned char *target, const unsigned char *source, size_t size) {
#if defined(__x86_64__)
    size_t head = (size_t)(-(uintptr_t)target & 63);
    memcpy(target, source, head);
    target += head, source += head, size -= head;
    size_t whole = size & ~(size_t)63;
    for (size_t i = 0; i < whole; i += 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)(source + i));
        __m128i b = _mm_loadu_si128((const __m128i *)(source + i + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(source + i + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(source + i + 48));
        _mm_stream_si128((__m128i *)(target + i), a);
        _mm_stream_si128((__m128i *)(target + i + 16), b);
        _mm_stream_si128((__m128i *)(target + i + 32), c);
        _mm_stream_si128((__m128i *)(target + i + 48), d);
    }
    memcpy(target + whole, source + whole, size - whole);
#else
    memcpy(target, source, size);
#endif
}

/* Copies sizes[i] bytes from sources[i] to targets[i]; nothing overlaps. */
void ckptstore_copy(size_t count, void *const *targets, const void *const *sources, const size_t *sizes) {
    for (size_t i = 0; i < count; i++) {
        if (sizes[i] < STREAMED)
            memcpy(targets[i], sources[i], sizes[i]);
        else
            stream(targets[i], sources[i], sizes[i]);
    }
#if defined(__x86_64__)
    _mm_sfence(); /* streamed stores are ordered with nothing else */
#endif
}

/* --- planes: words into planes of equal significance and back ----------------------------------------------------- */

#define BLOCK 2048 /* words treated at once: they and their map stay in the first cache */

#define DEFINE_WORD(BITS)                                                                                              \
    typedef uint##BITS##_t u##BITS __attribute__((aligned(1), may_alias)); /* chunks begin anywhere */                \
    /* Integers in the order of the numbers; an involution. */                                                         \
    INLINE u##BITS ordered##BITS(u##BITS x) {                                                                          \
        return x ^ (u##BITS)((u##BITS)((int##BITS##_t)x >> (BITS - 1)) >> 1);                                          \
    }                                                                                                                  \
    INLINE u##BITS difference##BITS(u##BITS x, u##BITS base) {                                                         \
        u##BITS d = (u##BITS)(ordered##BITS(x) - ordered##BITS(base));                                                 \
        return (u##BITS)((u##BITS)(d << 1) ^ (u##BITS)((int##BITS##_t)d >> (BITS - 1)));                               \
    }                                                                                                                  \
    INLINE u##BITS undifference##BITS(u##BITS z, u##BITS base) {                                                       \
        u##BITS d = (u##BITS)((u##BITS)(z >> 1) ^ (u##BITS)(0 - (z & 1)));                                             \
        return ordered##BITS((u##BITS)(d + ordered##BITS(base)));                                                      \
    }
DEFINE_WORD(8)
DEFINE_WORD(16)
DEFINE_WORD(32)
DEFINE_WORD(64)

/* The head of a word, its top two bytes at most, rotated by a bit: the sign goes to the low end. */
INLINE u8 rotate8(u8 x) { return (u8)((x << 1) | (x >> 7)); }
INLINE u16 rotate16(u16 x) { return (u16)((x << 1) | (x >> 15)); }
INLINE u32 rotate32(u32 x) { return (x & 0xFFFFu) | ((x << 1) & 0xFFFE0000u) | ((x >> 15) & 0x10000u); }
INLINE u64 rotate64(u64 x) {
    return (x & 0xFFFFFFFFFFFFu) | ((x << 1) & 0xFFFE000000000000u) | ((x >> 15) & 0x1000000000000u);
}
INLINE u8 unrotate8(u8 x) { return (u8)((x >> 1) | (x << 7)); }
INLINE u16 unrotate16(u16 x) { return (u16)((x >> 1) | (x << 15)); }
INLINE u32 unrotate32(u32 x) { return (x & 0xFFFFu) | ((x >> 1) & 0x7FFF0000u) | ((x << 15) & 0x80000000u); }
INLINE u64 unrotate64(u64 x) {
    return (x & 0xFFFFFFFFFFFFu) | ((x >> 1) & 0x7FFF000000000000u) | ((x << 15) & 0x8000000000000000u);
}

#define TAKE(BITS, SIZE)                                                                                               \
    case SIZE / 8: {                                                                                                   \
        u##SIZE *plane = (u##SIZE *)planes[p] + start;                                                                 \
        for (size_t i = 0; i < length; i++) plane[i] = (u##SIZE)(mapped[i] >> shift);                                  \
        break;                                                                                                         \
    }
#define PUT(BITS, SIZE)                                                                                                \
    case SIZE / 8: {                                                                                                   \
        const u##SIZE *plane = (const u##SIZE *)planes[p] + start;                                                     \
        if (shift == 0)                                                                                                \
            for (size_t i = 0; i < length; i++) mapped[i] = plane[i];                                                  \
        else                                                                                                           \
            for (size_t i = 0; i < length; i++) mapped[i] |= (u##BITS)((u##BITS)plane[i] << shift);                    \
        break;                                                                                                         \
    }

#define DEFINE_PLANES(BITS, TAKE_ALL, PUT_ALL)                                                                         \
    VECTORIZED static void split##BITS(                                                                                \
        const u##BITS *numbers, const u##BITS *old, size_t count, size_t num_planes, const uint8_t *sizes,             \
        void *const *planes) {                                                                                         \
        u##BITS mapped[BLOCK];                                                                                         \
        for (size_t start = 0; start < count; start += BLOCK) {                                                        \
            size_t length = count - start < BLOCK ? count - start : BLOCK;                                             \
            const u##BITS *x = numbers + start;                                                                        \
            if (old)                                                                                                   \
                for (size_t i = 0; i < length; i++) mapped[i] = difference##BITS(x[i], old[start + i]);                \
            else                                                                                                       \
                for (size_t i = 0; i < length; i++) mapped[i] = rotate##BITS(x[i]);                                    \
            unsigned shift = 0;                                                                                        \
            for (size_t p = 0; p < num_planes; shift += 8u * sizes[p], p++)                                            \
                switch (sizes[p]) { TAKE_ALL }                                                                         \
        }                                                                                                              \
    }                                                                                                                  \
    VECTORIZED static void join##BITS(                                                                                 \
        u##BITS *out, const u##BITS *old, int rotated, size_t count, size_t num_planes, const uint8_t *sizes,          \
        void *const *planes) {                                                                                         \
        u##BITS mapped[BLOCK];                                                                                         \
        for (size_t start = 0; start < count; start += BLOCK) {                                                        \
            size_t length = count - start < BLOCK ? count - start : BLOCK;                                             \
            u##BITS *x = out + start;                                                                                  \
            unsigned shift = 0;                                                                                        \
            for (size_t p = 0; p < num_planes; shift += 8u * sizes[p], p++)                                            \
                switch (sizes[p]) { PUT_ALL }                                                                          \
            if (old)                                                                                                   \
                for (size_t i = 0; i < length; i++) x[i] = undifference##BITS(mapped[i], old[start + i]);              \
            else if (rotated)                                                                                          \
                for (size_t i = 0; i < length; i++) x[i] = unrotate##BITS(mapped[i]);                                  \
            else                                                                                                       \
                memcpy(x, mapped, length * sizeof *x);                                                                 \
        }                                                                                                              \
    }

DEFINE_PLANES(8, TAKE(8, 8), PUT(8, 8))
DEFINE_PLANES(64, TAKE(64, 8) TAKE(64, 16) TAKE(64, 32) TAKE(64, 64), PUT(64, 8) PUT(64, 16) PUT(64, 32) PUT(64, 64))

/* Words of two and four bytes, which most are, in one pass: half as long. A plane is at most a half of four bytes, as
 * head and rest share none, so that few layouts are possible; `apart` is constant wherever these are called. */

INLINE void split_one(const u16 *numbers, const u16 *old, size_t count, void *const *planes, int apart) {
    u16 *whole = planes[0];
    u8 *low = planes[0], *high = planes[apart];
#pragma GCC ivdep
    for (size_t i = 0; i < count; i++) {
        u16 x = old ? difference16(numbers[i], old[i]) : rotate16(numbers[i]);
        if (apart)
            low[i] = (u8)x, high[i] = (u8)(x >> 8);
        else
            whole[i] = x;
    }
}

INLINE void split_two(
    const u32 *numbers, const u32 *old, size_t count, void *const *planes, int rest_apart, int head_apart) {
    void *const *above = planes + 1 + rest_apart;
    u16 *rest = planes[0], *head = above[0];
    u8 *rest_low = planes[0], *rest_high = planes[rest_apart], *head_low = above[0], *head_high = above[head_apart];
#pragma GCC ivdep
    for (size_t i = 0; i < count; i++) {
        u32 x = old ? difference32(numbers[i], old[i]) : rotate32(numbers[i]);
        if (rest_apart)
            rest_low[i] = (u8)x, rest_high[i] = (u8)(x >> 8);
        else
            rest[i] = (u16)x;
        if (head_apart)
            head_low[i] = (u8)(x >> 16), head_high[i] = (u8)(x >> 24);
        else
            head[i] = (u16)(x >> 16);
    }
}

INLINE void join_one(u16 *out, const u16 *old, int rotated, size_t count, void *const *planes, int apart) {
    const u16 *whole = planes[0];
    const u8 *low = planes[0], *high = planes[apart];
#pragma GCC ivdep
    for (size_t i = 0; i < count; i++) {
        u16 x = apart ? (u16)(low[i] | high[i] << 8) : whole[i];
        out[i] = old ? undifference16(x, old[i]) : rotated ? unrotate16(x) : x;
    }
}

INLINE void join_two(
    u32 *out, const u32 *old, int rotated, size_t count, void *const *planes, int rest_apart, int head_apart) {
    void *const *above = planes + 1 + rest_apart;
    const u16 *rest = planes[0], *head = above[0];
    const u8 *rest_low = planes[0], *rest_high = planes[rest_apart];
    const u8 *head_low = above[0], *head_high = above[head_apart];
#pragma GCC ivdep
    for (size_t i = 0; i < count; i++) {
        u32 x = rest_apart ? (u32)(rest_low[i] | rest_high[i] << 8) : rest[i];
        x |= (head_apart ? (u32)(head_low[i] | head_high[i] << 8) : (u32)head[i]) << 16;
        out[i] = old ? undifference32(x, old[i]) : rotated ? unrotate32(x) : x;
    }
}

/* Calls F with each possible layout as a constant. */
#define BY_LAYOUT16(F, ...)                                                                                            \
    if (num_planes == 1)                                                                                               \
        F(__VA_ARGS__, 0);                                                                                             \
    else                                                                                                               \
        F(__VA_ARGS__, 1);
#define BY_LAYOUT32(F, ...)                                                                                            \
    if (num_planes == 2)                                                                                               \
        F(__VA_ARGS__, 0, 0);                                                                                          \
    else if (num_planes == 4)                                                                                          \
        F(__VA_ARGS__, 1, 1);                                                                                          \
    else if (sizes[0] == 1)                                                                                            \
        F(__VA_ARGS__, 1, 0);                                                                                          \
    else                                                                                                               \
        F(__VA_ARGS__, 0, 1);

#define DEFINE_HALVES(BITS, SPLIT, JOIN)                                                                               \
    VECTORIZED static void split##BITS(                                                                                \
        const u##BITS *numbers, const u##BITS *old, size_t count, size_t num_planes, const uint8_t *sizes,             \
        void *const *planes) {                                                                                         \
        (void)sizes;                                                                                                   \
        if (old) {                                                                                                     \
            BY_LAYOUT##BITS(SPLIT, numbers, old, count, planes)                                                        \
        } else {                                                                                                       \
            BY_LAYOUT##BITS(SPLIT, numbers, NULL, count, planes)                                                       \
        }                                                                                                              \
    }                                                                                                                  \
    VECTORIZED static void join##BITS(                                                                                 \
        u##BITS *out, const u##BITS *old, int rotated, size_t count, size_t num_planes, const uint8_t *sizes,          \
        void *const *planes) {                                                                                         \
        (void)sizes;                                                                                                   \
        if (old) {                                                                                                     \
            BY_LAYOUT##BITS(JOIN, out, old, 0, count, planes)                                                          \
        } else if (rotated) {                                                                                          \
            BY_LAYOUT##BITS(JOIN, out, NULL, 1, count, planes)                                                         \
        } else {                                                                                                       \
            BY_LAYOUT##BITS(JOIN, out, NULL, 0, count, planes)                                                         \
        }                                                                                                              \
    }
DEFINE_HALVES(16, split_one, join_one)
DEFINE_HALVES(32, split_two, join_two)

#define BY_WIDTH(WIDTH, CALL)                                                                                          \
    switch (WIDTH) {                                                                                                   \
    case 1: CALL(8) break;                                                                                             \
    case 2: CALL(16) break;                                                                                            \
    case 4: CALL(32) break;                                                                                            \
    case 8: CALL(64) break;                                                                                            \
    }

/* Words of `width` bytes, mapped against `old` or rotated where that is null, into planes of sizes[p] bytes each,
 * least significant first. */
void ckptstore_split(
    const void *numbers, const void *old, size_t count, int width, size_t num_planes, const uint8_t *sizes,
    void *const *planes) {
#define CALL(BITS) split##BITS(numbers, old, count, num_planes, sizes, planes);
    BY_WIDTH(width, CALL)
#undef CALL
}

/* Undo that. `old` may be what `out` holds. */
void ckptstore_join(
    void *out, const void *old, int rotated, size_t count, int width, size_t num_planes, const uint8_t *sizes,
    void *const *planes) {
#define CALL(BITS) join##BITS(out, old, rotated, count, num_planes, sizes, planes);
    BY_WIDTH(width, CALL)
#undef CALL
}

/* --- planes: what a sample of them is like ------------------------------------------------------------------------- */

#define DEFINE_SAMPLE(BITS)                                                                                            \
    INLINE u##BITS mapped##BITS(const u##BITS *numbers, const u##BITS *old, int64_t at) {                              \
        return old ? difference##BITS(numbers[at], old[at]) : rotate##BITS(numbers[at]);                               \
    }                                                                                                                  \
    static void histograms##BITS(                                                                                      \
        const u##BITS *numbers, const u##BITS *old, const int64_t *at, size_t count, int64_t (*counts)[256]) {         \
        for (size_t i = 0; i < count; i++) {                                                                           \
            u##BITS x = mapped##BITS(numbers, old, at[i]);                                                             \
            for (size_t p = 0; p < BITS / 8; p++) counts[p][(uint8_t)(x >> (8 * p))]++;                                \
        }                                                                                                              \
    }                                                                                                                  \
    static void steps##BITS(                                                                                           \
        const u##BITS *numbers, const u##BITS *old, const int64_t *at, size_t count, int64_t lag, int64_t *counts) {   \
        for (size_t i = 0; i < count; i++) {                                                                           \
            u##BITS x = mapped##BITS(numbers, old, at[i]), before = mapped##BITS(numbers, old, at[i] - lag);           \
            counts[(uint8_t)((x >> (BITS - 8)) - (before >> (BITS - 8)))]++;                                           \
        }                                                                                                              \
    }
DEFINE_SAMPLE(8)
DEFINE_SAMPLE(16)
DEFINE_SAMPLE(32)
DEFINE_SAMPLE(64)

/* Adds to counts[p][v] how many of the words there, mapped as in ckptstore_split, have the value v as byte p. */
void ckptstore_histograms(
    const void *numbers, const void *old, int width, const int64_t *at, size_t count, int64_t (*counts)[256]) {
#define CALL(BITS) histograms##BITS(numbers, old, at, count, counts);
    BY_WIDTH(width, CALL)
#undef CALL
}

/* Adds to counts[v] how many of the words there have a top byte that is v more than that of the word `lag` before. */
void ckptstore_steps(
    const void *numbers, const void *old, int width, const int64_t *at, size_t count, int64_t lag, int64_t *counts) {
#define CALL(BITS) steps##BITS(numbers, old, at, count, lag, counts);
    BY_WIDTH(width, CALL)
#undef CALL
}

/* --- planes: narrow ----------------------------------------------------------------------------------------------- */

INLINE uint64_t load64(const uint8_t *from) {
    uint64_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

/* One bit for each of 8 bytes that are 0 or 1, the first the lowest. */
INLINE uint64_t bits_of(const uint8_t *bytes) { return (load64(bytes) * 0x0102040810204080u) >> 56; }

/* One bit for each of 64 bytes that are `value`. */
INLINE uint64_t where64(const uint8_t *bytes, uint8_t value) {
    uint64_t mask = 0;
#if defined(__x86_64__)
    for (size_t i = 0; i < 64; i += 16) {
        __m128i is_there = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(bytes + i)), _mm_set1_epi8((char)value));
        mask |= (uint64_t)(unsigned)_mm_movemask_epi8(is_there) << i;
    }
#else
    uint8_t is_there[64];
    for (size_t i = 0; i < 64; i++) is_there[i] = bytes[i] == value;
    for (size_t i = 0; i < 8; i++) mask |= bits_of(is_there + 8 * i) << (8 * i);
#endif
    return mask;
}

/* Each byte, less `bias`, cut to 4, 2 or 1 `bits` and packed, the first in the lowest; of those that don't fit, what is
 * beyond goes to `misfits`, with room for `count`. Returns how many those are. */
VECTORIZED size_t ckptstore_narrow(
    const uint8_t *octets, size_t count, int bits, int bias, uint8_t *packed, uint8_t *misfits) {
    const uint8_t escape = (uint8_t)((1 << bits) - 1);
    const size_t share = 8 / (size_t)bits;
    size_t num_misfits = 0;
    uint8_t less[BLOCK], cut[BLOCK];
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t length = count - start < BLOCK ? count - start : BLOCK;
        const uint8_t *x = octets + start;
        for (size_t i = 0; i < length; i++) less[i] = (uint8_t)(x[i] - bias);
        memset(less + length, 0, (BLOCK - length) % 64); /* nothing there, and no misfits */
        size_t filled = (length + 63) & ~(size_t)63;
        for (size_t i = 0; i < filled; i++) cut[i] = less[i] < escape ? less[i] : escape;
        for (size_t i = 0; i < filled; i += 64)
            for (uint64_t mask = where64(cut + i, escape); mask; mask &= mask - 1)
                misfits[num_misfits++] = (uint8_t)(less[i + (size_t)__builtin_ctzll(mask)] - escape);
        size_t groups = (length + share - 1) / share;
        uint8_t *to = packed + start / share;
        if (bits == 4)
            for (size_t i = 0; i < groups; i++) {
                uint32_t two = ((const u16 *)cut)[i];
                to[i] = (uint8_t)(two | two >> 4);
            }
        else if (bits == 2)
            for (size_t i = 0; i < groups; i++) {
                uint32_t four = ((const u32 *)cut)[i];
                to[i] = (uint8_t)(four | four >> 6 | four >> 12 | four >> 18);
            }
        else
            for (size_t i = 0; i < groups; i++) to[i] = (uint8_t)bits_of(cut + 8 * i);
    }
    return num_misfits;
}

/* Undo that; there are num_misfits `misfits`. Returns how many there should be. */
VECTORIZED size_t ckptstore_widen(
    const uint8_t *packed, size_t count, int bits, int bias, const uint8_t *misfits, size_t num_misfits,
    uint8_t *octets) {
    const uint8_t escape = (uint8_t)((1 << bits) - 1);
    const size_t share = 8 / (size_t)bits;
    size_t found = 0;
    uint8_t cut[BLOCK];
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t length = count - start < BLOCK ? count - start : BLOCK;
        size_t groups = (length + share - 1) / share;
        const uint8_t *from = packed + start / share;
        if (bits == 4)
            for (size_t i = 0; i < groups; i++) ((u16 *)cut)[i] = (u16)((from[i] | from[i] << 4) & 0x0F0F);
        else if (bits == 2)
            for (size_t i = 0; i < groups; i++) {
                uint32_t four = (from[i] | (uint32_t)from[i] << 12) & 0x000F000F;
                ((u32 *)cut)[i] = (four | four << 6) & 0x03030303;
            }
        else
            for (size_t i = 0; i < groups; i++) {
                uint64_t eight = (from[i] | (uint64_t)from[i] << 28) & 0x0000000F0000000F;
                eight = (eight | eight << 14) & 0x0003000300030003;
                ((u64 *)cut)[i] = (eight | eight << 7) & 0x0101010101010101;
            }
        memset(cut + length, 0, (BLOCK - length) % 64);
        for (size_t i = 0; i < length; i += 64)
            for (uint64_t mask = where64(cut + i, escape); mask; mask &= mask - 1, found++)
                if (found < num_misfits) cut[i + (size_t)__builtin_ctzll(mask)] = (uint8_t)(escape + misfits[found]);
        uint8_t *x = octets + start;
        for (size_t i = 0; i < length; i++) x[i] = (uint8_t)(cut[i] + bias);
    }
    return found;
}

/* --- planes: even ------------------------------------------------------------------------------------------------- */

#define DEFINE_EVEN(BITS)                                                                                              \
    VECTORIZED static int halve##BITS(const u##BITS *words, size_t count, u##BITS *packed) {                           \
        size_t length = count / BITS;                                                                                  \
        const u##BITS *dropped = words + (BITS - 1) * length, *rest = words + BITS * length;                           \
        u##BITS any = 0;                                                                                               \
        for (size_t i = 0; i < length; i++) any |= dropped[i];                                                         \
        for (size_t i = 0; i < count - BITS * length; i++) any |= rest[i];                                             \
        for (size_t s = 0; s < BITS - 1; s++) {                                                                        \
            if (any & 1) return 0;                                                                                     \
            for (size_t i = 0; i < length; i++) {                                                                      \
                any |= words[s * length + i];                                                                          \
                packed[s * length + i] = words[s * length + i] | (dropped[i] >> (s + 1) & 1);                          \
            }                                                                                                          \
        }                                                                                                              \
        memcpy(packed + (BITS - 1) * length, rest, (count - BITS * length) * sizeof *words);                           \
        return !(any & 1);                                                                                             \
    }                                                                                                                  \
    VECTORIZED static void unhalve##BITS(const u##BITS *packed, size_t count, u##BITS *words) {                        \
        size_t length = count / BITS;                                                                                  \
        u##BITS *dropped = words + (BITS - 1) * length;                                                                \
        memset(dropped, 0, length * sizeof *words);                                                                    \
        for (size_t s = 0; s < BITS - 1; s++)                                                                          \
            for (size_t i = 0; i < length; i++) {                                                                      \
                u##BITS x = packed[s * length + i];                                                                    \
                words[s * length + i] = x & (u##BITS)~(u##BITS)1;                                                      \
                dropped[i] |= (u##BITS)((x & 1) << (s + 1));                                                           \
            }                                                                                                          \
        memcpy(words + BITS * length, packed + (BITS - 1) * length, (count - BITS * length) * sizeof *words);          \
    }
DEFINE_EVEN(8)
DEFINE_EVEN(16)
DEFINE_EVEN(32)
DEFINE_EVEN(64)

/* Even words in as many segments as a word has bits, the last segment's bits in the others' lowest. Returns whether they
 * are even; if not, what `packed` holds is nothing. */
int ckptstore_halve(const void *words, size_t count, int width, void *packed) {
#define CALL(BITS) return halve##BITS(words, count, packed);
    BY_WIDTH(width, CALL)
#undef CALL
    return 0;
}

/* Undo that; `count` words come out. */
void ckptstore_unhalve(const void *packed, size_t count, int width, void *words) {
#define CALL(BITS) unhalve##BITS(packed, count, words);
    BY_WIDTH(width, CALL)
#undef CALL
}

/* --- planes: lag -------------------------------------------------------------------------------------------------- */

/* out[i] = octets[i] + out[i - lag], modulo 256. */
VECTORIZED void ckptstore_accumulate(const uint8_t *octets, size_t count, size_t lag, uint8_t *out) {
    memcpy(out, octets, lag < count ? lag : count);
    for (size_t start = lag; start < count; start += lag) {
        size_t length = count - start < lag ? count - start : lag;
        const uint8_t *x = octets + start, *before = out + start - lag;
        uint8_t *sum = out + start;
#pragma GCC ivdep
        for (size_t i = 0; i < length; i++) sum[i] = (uint8_t)(x[i] + before[i]);
    }
}

/* --- bf16 from fp32 ----------------------------------------------------------------------------------------------- */

INLINE u16 rounded(u32 x) { return (u16)((x + 0x7FFFu + (x >> 16 & 1)) >> 16); }

/* The bf16 numbers nearest to these fp32 ones, ties to even. */
VECTORIZED void ckptstore_round(const u32 *master, size_t count, u16 *out) {
    for (size_t i = 0; i < count; i++) out[i] = rounded(master[i]);
}

/* Whether each bf16 number is its master rounded. */
VECTORIZED int ckptstore_is_rounded(const u16 *words, const u32 *master, size_t count) {
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t length = count - start < BLOCK ? count - start : BLOCK;
        u16 any = 0;
        for (size_t i = 0; i < length; i++) any |= words[start + i] ^ rounded(master[start + i]);
        if (any) return 0;
    }
    return 1;
}
