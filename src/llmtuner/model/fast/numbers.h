/* bfloat16 in memory, float in registers. */
#ifndef LLMTUNER_NUMBERS_H
#define LLMTUNER_NUMBERS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cores.h"

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

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t round_up(int64_t value, int64_t unit) {
    return (value + unit - 1) / unit * unit;
}

#endif
