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

/* Turn pairs (i, i + dim/2) by the angles of a token; backwards with sign -1. */
static inline void rotate(const bf16 *in, bf16 *out, const float *cosine, const float *sine,
                          int64_t dim, float sign) {
    int64_t half = dim / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = load(in[i]), b = load(in[i + half]);
        out[i] = store(a * cosine[i] - sign * b * sine[i]);
        out[i + half] = store(b * cosine[i] + sign * a * sine[i]);
    }
}

/* Turn the first `turned` heads of each row by the angles of its token, with sign -1 backwards; the
 * others stay as they are. cosine, sine: [rows, dim / 2]. x and y may be the same. */
void rotate_heads(const bf16 *x, const float *cosine, const float *sine, bf16 *y, int64_t rows,
                  int64_t width, int64_t turned, int64_t dim, float sign) {
    WITH_TEAM;
#pragma omp parallel for schedule(static) num_threads(team.threads)
    for (int64_t t = 0; t < rows; t++) {
        const bf16 *in = x + t * width;
        bf16 *out = y + t * width;
        for (int64_t h = 0; h < turned; h++)
            rotate(in + h * dim, out + h * dim, cosine + t * (dim / 2), sine + t * (dim / 2), dim, sign);
        if (x != y) memcpy(out + turned * dim, in + turned * dim, (width - turned * dim) * sizeof(bf16));
    }
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
