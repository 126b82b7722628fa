/* Products of whole matrices, spread over threads by panels of columns and chunks of rows. */
#include "tiles.h"

#define DEPTH 2048 /* numbers summed at once: a panel of so many stays in the second-level cache */
#define ROWS 448  /* most rows for which a panel is packed once; of 576 numbers they fit the cache */
#define TASKS 16   /* with fewer panels, rows are cut too, so that no thread waits long */

typedef struct {
    uint32_t panel[DEPTH / 2 * PANEL];
    float sums[ROWS * PANEL];
} Room;

/* sums (+)= rows of a [rows, depth] x columns of b: by_columns: b [depth, columns], else b^T. */
static void add_product(Room *room, const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_row,
                        int64_t rows, int64_t columns, int64_t depth, int by_columns, int add) {
    for (int64_t k = 0; k < depth; k += DEPTH) {
        int64_t deep = least(DEPTH, depth - k);
        if (by_columns)
            pack_rows(b + k * b_row, b_row, deep, columns, room->panel, PANEL);
        else
            pack_columns(b + k, b_row, columns, deep, room->panel);
        Left left = {a + k, a_row, 2};
        multiply_panel(rows, columns, left, room->panel, deep / 2, room->sums, PANEL, add || k);
    }
    /* An odd last number has no partner in the rows of a. */
    for (int64_t i = 0; depth % 2 && i < rows; i++) {
        float last = load(a[i * a_row + depth - 1]);
        for (int64_t n = 0; n < columns; n++) {
            bf16 other = by_columns ? b[(depth - 1) * b_row + n] : b[n * b_row + depth - 1];
            room->sums[i * PANEL + n] += last * load(other);
        }
    }
}

/* How many rows one task takes. */
static int64_t rows_of_task(int64_t rows, int64_t columns) {
    int64_t panels = (columns + PANEL - 1) / PANEL, chunks = (rows + ROWS - 1) / ROWS;
    if (panels * chunks < TASKS && rows > 12 * chunks) chunks *= 2;
    return chunks ? (rows + chunks - 1) / chunks : 1;
}

/* out [rows, columns] = a b + a2 b2 (depth2 may be 0), all rows with their own strides.
 * by_columns: b is [depth, columns] and b2 [depth2, columns]; else their transposes. */
void product(const bf16 *a, const bf16 *b, const bf16 *a2, const bf16 *b2, bf16 *out, int64_t rows,
             int64_t columns, int64_t depth, int64_t depth2, int64_t a_row, int64_t b_row,
             int64_t a2_row, int64_t b2_row, int64_t by_columns) {
    int64_t step = rows_of_task(rows, columns);
    WITH_TEAM;
#pragma omp parallel for schedule(dynamic) collapse(2) num_threads(team.threads)
    for (int64_t m = 0; m < rows; m += step)
        for (int64_t n = 0; n < columns; n += PANEL) {
            Room *room = scratch(sizeof(Room));
            int64_t height = least(step, rows - m), width = least(PANEL, columns - n);
            int64_t to_b = by_columns ? n : n * b_row, to_b2 = by_columns ? n : n * b2_row;
            add_product(room, a + m * a_row, a_row, b + to_b, b_row, height, width, depth, by_columns,
                        0);
            add_product(room, a2 + m * a2_row, a2_row, b2 + to_b2, b2_row, height, width, depth2,
                        by_columns, 1);
            for (int64_t i = 0; i < height; i++) {
                bf16 *to = out + (m + i) * columns + n;
                const float *from = room->sums + i * PANEL;
#pragma omp simd
                for (int64_t j = 0; j < width; j++) to[j] = store(from[j]);
            }
        }
}

/* One row of a result, to numbers that lie `step` apart. */
static void write_exact(float *to, int64_t step, const float *from, int64_t width, float factor,
                        int64_t adds) {
    for (int64_t j = 0; j < width; j++)
        to[j * step] = (adds ? to[j * step] : 0) + from[j] * factor;
}

static void write_rounded(bf16 *to, int64_t step, const float *from, int64_t width, float factor,
                          int64_t adds) {
    for (int64_t j = 0; j < width; j++)
        to[j * step] = store((adds ? load(to[j * step]) : 0) + from[j] * factor);
}

/* out (+)= factor * a^T b: number (m, n) at out[m * out_row + n * out_column]. rounds: out is
 * bfloat16, else float; adds: to what is there.
 * a: word [depth / 2][rows] of `pair_rows`; b [depth, columns]. */
void product_transposed(const uint32_t *a, const bf16 *b, void *out, int64_t rows, int64_t columns,
                        int64_t depth, int64_t a_row, int64_t b_row, int64_t out_row,
                        int64_t out_column, int64_t rounds, int64_t adds, float factor) {
    int64_t step = rows_of_task(rows, columns);
    WITH_TEAM;
#pragma omp parallel for schedule(dynamic) collapse(2) num_threads(team.threads)
    for (int64_t m = 0; m < rows; m += step)
        for (int64_t n = 0; n < columns; n += PANEL) {
            Room *room = scratch(sizeof(Room));
            int64_t height = least(step, rows - m), width = least(PANEL, columns - n);
            for (int64_t k = 0; k < depth; k += DEPTH) {
                int64_t deep = least(DEPTH, depth - k);
                pack_rows(b + k * b_row + n, b_row, deep, width, room->panel, PANEL);
                Left left = {(const bf16 *)(a + k / 2 * a_row + m), 2, 2 * a_row};
                multiply_panel(height, width, left, room->panel, (deep + 1) / 2, room->sums, PANEL,
                               k > 0);
            }
            for (int64_t i = 0; i < height; i++) {
                const float *from = room->sums + i * PANEL;
                int64_t to = (m + i) * out_row + n * out_column;
                if (rounds)
                    write_rounded((bf16 *)out + to, out_column, from, width, factor, adds);
                else
                    write_exact((float *)out + to, out_column, from, width, factor, adds);
            }
        }
}

/* out: word [(rows + 1) / 2][columns] of pairs of rows of a. */
void pair_rows(const bf16 *a, uint32_t *out, int64_t rows, int64_t columns, int64_t a_row) {
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t p = 0; p < (rows + 1) / 2; p++)
        pack_rows(a + 2 * p * a_row, a_row, least(2, rows - 2 * p), columns, out + p * columns,
                  columns);
}
