/* Causal attention inside each sample of a flat batch, forward and backward.
 *
 * A row of x holds queries, keys and values of a token: [heads + 2 kv_heads][dim]. One task is one
 * head of one sample. Scores are floats and never leave the cache: the backward pass computes them
 * again from the logarithms of their sums.
 */
#include "tiles.h"

#define QUERIES 12       /* rows of scores at once in the forward pass */
#define QUERY_BLOCK 64   /* and in the backward pass; even, for pairs of rows */
#define KEY_BLOCK (4 * PANEL)

typedef struct {
    int64_t heads, kv_heads, dim, window;
    float scale;
} Shape;

typedef struct {
    int64_t first, length;
} Sample;

static int longer(const void *a, const void *b) {
    const Sample *one = a, *other = b;
    if (one->length != other->length) return one->length < other->length ? 1 : -1;
    return one->first < other->first ? -1 : 1;
}

/* The longest first, so that the last task of a thread is a short one. */
static Sample *sorted_samples(const int32_t *borders, int64_t count) {
    Sample *samples = malloc((count ? count : 1) * sizeof(Sample));
    if (!samples) abort();
    for (int64_t i = 0; i < count; i++)
        samples[i] = (Sample){borders[i], borders[i + 1] - borders[i]};
    qsort(samples, count, sizeof(Sample), longer);
    return samples;
}

/* Memory is handed out piece by piece, each at a border of 64 bytes. */
static void *piece(char **memory, int64_t bytes) {
    void *found = *memory;
    *memory += round_up(bytes, 64);
    return found;
}

/* Rows of keys (or values) as columns: panels of PANEL of them, `dim` deep. */
static void pack_as_columns(const bf16 *from, int64_t row, int64_t count, int64_t dim, uint32_t *out) {
    for (int64_t n = 0; n < count; n += PANEL)
        pack_columns(from + n * row, row, least(PANEL, count - n), dim, out + n / PANEL * dim / 2 * PANEL);
}

/* Pairs of rows, in panels of PANEL columns that hold `pairs` pairs each. */
static void pack_as_rows(const bf16 *from, int64_t row, int64_t count, int64_t dim, uint32_t *out,
                         int64_t pairs) {
    for (int64_t n = 0; n < dim; n += PANEL)
        pack_rows(from + n, row, count, least(PANEL, dim - n), out + n / PANEL * pairs * PANEL, PANEL);
}

/* sums [rows][sums_row] (+)= left [rows, 2 count] x pairs `first` and on of rows packed above. */
static void multiply_rows(int64_t rows, Left left, const uint32_t *packed, int64_t pairs,
                          int64_t first, int64_t count, int64_t dim, float *sums, int64_t sums_row,
                          int add) {
    for (int64_t n = 0; n < dim; n += PANEL)
        multiply_panel(rows, least(PANEL, dim - n), left,
                       packed + (n / PANEL * pairs + first) * PANEL, count, sums + n, sums_row, add);
}

/* The key after the last that a query sees, and (with a window) the first one. */
static inline int64_t last_key(int64_t query) { return query + 1; }
static inline int64_t first_key(int64_t query, int64_t window) {
    return window > 0 && query + 1 > window ? query + 1 - window : 0;
}

/* Scores [0, count) become e^(scale * (score - largest)) as bfloat16, which are returned summed. */
static float shares(const float *scores, int64_t count, float scale, float largest, bf16 *out) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) {
        float share = exponential((scores[i] - largest) * scale);
        total += share;
        out[i] = store(share);
    }
    return total;
}

static float largest_of(const float *numbers, int64_t count) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; i++) largest = largest < numbers[i] ? numbers[i] : largest;
    return largest;
}

/* One head of one sample. `seen` keys of a prefix come before its own, which begin at a whole panel. */
typedef struct {
    uint32_t *keys, *values;
    float *scores, *mixed;
    bf16 *shares;
    int64_t own, places; /* place of the first own key, and of all */
} Forward;

static Forward forward_room(int64_t seen, int64_t length, int64_t dim) {
    int64_t own = round_up(seen, PANEL), places = own + round_up(length, PANEL);
    int64_t wide = round_up(dim, PANEL);
    int64_t bytes[] = {places * dim * 2, places * wide * 2, QUERIES * places * 4, QUERIES * wide * 4,
                       QUERIES * places * 2};
    int64_t all = 0;
    for (int i = 0; i < 5; i++) all += round_up(bytes[i], 64);
    char *memory = scratch(all);
    Forward room = {.own = own, .places = places};
    room.keys = piece(&memory, bytes[0]);
    room.values = piece(&memory, bytes[1]);
    room.scores = piece(&memory, bytes[2]);
    room.mixed = piece(&memory, bytes[3]);
    room.shares = piece(&memory, bytes[4]);
    return room;
}

/* Pack `count` keys and values, of which the first has the given place. */
static void pack_keys(Forward room, const bf16 *keys, const bf16 *values, int64_t row, int64_t count,
                      int64_t dim, int64_t place) {
    pack_as_columns(keys, row, count, dim, room.keys + place * dim / 2);
    pack_as_rows(values, row, count, dim, room.values + place / 2 * PANEL, room.places / 2);
    int64_t empty = (round_up(count, PANEL) - round_up(count, 2)) / 2;
    for (int64_t n = 0; n < dim; n += PANEL) {
        int64_t end = n / PANEL * room.places / 2 + (place + round_up(count, 2)) / 2;
        memset(room.values + end * PANEL, 0, empty * PANEL * sizeof(uint32_t));
    }
}

/* Queries [start, end): y [.., heads * dim] and, if wanted, the logarithms of the sums. */
static void forward_rows(Forward room, Shape shape, const bf16 *queries, int64_t row, int64_t seen,
                         int64_t start, int64_t end, bf16 *y, float *logarithms) {
    int64_t rows = end - start, dim = shape.dim, high = room.own + last_key(end - 1);
    int64_t low = seen ? 0 : first_key(start, shape.window) / PANEL * PANEL;
    float factors[QUERIES];
    for (int64_t n = low; n < high; n += PANEL)
        multiply_panel(rows, least(PANEL, high - n), (Left){queries + start * row, row, 2},
                       room.keys + n * dim / 2, dim / 2, room.scores + n, room.places, 0);
    for (int64_t i = 0; i < rows; i++) {
        float *scores = room.scores + i * room.places;
        bf16 *out = room.shares + i * room.places;
        int64_t from = seen ? 0 : first_key(start + i, shape.window), to = room.own + last_key(start + i);
        for (int64_t n = seen; n < room.own; n++) scores[n] = -INFINITY;
        float largest = largest_of(scores + from, to - from);
        float total = shares(scores + from, to - from, shape.scale, largest, out + from);
        memset(out + low, 0, (from - low) * sizeof(bf16));
        memset(out + to, 0, (round_up(high, 2) - to) * sizeof(bf16));
        factors[i] = 1.0f / total;
        if (logarithms) logarithms[(start + i) * shape.heads] = largest * shape.scale + logf(total);
    }
    int64_t wide = round_up(dim, PANEL);
    multiply_rows(rows, (Left){room.shares + low, room.places, 2}, room.values, room.places / 2, low / 2,
                  (high - low + 1) / 2, dim, room.mixed, wide, 0);
    for (int64_t i = 0; i < rows; i++) {
        bf16 *out = y + (start + i) * shape.heads * dim;
#pragma omp simd
        for (int64_t n = 0; n < dim; n++) out[n] = store(room.mixed[i * wide + n] * factors[i]);
    }
}

/* y [tokens, heads * dim] of x; prefix: `seen` rows like those of x, which every token sees too.
 * logarithms [tokens, heads]; NULL where there is no backward pass. */
void attention(const bf16 *x, const bf16 *prefix, const int32_t *borders, bf16 *y, float *logarithms,
               int64_t samples, int64_t seen, int64_t heads, int64_t kv_heads, int64_t dim,
               int64_t window, float scale) {
    Shape shape = {heads, kv_heads, dim, window, scale};
    int64_t row = (heads + 2 * kv_heads) * dim;
    Sample *order = sorted_samples(borders, samples);
    WITH_TEAM;
#pragma omp parallel for schedule(dynamic) collapse(2) num_threads(team.threads)
    for (int64_t s = 0; s < samples; s++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t first = order[s].first, length = order[s].length;
            int64_t to_keys = (heads + head / (heads / kv_heads)) * dim, to_values = to_keys + kv_heads * dim;
            const bf16 *own = x + first * row;
            Forward room = forward_room(seen, length, dim);
            if (seen) pack_keys(room, prefix + to_keys, prefix + to_values, row, seen, dim, 0);
            pack_keys(room, own + to_keys, own + to_values, row, length, dim, room.own);
            for (int64_t start = 0; start < length; start += QUERIES)
                forward_rows(room, shape, own + head * dim, row, seen, start, least(start + QUERIES, length),
                             y + (first * heads + head) * dim,
                             logarithms ? logarithms + first * heads + head : NULL);
        }
    free(order);
}

/* What the backward pass of one head of one sample works with. */
typedef struct {
    const bf16 *queries, *grad; /* rows of x, rows of the gradient in y */
    int64_t row, grad_row, length;
    const float *logarithms;
    uint32_t *keys, *values;                     /* as columns */
    uint32_t *key_rows, *query_rows, *grad_rows; /* pairs of rows */
    uint32_t *share_pairs, *score_pairs;         /* of one block: shares, gradient in scores */
    bf16 *shares, *scores_grad;
    float *scores, *shares_grad, *dots, *queries_grad;
} Backward;

static Backward backward_room(int64_t length, int64_t dim) {
    int64_t padded = round_up(length, PANEL), wide = round_up(dim, PANEL), block = QUERY_BLOCK * KEY_BLOCK;
    int64_t bytes[] = {padded * dim * 2, padded * dim * 2, padded * wide * 2, padded * wide * 2,
                       padded * wide * 2, block * 2, block * 2, block * 2, block * 2, block * 4, block * 4,
                       padded * 4, padded * wide * 4};
    int64_t all = 0;
    for (int i = 0; i < 13; i++) all += round_up(bytes[i], 64);
    char *memory = scratch(all);
    Backward room = {.length = length};
    void **pieces[] = {(void **)&room.keys, (void **)&room.values, (void **)&room.key_rows,
                       (void **)&room.query_rows, (void **)&room.grad_rows, (void **)&room.share_pairs,
                       (void **)&room.score_pairs, (void **)&room.shares, (void **)&room.scores_grad,
                       (void **)&room.scores, (void **)&room.shares_grad, (void **)&room.dots,
                       (void **)&room.queries_grad};
    for (int i = 0; i < 13; i++) *pieces[i] = piece(&memory, bytes[i]);
    return room;
}

/* Shares and the gradient in the scores of queries [start, end) and keys [low, high). */
static void backward_scores(Backward room, Shape shape, int64_t start, int64_t end, int64_t low,
                            int64_t high) {
    int64_t rows = end - start, even = round_up(high - low, 2);
    for (int64_t n = low; n < high; n += PANEL) {
        int64_t columns = least(PANEL, high - n), at = n * shape.dim / 2;
        multiply_panel(rows, columns, (Left){room.queries + start * room.row, room.row, 2}, room.keys + at,
                       shape.dim / 2, room.scores + n - low, KEY_BLOCK, 0);
        multiply_panel(rows, columns, (Left){room.grad + start * room.grad_row, room.grad_row, 2},
                       room.values + at, shape.dim / 2, room.shares_grad + n - low, KEY_BLOCK, 0);
    }
    for (int64_t i = 0; i < rows; i++) {
        const float *scores = room.scores + i * KEY_BLOCK, *grad = room.shares_grad + i * KEY_BLOCK;
        bf16 *shares = room.shares + i * KEY_BLOCK, *out = room.scores_grad + i * KEY_BLOCK;
        float logarithm = room.logarithms[(start + i) * shape.heads], dot = room.dots[start + i];
        int64_t from = first_key(start + i, shape.window) - low, to = last_key(start + i) - low;
        from = from < 0 ? 0 : least(from, even);
        to = to < from ? from : least(to, high - low);
        memset(shares, 0, from * sizeof(bf16));
        memset(out, 0, from * sizeof(bf16));
#pragma omp simd
        for (int64_t n = from; n < to; n++) {
            float share = exponential(scores[n] * shape.scale - logarithm);
            shares[n] = store(share);
            out[n] = store(share * (grad[n] - dot) * shape.scale);
        }
        memset(shares + to, 0, (even - to) * sizeof(bf16));
        memset(out + to, 0, (even - to) * sizeof(bf16));
    }
    pack_rows(room.shares, KEY_BLOCK, rows, even, room.share_pairs, KEY_BLOCK);
    pack_rows(room.scores_grad, KEY_BLOCK, rows, even, room.score_pairs, KEY_BLOCK);
}

/* Gradients in queries (into the room), keys and values [length][wide]. */
static void backward_head(Backward room, Shape shape, float *keys_grad, float *values_grad) {
    int64_t dim = shape.dim, wide = round_up(dim, PANEL), pairs = round_up(room.length, PANEL) / 2;
    int64_t bytes = room.length * wide * sizeof(float);
    memset(room.queries_grad, 0, bytes);
    memset(keys_grad, 0, bytes);
    memset(values_grad, 0, bytes);
    for (int64_t low = 0; low < room.length; low += KEY_BLOCK)
        for (int64_t start = low / QUERY_BLOCK * QUERY_BLOCK; start < room.length; start += QUERY_BLOCK) {
            int64_t end = least(start + QUERY_BLOCK, room.length);
            int64_t high = least(least(low + KEY_BLOCK, room.length), last_key(end - 1));
            if (first_key(start, shape.window) >= high) break;
            backward_scores(room, shape, start, end, low, high);
            Left by_query = {room.scores_grad, KEY_BLOCK, 2};
            multiply_rows(end - start, by_query, room.key_rows, pairs, low / 2, (high - low + 1) / 2, dim,
                          room.queries_grad + start * wide, wide, 1);
            Left by_key = {(const bf16 *)room.score_pairs, 2, 2 * KEY_BLOCK};
            multiply_rows(high - low, by_key, room.query_rows, pairs, start / 2, (end - start + 1) / 2, dim,
                          keys_grad + low * wide, wide, 1);
            by_key.from = (const bf16 *)room.share_pairs;
            multiply_rows(high - low, by_key, room.grad_rows, pairs, start / 2, (end - start + 1) / 2, dim,
                          values_grad + low * wide, wide, 1);
        }
}

/* grad_x of `attention` from the gradient in y. parts: float [2, heads, tokens, wide] with
 * `wide` = dim rounded up to PANEL, for the gradients in keys and values before those of heads that
 * share them are added up. */
void attention_backward(const bf16 *x, const bf16 *y, const bf16 *grad, const float *logarithms,
                        const int32_t *borders, float *parts, bf16 *grad_x, int64_t samples,
                        int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, int64_t window,
                        float scale) {
    Shape shape = {heads, kv_heads, dim, window, scale};
    int64_t row = (heads + 2 * kv_heads) * dim, y_row = heads * dim, wide = round_up(dim, PANEL);
    int64_t group = heads / kv_heads;
    Sample *order = sorted_samples(borders, samples);
    WITH_TEAM;
#pragma omp parallel for schedule(dynamic) collapse(2) num_threads(team.threads)
    for (int64_t s = 0; s < samples; s++)
        for (int64_t head = 0; head < heads; head++) {
            int64_t first = order[s].first, length = order[s].length, pairs = round_up(length, PANEL) / 2;
            const bf16 *own = x + first * row, *keys = own + (heads + head / group) * dim;
            Backward room = backward_room(length, dim);
            room.queries = own + head * dim, room.row = row;
            room.grad = grad + first * y_row + head * dim, room.grad_row = y_row;
            room.logarithms = logarithms + first * heads + head;
            pack_as_columns(keys, row, length, dim, room.keys);
            pack_as_columns(keys + kv_heads * dim, row, length, dim, room.values);
            pack_as_rows(keys, row, length, dim, room.key_rows, pairs);
            pack_as_rows(room.queries, row, length, dim, room.query_rows, pairs);
            pack_as_rows(room.grad, y_row, length, dim, room.grad_rows, pairs);
            const bf16 *out = y + first * y_row + head * dim;
            for (int64_t i = 0; i < length; i++) {
                float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                for (int64_t n = 0; n < dim; n++) dot += load(out[i * y_row + n]) * load(room.grad[i * y_row + n]);
                room.dots[i] = dot;
            }
            float *keys_grad = parts + (head * tokens + first) * wide;
            backward_head(room, shape, keys_grad, keys_grad + heads * tokens * wide);
            for (int64_t i = 0; i < length; i++) {
                bf16 *to = grad_x + (first + i) * row + head * dim;
#pragma omp simd
                for (int64_t n = 0; n < dim; n++) to[n] = store(room.queries_grad[i * wide + n]);
            }
        }
    free(order);
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < 2 * kv_heads; h++) {
            const float *from = parts + ((h / kv_heads * heads + h % kv_heads * group) * tokens + t) * wide;
            bf16 *to = grad_x + t * row + (heads + h) * dim;
#pragma omp simd
            for (int64_t n = 0; n < dim; n++) {
                float sum = from[n];
                for (int64_t g = 1; g < group; g++) sum += from[g * tokens * wide + n];
                to[n] = store(sum);
            }
        }
}
