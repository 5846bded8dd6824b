"""C text of the passes over memory; `machine_code` compiles and calls it.

Magnitudes are compared as integers: without the sign bit, floating-point numbers are in the order of their bits, and
NaN is above infinity. So one text serves all types, maxima keep NaN, and what is not clipped keeps its bits.
"""

import re

_HEAD = """
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#define MOST_THREADS 64
#define LINES 64 /* entries that are looked at together before any of them is written */
#define TILE 8192 /* columns whose running values stay in the first-level caches */
#define SUMMED 1024 /* entries of a row that are summed in float32 before float64 takes over */
#define TALL 32 /* entries of a column, likewise */
typedef struct task {
    void (*work)(const struct task *, int64_t, int64_t);
    int64_t begin, end;
    const void *x;
    void *out;
    const void *levels;
    const int64_t *chosen;
    double *sums, *counts;
    void *largest;
    int64_t before, groups, after, inf;
} task_t;
static void *start_part(void *task) {
    const task_t *t = task;
    t->work(t, t->begin, t->end);
    return 0;
}
/* Cut 0..size into parts at multiples of `unit`, one a thread. */
static void in_parts(task_t task, int64_t size, int64_t unit, int64_t threads) {
    task_t parts[MOST_THREADS];
    pthread_t handles[MOST_THREADS];
    int started[MOST_THREADS];
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    int64_t step = (size + threads - 1) / threads;
    step = (step + unit - 1) / unit * unit;
    int count = 0;
    for (int64_t begin = 0; begin < size; begin += step, ++count) {
        parts[count] = task;
        parts[count].begin = begin;
        parts[count].end = begin + step < size ? begin + step : size;
    }
    for (int i = 1; i < count; ++i) started[i] = !pthread_create(&handles[i], 0, start_part, &parts[i]);
    if (count) start_part(&parts[0]);
    for (int i = 1; i < count; ++i) {
        if (started[i]) pthread_join(handles[i], 0);
        else start_part(&parts[i]);
    }
}
"""

# WORD is the integer of the type's size, _W its suffix
_WORDS = """
#define MASK ((WORD)~((UWORD)1 << (8 * sizeof(WORD) - 1)))
static inline WORD larger_W(WORD a, WORD b) { return a > b ? a : b; }
static WORD largest_W(const WORD *x, int64_t n) {
    WORD m = 0;
    for (int64_t i = 0; i < n; ++i) m = larger_W(m, x[i] & MASK);
    return m;
}
static void max_rows_W(const task_t *t, int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) ((WORD *)t->out)[g] = largest_W((const WORD *)t->x + g * t->after, t->after);
}
/* Columns begin..end of (before, width), four rows at a time. */
static void max_columns_W(const task_t *t, int64_t begin, int64_t end) {
    const int64_t width = t->groups * t->after;
    for (int64_t c = begin; c < end; c += TILE) {
        const int64_t n = c + TILE < end ? TILE : end - c;
        WORD *restrict m = (WORD *)t->out + c;
        memset(m, 0, n * sizeof(WORD));
        int64_t r = 0;
        for (; r + 4 <= t->before; r += 4) {
            const WORD *restrict x0 = (const WORD *)t->x + r * width + c;
            const WORD *restrict x1 = x0 + width, *restrict x2 = x1 + width, *restrict x3 = x2 + width;
            for (int64_t i = 0; i < n; ++i) {
                WORD a = larger_W(x0[i] & MASK, x1[i] & MASK), b = larger_W(x2[i] & MASK, x3[i] & MASK);
                m[i] = larger_W(m[i], larger_W(a, b));
            }
        }
        for (; r < t->before; ++r) {
            const WORD *restrict x0 = (const WORD *)t->x + r * width + c;
            for (int64_t i = 0; i < n; ++i) m[i] = larger_W(m[i], x0[i] & MASK);
        }
    }
}
/* `wide` has room for a word a column: (groups, after). */
void max_W(const void *x, int64_t before, int64_t groups, int64_t after, int64_t threads, void *wide, void *largest) {
    task_t task = {.x = x, .before = before, .groups = groups, .after = after};
    if (before == 1 && after > 1) {
        task.work = max_rows_W;
        task.out = largest;
        in_parts(task, groups, 16, threads);
        return;
    }
    task.work = max_columns_W;
    task.out = after == 1 ? largest : wide;
    in_parts(task, groups * after, 64, threads);
    if (after > 1)
        for (int64_t g = 0; g < groups; ++g) ((WORD *)largest)[g] = largest_W((WORD *)wide + g * after, after);
}
static inline WORD clipped_W(WORD v, WORD level, WORD inf) {
    const WORD m = v & MASK;
    return ((m > level) & (m <= inf) ? level : m) | (v & ~MASK);
}
static void clamp_row_W(const WORD *x, WORD *out, int64_t n, WORD level, WORD inf) {
    int64_t i = 0;
    if (x == out) {
        for (; i + LINES <= n; i += LINES) {
            WORD m = 0;
            for (int k = 0; k < LINES; ++k) m = larger_W(m, x[i + k] & MASK);
            if (m > level)
                for (int k = 0; k < LINES; ++k) out[i + k] = clipped_W(out[i + k], level, inf);
        }
        for (; i < n; ++i) out[i] = clipped_W(out[i], level, inf);
    } else {
        const WORD *restrict from = x;
        WORD *restrict to = out;
        for (; i < n; ++i) to[i] = clipped_W(from[i], level, inf);
    }
}
static void clamp_rows_W(const task_t *t, int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
        const WORD *x = (const WORD *)t->x + g * t->after, level = ((const WORD *)t->levels)[g];
        WORD *out = (WORD *)t->out + g * t->after;
        if (level == 0) memset(out, 0, t->after * sizeof(WORD));
        else if (level < (WORD)t->inf) clamp_row_W(x, out, t->after, level, (WORD)t->inf);
        else if (x != out) memcpy(out, x, t->after * sizeof(WORD));
    }
}
static void clamp_columns_W(const task_t *t, int64_t begin, int64_t end) {
    const int64_t width = t->groups * t->after;
    const WORD inf = (WORD)t->inf;
    for (int64_t c = begin; c < end; c += TILE) {
        const int64_t n = c + TILE < end ? TILE : end - c;
        const WORD *restrict level = (const WORD *)t->levels + c;
        for (int64_t r = 0; r < t->before; ++r) {
            const WORD *x = (const WORD *)t->x + r * width + c;
            WORD *out = (WORD *)t->out + r * width + c;
            int64_t i = 0;
            if (x == out) {
                for (; i + LINES <= n; i += LINES) {
                    WORD above = 0;
                    for (int k = 0; k < LINES; ++k) above = larger_W(above, (x[i + k] & MASK) - level[i + k]);
                    if (above > 0)
                        for (int k = 0; k < LINES; ++k) out[i + k] = clipped_W(out[i + k], level[i + k], inf);
                }
                for (; i < n; ++i) out[i] = clipped_W(out[i], level[i], inf);
            } else {
                const WORD *restrict from = x;
                WORD *restrict to = out;
                for (; i < n; ++i) to[i] = clipped_W(from[i], level[i], inf);
            }
        }
    }
}
void clamp_W(const void *x, void *out, int64_t before, int64_t groups, int64_t after, int64_t threads, void *wide,
    const void *levels, int64_t inf) {
    task_t task = {.x = x, .out = out, .before = before, .groups = groups, .after = after, .inf = inf};
    task.levels = levels;
    if (before == 1 && after > 1) {
        task.work = clamp_rows_W;
        in_parts(task, groups, 16, threads);
        return;
    }
    if (after > 1) {
        WORD *to = wide;
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t i = 0; i < after; ++i) *to++ = ((const WORD *)levels)[g];
        task.levels = wide;
    }
    task.work = clamp_columns_W;
    in_parts(task, groups * after, 64, threads);
}
#undef MASK
"""

# The l1 threshold: `thresholds.single_threshold`, whose comments hold here.
_THRESHOLD = """
#define EPSILON 2.220446049250313e-16
static double sum_above(const double *v, int64_t n, double tau, double *count) {
    double s[8] = {0}, k[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; ++j) {
            double d = v[i + j] - tau;
            s[j] += d > 0 ? d : 0.0;
            k[j] += d > 0 ? 1.0 : 0.0;
        }
    for (; i < n; ++i) {
        double d = v[i] - tau;
        s[0] += d > 0 ? d : 0.0;
        k[0] += d > 0 ? 1.0 : 0.0;
    }
    *count = ((k[0] + k[1]) + (k[2] + k[3])) + ((k[4] + k[5]) + (k[6] + k[7]));
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}
/* Write bounds, {norm, tau}; return whether anything is to be cut. `target`: radius less what rounding may add. */
int64_t threshold(const double *norms, int64_t n, double radius, double target, double *bounds, double *found) {
    double s[8] = {0}, top = 0, count;
    for (int64_t i = 0; i < n; ++i) {
        s[i & 7] += norms[i]; /* NaN stays in the sum */
        top = norms[i] > top ? norms[i] : top;
    }
    const double size = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    found[0] = size;
    found[1] = 0.0;
    if (!(size > radius) || size > 1.7976931348623157e308) {
        for (int64_t i = 0; i < n; ++i) bounds[i] = INFINITY;
        return 0;
    }
    for (int64_t i = 0; i < n; ++i) bounds[i] = norms[i] - top;
    double tau = (size - target) / n - top - n * EPSILON * top, previous = -1.0, rest;
    tau = tau > -target ? tau : -target;
    const double enough = target * (1.0 + EPSILON * n);
    while ((rest = sum_above(bounds, n, tau, &count)) > enough && count != previous) {
        tau += (rest - target) / count;
        previous = count;
    }
    const double scale = rest > target ? target / rest : 1.0;
    for (int64_t i = 0; i < n; ++i) {
        double d = bounds[i] - tau;
        bounds[i] = d > 0 ? d * scale : 0.0;
    }
    found[1] = top + tau;
    return 1;
}
"""

# The whole bi-level projection of one tensor, for float32 and float64; REAL is the type.
_WHOLE = """
/* Maxima, threshold, clamp. `words` has room for a word a column and two a group. */
int64_t project_W(void *x, void *out, int64_t before, int64_t groups, int64_t after, int64_t threads, WORD *words,
    double *tops, double *bounds, double *found, double radius, double target, int64_t inf) {
    WORD *largest = words, *levels = words + groups, *wide = levels + groups;
    max_W(x, before, groups, after, threads, wide, largest);
    for (int64_t g = 0; g < groups; ++g) {
        REAL value;
        memcpy(&value, largest + g, sizeof(REAL));
        tops[g] = value;
    }
    if (!threshold(tops, groups, radius, target, bounds, found)) return 0;
    for (int64_t g = 0; g < groups; ++g) { /* as `rounding.round_bound` */
        double bound = bounds[g];
        if (sizeof(REAL) == 4) {
            bound *= 1.0 - 0x1p-24;
            bound = bound > 0x1p-126 ? bound : 0.0;
        }
        REAL value = (REAL)bound;
        memcpy(levels + g, &value, sizeof(REAL));
    }
    clamp_W(x, out, before, groups, after, threads, wide, levels, inf);
    return 1;
}
"""

# Sums for the exact method, float32 and float64
_SUMS = """
#define MASK ((WORD)~((UWORD)1 << (8 * sizeof(WORD) - 1)))
typedef REAL reals_W __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));
typedef WORD words_W __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));
#define LANES ((int)(64 / sizeof(REAL)))
static inline double total_W(reals_W v) {
    double sum = 0;
    for (int j = 0; j < LANES; ++j) sum += v[j];
    return sum;
}
/* Sum of what is above a level in one row, and how many entries are. */
static double above_row_W(const REAL *x, int64_t n, REAL level, double *count) {
    double sum = 0, many = 0;
    int64_t i = 0;
    while (i + 2 * LANES <= n) {
        const int64_t stop = i + SUMMED < n ? i + SUMMED : n;
        reals_W a = {0}, b = {0};
        words_W k = {0};
        for (; i + 2 * LANES <= stop; i += 2 * LANES) {
            reals_W u = (reals_W)(*(const words_W *)(x + i) & MASK) - level;
            reals_W v = (reals_W)(*(const words_W *)(x + i + LANES) & MASK) - level;
            words_W p = u > 0, q = v > 0;
            a += (reals_W)((words_W)u & p);
            b += (reals_W)((words_W)v & q);
            k -= p + q;
        }
        sum += total_W(a + b);
        for (int j = 0; j < LANES; ++j) many += k[j];
    }
    for (; i < n; ++i) {
        const REAL d = (REAL)fabs((double)x[i]) - level;
        sum += d > 0 ? d : 0;
        many += d > 0;
    }
    *count = many;
    return sum;
}
static void above_rows_W(const task_t *t, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
        const REAL *x = (const REAL *)t->x + t->chosen[k] * t->after;
        t->sums[k] = above_row_W(x, t->after, ((const REAL *)t->levels)[k], t->counts + k);
    }
}
static void above_columns_W(const task_t *t, int64_t begin, int64_t end) {
    const int64_t width = t->groups * t->after;
    REAL part[TILE / 4], many[TILE / 4];
    for (int64_t c = begin; c < end; c += TILE / 4) {
        const int64_t n = c + TILE / 4 < end ? TILE / 4 : end - c;
        const REAL *restrict level = (const REAL *)t->levels + c;
        double *restrict sums = t->sums + c, *restrict counts = t->counts + c;
        memset(sums, 0, n * sizeof(double));
        memset(counts, 0, n * sizeof(double));
        for (int64_t r = 0; r < t->before;) {
            const int64_t stop = r + TALL < t->before ? r + TALL : t->before;
            memset(part, 0, n * sizeof(REAL));
            memset(many, 0, n * sizeof(REAL));
            for (; r < stop; ++r) {
                const WORD *restrict x = (const WORD *)t->x + r * width + c;
                for (int64_t i = 0; i < n; ++i) {
                    const WORD m = x[i] & MASK;
                    REAL v;
                    memcpy(&v, &m, sizeof(REAL));
                    v -= level[i];
                    part[i] += v > 0 ? v : (REAL)0;
                    many[i] += v > 0 ? (REAL)1 : (REAL)0;
                }
            }
            for (int64_t i = 0; i < n; ++i) sums[i] += part[i];
            for (int64_t i = 0; i < n; ++i) counts[i] += many[i];
        }
    }
}
/* Of chosen rows, or of all columns. */
void above_W(const void *x, int64_t before, int64_t groups, int64_t after, int64_t threads, const void *levels,
    const int64_t *chosen, int64_t many, double *sums, double *counts) {
    task_t task = {.x = x, .before = before, .groups = groups, .after = after, .levels = levels, .chosen = chosen};
    task.sums = sums;
    task.counts = counts;
    const int rows = before == 1 && after > 1;
    task.work = rows ? above_rows_W : above_columns_W;
    in_parts(task, rows ? many : groups * after, rows ? 16 : 64, threads);
}
static void norms_rows_W(const task_t *t, int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
        const WORD *x = (const WORD *)t->x + g * t->after;
        double sum = 0;
        WORD largest = 0;
        int64_t i = 0;
        words_W m = {0};
        while (i + 2 * LANES <= t->after) {
            const int64_t stop = i + SUMMED < t->after ? i + SUMMED : t->after;
            reals_W a = {0}, b = {0};
            for (; i + 2 * LANES <= stop; i += 2 * LANES) {
                words_W u = *(const words_W *)(x + i) & MASK, v = *(const words_W *)(x + i + LANES) & MASK;
                a += (reals_W)u;
                b += (reals_W)v;
                words_W p = u > m;
                m = (u & p) | (m & ~p);
                p = v > m;
                m = (v & p) | (m & ~p);
            }
            sum += total_W(a + b);
        }
        for (int j = 0; j < LANES; ++j) largest = m[j] > largest ? m[j] : largest;
        for (; i < t->after; ++i) {
            const WORD v = x[i] & MASK;
            largest = v > largest ? v : largest;
            sum += fabs((double)((const REAL *)t->x)[g * t->after + i]);
        }
        ((WORD *)t->largest)[g] = largest;
        t->sums[g] = sum;
    }
}
static void norms_columns_W(const task_t *t, int64_t begin, int64_t end) {
    const int64_t width = t->groups * t->after;
    REAL part[TILE / 4];
    for (int64_t c = begin; c < end; c += TILE / 4) {
        const int64_t n = c + TILE / 4 < end ? TILE / 4 : end - c;
        WORD *restrict m = (WORD *)t->largest + c;
        double *restrict sums = t->sums + c;
        memset(m, 0, n * sizeof(WORD));
        memset(sums, 0, n * sizeof(double));
        for (int64_t r = 0; r < t->before;) {
            const int64_t stop = r + TALL < t->before ? r + TALL : t->before;
            memset(part, 0, n * sizeof(REAL));
            for (; r < stop; ++r) {
                const WORD *restrict x = (const WORD *)t->x + r * width + c;
                for (int64_t i = 0; i < n; ++i) {
                    const WORD v = x[i] & MASK;
                    REAL value;
                    memcpy(&value, &v, sizeof(REAL));
                    part[i] += value;
                    m[i] = v > m[i] ? v : m[i];
                }
            }
            for (int64_t i = 0; i < n; ++i) sums[i] += part[i];
        }
    }
}
/* Largest magnitude and sum of magnitudes, of every row or every column. */
void norms_W(const void *x, int64_t before, int64_t groups, int64_t after, int64_t threads, void *largest,
    double *sums) {
    task_t task = {.x = x, .before = before, .groups = groups, .after = after, .largest = largest, .sums = sums};
    const int rows = before == 1 && after > 1;
    task.work = rows ? norms_rows_W : norms_columns_W;
    in_parts(task, rows ? groups : groups * after, rows ? 16 : 64, threads);
}
#undef MASK
#undef LANES
"""


def text() -> str:
    """Return the whole text."""
    parts = [_HEAD, _THRESHOLD]
    for bits, real in ((16, ""), (32, "float"), (64, "double")):
        body = _WORDS + (_WHOLE + _SUMS if real else "")
        body = body.replace("UWORD", f"uint{bits}_t").replace("WORD", f"int{bits}_t").replace("REAL", real)
        parts.append(re.sub(r"_W\b", f"_{bits}", body))
    return "\n".join(parts)
