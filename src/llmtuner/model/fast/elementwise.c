/* What a training step on a CPU does beside its matrix products, one pass over memory each.
 *
 * Numbers are bfloat16 in memory and float in registers. Rows are spread over OpenMP's threads;
 * every row is computed by one thread in one order, so results do not depend on their number.
 */
#include "numbers.h"

/* sum = x + branch (branch may be NULL: then sum is not written); y = sum / rms(sum) * weight. */
void rms_norm(const bf16 *x, const bf16 *branch, const float *weight, bf16 *sum, bf16 *y,
              float *inverse, int64_t rows, int64_t n, float epsilon) {
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *in = x + row * n;
        float squares = 0.0f;
        if (branch) {
            const bf16 *other = branch + row * n;
            bf16 *added = sum + row * n;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < n; i++) {
                added[i] = store(load(in[i]) + load(other[i]));
                float value = load(added[i]);
                squares += value * value;
            }
            in = added;
        } else {
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < n; i++) squares += load(in[i]) * load(in[i]);
        }
        float factor = 1.0f / sqrtf(squares / n + epsilon);
        inverse[row] = factor;
        bf16 *out = y + row * n;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) out[i] = store(load(in[i]) * factor * weight[i]);
    }
}

/* Gradient of rms_norm in its input, plus what reaches the sum from elsewhere (beside; or NULL). */
void rms_norm_backward(const bf16 *grad, const bf16 *x, const float *weight, const float *inverse,
                       const bf16 *beside, bf16 *grad_x, int64_t rows, int64_t n) {
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *g = grad + row * n, *in = x + row * n;
        const bf16 *b = beside ? beside + row * n : NULL;
        float factor = inverse[row], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < n; i++) dot += load(g[i]) * weight[i] * load(in[i]);
        float shift = dot * factor * factor * factor / n;
        bf16 *out = grad_x + row * n;
        if (b) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                out[i] = store(load(g[i]) * weight[i] * factor - load(in[i]) * shift + load(b[i]));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < n; i++)
                out[i] = store(load(g[i]) * weight[i] * factor - load(in[i]) * shift);
        }
    }
}

/* Gradient of rms_norm in its weight; each column is added up by one thread, row by row. */
void rms_norm_backward_weight(const bf16 *grad, const bf16 *x, const float *inverse, float *total,
                              int64_t rows, int64_t n) {
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t start = 0; start < n; start += 64) {
        int64_t width = n - start < 64 ? n - start : 64;
        float sums[64] = {0};
        for (int64_t row = 0; row < rows; row++) {
            const bf16 *g = grad + row * n + start, *in = x + row * n + start;
            float factor = inverse[row];
#pragma omp simd
            for (int64_t i = 0; i < width; i++) sums[i] += load(g[i]) * load(in[i]) * factor;
        }
        memcpy(total + start, sums, width * sizeof(float));
    }
}

/* y [rows, n] = silu(left half) * right half of x [rows, 2n]. */
void swiglu(const bf16 *x, bf16 *y, int64_t rows, int64_t n) {
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = x + row * 2 * n, *up = gate + n;
        bf16 *out = y + row * n;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float g = load(gate[i]);
            out[i] = store(g * sigmoid(g) * load(up[i]));
        }
    }
}

/* Gradient of swiglu; writes its output once more too, which then need not be kept. */
void swiglu_backward(const bf16 *grad, const bf16 *x, bf16 *y, bf16 *grad_x, int64_t rows,
                     int64_t n) {
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = x + row * 2 * n, *up = gate + n, *g_out = grad + row * n;
        bf16 *out = y + row * n, *to_gate = grad_x + row * 2 * n, *to_up = to_gate + n;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float g = load(gate[i]), u = load(up[i]), d = load(g_out[i]), s = sigmoid(g);
            out[i] = store(g * s * u);
            to_up[i] = store(d * g * s);
            to_gate[i] = store(d * u * s * (1.0f + g * (1.0f - s)));
        }
    }
}

/* A pair of numbers turned by an angle; turned back by the negative sine. */
static inline float turned_first(float a, float b, float cosine, float sine) { return a * cosine - b * sine; }
static inline float turned_second(float a, float b, float cosine, float sine) { return b * cosine + a * sine; }

/* Turn the first `turned` heads of each row by the angles of its token, with sign -1 backwards; the
 * others stay as they are, and so does a head behind its first `part` numbers, of which pairs
 * (i, i + part / 2) turn. cosine, sine: [rows, part / 2]. x and y may be the same. */
void rotate_heads(const bf16 *x, const float *cosine, const float *sine, bf16 *y, int64_t rows,
                  int64_t width, int64_t turned, int64_t dim, int64_t part, float sign) {
    int64_t half = part / 2;
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t t = 0; t < rows; t++) {
        const float *c = cosine + t * half, *s = sine + t * half;
        for (int64_t h = 0; h < turned; h++) {
            const bf16 *in = x + t * width + h * dim;
            bf16 *out = y + t * width + h * dim;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = load(in[i]), b = load(in[i + half]);
                out[i] = store(turned_first(a, b, c[i], sign * s[i]));
                out[i + half] = store(turned_second(a, b, c[i], sign * s[i]));
            }
            if (x != y) memcpy(out + part, in + part, (dim - part) * sizeof(bf16));
        }
        int64_t rest = t * width + turned * dim;
        if (x != y) memcpy(y + rest, x + rest, (width - turned * dim) * sizeof(bf16));
    }
}

/* rotate_heads of heads that are normed before, as rms_norm does: the first `heads` are queries, the
 * next kv_heads keys. weights: of queries and of keys, [2, dim]. inverse: [rows, heads + kv_heads]. */
void norm_heads(const bf16 *x, const float *weights, const float *cosine, const float *sine, bf16 *y,
                float *inverse, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim, float epsilon) {
    int64_t turned = heads + kv_heads, width = (turned + kv_heads) * dim, half = dim / 2;
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t t = 0; t < rows; t++) {
        const float *c = cosine + t * half, *s = sine + t * half;
        float *factors = inverse + t * turned;
        for (int64_t h = 0; h < turned; h++) { /* on its own: the next sum begins while one ends */
            const bf16 *in = x + t * width + h * dim;
            float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < dim; i++) squares += load(in[i]) * load(in[i]);
            factors[h] = 1.0f / sqrtf(squares / dim + epsilon);
        }
        for (int64_t h = 0; h < turned; h++) {
            const bf16 *in = x + t * width + h * dim;
            const float *weight = weights + (h >= heads) * dim, factor = factors[h];
            bf16 *out = y + t * width + h * dim;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = load(in[i]) * factor * weight[i];
                float b = load(in[i + half]) * factor * weight[i + half];
                out[i] = store(turned_first(a, b, c[i], s[i]));
                out[i + half] = store(turned_second(a, b, c[i], s[i]));
            }
        }
        int64_t rest = t * width + turned * dim;
        memcpy(y + rest, x + rest, kv_heads * dim * sizeof(bf16));
    }
}

/* The gradient of norm_heads in its input takes the place of that in its output. */
void norm_heads_backward(const bf16 *x, const float *weights, const float *cosine, const float *sine,
                         const float *inverse, bf16 *grad, int64_t rows, int64_t heads, int64_t kv_heads,
                         int64_t dim) {
    int64_t turned = heads + kv_heads, width = (turned + kv_heads) * dim, half = dim / 2;
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t t = 0; t < rows; t++) {
        const float *c = cosine + t * half, *s = sine + t * half, *factors = inverse + t * turned;
        float shifts[turned];
        for (int64_t h = 0; h < turned; h++) {
            const bf16 *in = x + t * width + h * dim, *g = grad + t * width + h * dim;
            const float *weight = weights + (h >= heads) * dim;
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < half; i++) {
                float a = turned_first(load(g[i]), load(g[i + half]), c[i], -s[i]);
                float b = turned_second(load(g[i]), load(g[i + half]), c[i], -s[i]);
                dot += a * weight[i] * load(in[i]) + b * weight[i + half] * load(in[i + half]);
            }
            shifts[h] = dot * factors[h] * factors[h] * factors[h] / dim;
        }
        for (int64_t h = 0; h < turned; h++) {
            const bf16 *in = x + t * width + h * dim;
            const float *weight = weights + (h >= heads) * dim;
            const float factor = factors[h], shift = shifts[h];
            bf16 *g = grad + t * width + h * dim;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = turned_first(load(g[i]), load(g[i + half]), c[i], -s[i]);
                float b = turned_second(load(g[i]), load(g[i + half]), c[i], -s[i]);
                g[i] = store(a * weight[i] * factor - load(in[i]) * shift);
                g[i + half] = store(b * weight[i + half] * factor - load(in[i + half]) * shift);
            }
        }
    }
}

/* Gradient of norm_heads in its weights, total [2, dim], from that in its output: one thread adds up a
 * head row by row, parts [heads + kv_heads, dim]; then heads are added up in their order. */
void norm_heads_backward_weights(const bf16 *grad, const bf16 *x, const float *cosine, const float *sine,
                                 const float *inverse, float *parts, float *total, int64_t rows,
                                 int64_t heads, int64_t kv_heads, int64_t dim) {
    int64_t turned = heads + kv_heads, width = (turned + kv_heads) * dim, half = dim / 2;
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t h = 0; h < turned; h++) {
        float *sums = parts + h * dim;
        memset(sums, 0, dim * sizeof(float));
        for (int64_t t = 0; t < rows; t++) {
            const bf16 *g = grad + t * width + h * dim, *in = x + t * width + h * dim;
            const float *c = cosine + t * half, *s = sine + t * half;
            float factor = inverse[t * turned + h];
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = load(g[i]), b = load(g[i + half]);
                sums[i] += turned_first(a, b, c[i], -s[i]) * load(in[i]) * factor;
                sums[i + half] += turned_second(a, b, c[i], -s[i]) * load(in[i + half]) * factor;
            }
        }
    }
    memset(total, 0, 2 * dim * sizeof(float));
    for (int64_t h = 0; h < turned; h++)
        for (int64_t i = 0; i < dim; i++) total[(h >= heads) * dim + i] += parts[h * dim + i];
}

/* y = factor * x, rounded; rows of y may lie apart. */
void round_scaled(const float *x, bf16 *y, int64_t rows, int64_t n, int64_t y_row, float factor) {
    for (int64_t row = 0; row < rows; row++) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) y[row * y_row + i] = store(x[row * n + i] * factor);
    }
}

/* Logits [rows, n] become the gradient of their own loss; losses [rows] are returned. */
void cross_entropy(bf16 *logits, const int64_t *targets, float *losses, int64_t rows, int64_t n) {
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t row = 0; row < rows; row++) {
        bf16 *x = logits + row * n;
        float largest = -INFINITY, total = 0.0f, wanted = load(x[targets[row]]);
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < n; i++) {
            float value = load(x[i]);
            largest = largest < value ? value : largest;
        }
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < n; i++) total += exponential(load(x[i]) - largest);
        losses[row] = logf(total) + largest - wanted;
        float factor = 1.0f / total, target = exponential(wanted - largest) * factor - 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) x[i] = store(exponential(load(x[i]) - largest) * factor);
        x[targets[row]] = store(target);
    }
}
