/* Products of bfloat16 matrices in tiles that stay in registers, summed in float.
 *
 * Both operands are read in pairs: a 32-bit word holds two numbers that follow each other along the
 * dimension that is summed. The left one is read where it is, by two strides. The right one is
 * packed into panels of PANEL columns: word [pair][column]. A number of the result is always summed
 * in the same order, whatever the shape around it, so a row does not depend on the other rows.
 */
#ifndef LLMTUNER_TILES_H
#define LLMTUNER_TILES_H

#include "numbers.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define VECTORS 4
#define PANEL (VECTORS * LANES)
#define AHEAD 48 /* rows that are fetched before they are packed */

typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* sum + low halves of a times those of b + high halves of a times those of b. */
static inline floats add_products(floats sum, words a, words b) {
#if defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (floats)(a << 16) * (floats)(b << 16);
    return sum + (floats)(a & 0xffff0000u) * (floats)(b & 0xffff0000u);
#endif
}

static inline uint32_t word_at(const bf16 *place) {
    uint32_t word;
    memcpy(&word, place, sizeof(word));
    return word;
}

/* The left operand: word of row m and pair p at from[m * row + p * step]; strides in words of two
 * numbers would not do for odd rows, so both count bf16. */
typedef struct {
    const bf16 *from;
    int64_t row, step;
} Left;

/* sums [rows][sums_row] (+)= left [rows, pairs] x panel [pairs, vectors * LANES]. */
static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, Left left,
                                                       const uint32_t *panel, int64_t pairs,
                                                       float *sums, int64_t sums_row, int add) {
    floats total[12][VECTORS];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            total[m][v] = add ? *(floats *)(sums + m * sums_row + v * LANES) : (floats){0};
    for (int64_t p = 0; p < pairs; p++) {
        words right[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) right[v] = *(const words *)(panel + p * PANEL + v * LANES);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            words one = word_at(left.from + m * left.row + p * left.step) - (words){0};
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) total[m][v] = add_products(total[m][v], one, right[v]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) *(floats *)(sums + m * sums_row + v * LANES) = total[m][v];
}

#define TILE(rows) tile(rows, vectors, left, panel, pairs, sums, sums_row, add)

/* As many rows as fit the registers; returns how many were done. */
static inline __attribute__((always_inline)) int64_t tile_of(const int vectors, int64_t rows,
                                                             Left left, const uint32_t *panel,
                                                             int64_t pairs, float *sums,
                                                             int64_t sums_row, int add) {
    if (vectors <= 2 && rows >= 12) return TILE(12), 12;
    if (rows >= 6) return TILE(6), 6;
    if (rows >= 4) return TILE(4), 4;
    if (rows >= 2) return TILE(2), 2;
    return TILE(1), 1;
}

/* sums [rows][columns, rounded up to LANES] (+)= left x one panel. */
static void multiply_panel(int64_t rows, int64_t columns, Left left, const uint32_t *panel,
                           int64_t pairs, float *sums, int64_t sums_row, int add) {
    while (rows > 0) {
        int64_t done;
        switch ((columns + LANES - 1) / LANES) {
            case 1: done = tile_of(1, rows, left, panel, pairs, sums, sums_row, add); break;
            case 2: done = tile_of(2, rows, left, panel, pairs, sums, sums_row, add); break;
            case 3: done = tile_of(3, rows, left, panel, pairs, sums, sums_row, add); break;
            default: done = tile_of(4, rows, left, panel, pairs, sums, sums_row, add);
        }
        rows -= done;
        left.from += done * left.row;
        sums += done * sums_row;
    }
}

/* Pairs of rows become words: out[p * out_row + n] = (b[2p][n], b[2p + 1][n]); an odd last row is
 * paired with zeros, and columns are filled up with zeros to whole vectors. */
static void pack_rows(const bf16 *b, int64_t b_row, int64_t rows, int64_t columns, uint32_t *out,
                      int64_t out_row) {
    int64_t padded = round_up(columns, LANES);
    for (int64_t p = 0; p < (rows + 1) / 2; p++) {
        const bf16 *low = b + 2 * p * b_row, *high = low + b_row;
        uint32_t *to = out + p * out_row;
        for (int64_t n = 0; n < columns; n += 32) { /* rows far apart are not foreseen */
            __builtin_prefetch(low + AHEAD * b_row + n);
            __builtin_prefetch(high + AHEAD * b_row + n);
        }
        if (2 * p + 1 < rows) {
#pragma omp simd
            for (int64_t n = 0; n < columns; n++) to[n] = low[n] | (uint32_t)high[n] << 16;
        } else {
            for (int64_t n = 0; n < columns; n++) to[n] = low[n];
        }
        for (int64_t n = columns; n < padded && n < out_row; n++) to[n] = 0;
    }
}

#if LANES == 16
/* 16 words of 16 rows, turned: out[i][j] = in[j][i]. */
static inline void turn(const bf16 *in, int64_t in_row, uint32_t *out, int64_t out_row) {
    words x[16], y[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) x[i] = *(const words *)(in + i * in_row);
#define MIX(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = MIX(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        y[i + 1] = MIX(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            words a = y[i + j], b = y[i + 2 + j];
            x[i + 2 * j] = MIX(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            x[i + 2 * j + 1] = MIX(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    /* x[4g + c] holds columns c, c + 4, c + 8, c + 12 of rows 4g to 4g + 3 */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        words low = MIX(x[c], x[4 + c], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        words low2 = MIX(x[8 + c], x[12 + c], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        words high = MIX(x[c], x[4 + c], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        words high2 =
            MIX(x[8 + c], x[12 + c], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#define HALF(a, b, from)                                                                      \
    MIX(a, b, from, from + 1, from + 2, from + 3, from + 4, from + 5, from + 6, from + 7,     \
        from + 16, from + 17, from + 18, from + 19, from + 20, from + 21, from + 22, from + 23)
        *(words *)(out + c * out_row) = HALF(low, low2, 0);
        *(words *)(out + (c + 4) * out_row) = HALF(low, low2, 8);
        *(words *)(out + (c + 8) * out_row) = HALF(high, high2, 0);
        *(words *)(out + (c + 12) * out_row) = HALF(high, high2, 8);
    }
#undef HALF
#undef MIX
}
#endif

/* Rows become columns: word out[p * PANEL + n] = (b[n][2p], b[n][2p + 1]); n < rows <= PANEL. */
static void pack_columns(const bf16 *b, int64_t b_row, int64_t rows, int64_t depth, uint32_t *out) {
    int64_t pairs = (depth + 1) / 2, whole = depth / 2;
    for (int64_t start = 0; start < rows; start += LANES) {
        int64_t p = 0;
#if LANES == 16
        if (start + 16 <= rows)
            for (; p + 16 <= whole; p += 16) {
                for (int64_t n = start; n < start + 16; n++)
                    __builtin_prefetch(b + n * b_row + 2 * p + 96);
                turn(b + start * b_row + 2 * p, b_row, out + p * PANEL + start, PANEL);
            }
#endif
        for (int64_t n = start; n < start + LANES; n++) {
            for (int64_t i = p; i < pairs; i++)
                out[i * PANEL + n] = n >= rows    ? 0
                                     : i < whole ? word_at(b + n * b_row + 2 * i)
                                                 : b[n * b_row + 2 * i];
        }
    }
}

/* Memory of this thread, kept until it ends; what an earlier call left in it is gone. */
static inline void *scratch(int64_t bytes) {
    static _Thread_local void *memory;
    static _Thread_local int64_t size;
    if (size < bytes) {
        free(memory);
        size = round_up(bytes, 4096);
        memory = aligned_alloc(4096, size);
        if (!memory) abort();
    }
    return memory;
}

#endif
