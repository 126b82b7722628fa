/* What a training step on a CPU does beside its matrix products, one pass over memory each.
 *
 * Numbers are bfloat16 in memory and float in registers. Rows are spread over OpenMP's threads;
 * every row is computed by one thread in one order, so results do not depend on their number.
 * "Sample order" is how attention wants heads: sample after sample, each as [heads][tokens][dim].
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float load(bf16 value) {
    union { uint32_t bits; float number; } u = {.bits = (uint32_t)value << 16};
    return u.number;
}

/* Round to the nearest, ties to even; a NaN stays one. */
static inline bf16 store(float number) {
    union { float number; uint32_t bits; } u = {.number = number};
    uint32_t rounded = (u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16;
    return number != number ? 0x7fc0 : (bf16)rounded;
}

/* e^x with a relative error below 2e-7; 0 and infinity at the ends, NaN for NaN. */
static inline float exponential(float x) {
    float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    float whole = rintf(clamped * 1.44269504f);
    float rest = fmaf(whole, -0.693359375f, clamped);
    rest = fmaf(whole, 2.12194440e-4f, rest);
    float power = 1.9875691e-4f;
    power = fmaf(power, rest, 1.3981999e-3f);
    power = fmaf(power, rest, 8.3334519e-3f);
    power = fmaf(power, rest, 4.1665796e-2f);
    power = fmaf(power, rest, 1.6666665e-1f);
    power = fmaf(power, rest, 5.0000001e-1f);
    power = fmaf(power, rest * rest, rest + 1.0f);
    union { int32_t bits; float number; } two = {.bits = ((int32_t)whole + 127) << 23};
    return power * two.number;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* sum = x + branch (branch may be NULL: then sum is not written); y = sum / rms(sum) * weight. */
void rms_norm(const bf16 *x, const bf16 *branch, const float *weight, bf16 *sum, bf16 *y,
              float *inverse, int64_t rows, int64_t n, float epsilon) {
#pragma omp parallel for schedule(static)
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
#pragma omp parallel for schedule(static)
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
#pragma omp parallel for schedule(static)
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
#pragma omp parallel for schedule(static)
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
#pragma omp parallel for schedule(static)
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

/* From x [tokens, (heads + 2 kv_heads) dim] to rotated q and k, and v, in sample order.
 * cosine, sine: [tokens, dim / 2]. */
void split_heads(const bf16 *x, const float *cosine, const float *sine, const int32_t *borders,
                 bf16 *q, bf16 *k, bf16 *v, int64_t samples, int64_t heads, int64_t kv_heads,
                 int64_t dim) {
    int64_t width = (heads + 2 * kv_heads) * dim;
    for (int64_t sample = 0; sample < samples; sample++) {
        int64_t first = borders[sample], count = borders[sample + 1] - first;
#pragma omp parallel for schedule(static)
        for (int64_t t = 0; t < count; t++) {
            const bf16 *row = x + (first + t) * width;
            const float *c = cosine + (first + t) * (dim / 2), *s = sine + (first + t) * (dim / 2);
            for (int64_t h = 0; h < heads; h++)
                rotate(row + h * dim, q + (first * heads + h * count + t) * dim, c, s, dim, 1.0f);
            row += heads * dim;
            for (int64_t h = 0; h < kv_heads; h++) {
                int64_t place = (first * kv_heads + h * count + t) * dim;
                rotate(row + h * dim, k + place, c, s, dim, 1.0f);
                memcpy(v + place, row + (kv_heads + h) * dim, dim * sizeof(bf16));
            }
        }
    }
}

/* Gradient of split_heads. */
void split_heads_backward(const bf16 *q, const bf16 *k, const bf16 *v, const float *cosine,
                          const float *sine, const int32_t *borders, bf16 *x, int64_t samples,
                          int64_t heads, int64_t kv_heads, int64_t dim) {
    int64_t width = (heads + 2 * kv_heads) * dim;
    for (int64_t sample = 0; sample < samples; sample++) {
        int64_t first = borders[sample], count = borders[sample + 1] - first;
#pragma omp parallel for schedule(static)
        for (int64_t t = 0; t < count; t++) {
            bf16 *row = x + (first + t) * width;
            const float *c = cosine + (first + t) * (dim / 2), *s = sine + (first + t) * (dim / 2);
            for (int64_t h = 0; h < heads; h++)
                rotate(q + (first * heads + h * count + t) * dim, row + h * dim, c, s, dim, -1.0f);
            row += heads * dim;
            for (int64_t h = 0; h < kv_heads; h++) {
                int64_t place = (first * kv_heads + h * count + t) * dim;
                rotate(k + place, row + h * dim, c, s, dim, -1.0f);
                memcpy(row + (kv_heads + h) * dim, v + place, dim * sizeof(bf16));
            }
        }
    }
}

/* Between [tokens, heads, dim] and sample order. */
void reorder_heads(const bf16 *from, bf16 *to, const int32_t *borders, int64_t samples,
                   int64_t heads, int64_t dim, int64_t to_samples) {
    for (int64_t sample = 0; sample < samples; sample++) {
        int64_t first = borders[sample], count = borders[sample + 1] - first;
#pragma omp parallel for schedule(static)
        for (int64_t t = 0; t < count; t++)
            for (int64_t h = 0; h < heads; h++) {
                int64_t flat = ((first + t) * heads + h) * dim;
                int64_t ordered = (first * heads + h * count + t) * dim;
                memcpy(to + (to_samples ? ordered : flat), from + (to_samples ? flat : ordered),
                       dim * sizeof(bf16));
            }
    }
}

/* Which keys row `row` sees: [*low, *high). Rows repeat every `queries`; the first sees `seen`. */
static inline void visible(int64_t row, int64_t queries, int64_t seen, int64_t window,
                           int64_t *low, int64_t *high) {
    *high = seen + row % queries;
    *low = window > 0 && *high > window ? *high - window : 0;
}

/* Scores [rows, keys] become softmax(scale * scores) over the visible keys, 0 elsewhere.
 * logarithms [rows] (or NULL): of the sums that the shares were divided by. */
void causal_softmax(bf16 *scores, float *logarithms, int64_t rows, int64_t keys, int64_t queries,
                    int64_t seen, int64_t window, float scale) {
#pragma omp parallel for schedule(static, 8)
    for (int64_t row = 0; row < rows; row++) {
        bf16 *s = scores + row * keys;
        int64_t low, high;
        visible(row, queries, seen, window, &low, &high);
        /* A copy of whole vectors: the tail of a short row would cost more than the rest. */
        int64_t count = high - low, padded = (count + 15) / 16 * 16;
        float values[padded], largest = -INFINITY, total = 0.0f;
#pragma omp simd reduction(max : largest)
        for (int64_t i = 0; i < count; i++) {
            values[i] = load(s[low + i]);
            largest = largest < values[i] ? values[i] : largest;
        }
        for (int64_t i = count; i < padded; i++) values[i] = -INFINITY;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < padded; i++) {
            values[i] = exponential((values[i] - largest) * scale);
            total += values[i];
        }
        if (logarithms) logarithms[row] = largest * scale + logf(total);
        float factor = 1.0f / total;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) s[low + i] = store(values[i] * factor);
        memset(s, 0, low * sizeof(bf16));
        memset(s + high, 0, (keys - high) * sizeof(bf16));
    }
}

/* grad [rows, keys] of the shares becomes the gradient of the scores. */
void causal_softmax_backward(const bf16 *shares, bf16 *grad, int64_t rows, int64_t keys,
                             int64_t queries, int64_t seen, int64_t window, float scale) {
#pragma omp parallel for schedule(static, 8)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *p = shares + row * keys;
        bf16 *g = grad + row * keys;
        int64_t low, high;
        visible(row, queries, seen, window, &low, &high);
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = low; i < high; i++) dot += load(p[i]) * load(g[i]);
#pragma omp simd
        for (int64_t i = low; i < high; i++)
            g[i] = store(load(p[i]) * (load(g[i]) - dot) * scale);
        memset(g, 0, low * sizeof(bf16));
        memset(g + high, 0, (keys - high) * sizeof(bf16));
    }
}

/* Logits [rows, n] become the gradient of their own loss; losses [rows] are returned. */
void cross_entropy(bf16 *logits, const int64_t *targets, float *losses, int64_t rows, int64_t n) {
#pragma omp parallel for schedule(static)
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
