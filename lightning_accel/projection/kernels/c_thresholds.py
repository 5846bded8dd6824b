"""C text of whole projections of float32 groups: largest magnitudes, the threshold and the clamp in one call."""

import sys

UNDECIDED, WITHIN, PROJECTED = range(3)  # what `project_float` returns

# sums go from the first group to the last, as those of the eager threshold do, so that both find the same
_THRESHOLDS = """
/* Project groups onto the ball of their largest magnitudes, by Newton's method from below, which drops norms that
   cannot survive. Return PROJECTED, or, with nothing written, WITHIN, where they lie in the ball, or UNDECIDED: there
   is no memory, they are not finite, or so close to the ball that the order of a sum decides.
   rounding: of a sum of norms, relative. target: the radius less what rounding may add; enough: and with it. */
int project_float(const float *x, float *out, int64_t before, int64_t groups, int64_t after, int64_t threads,
    double radius, double target, double enough, double rounding, double keep) {
    double *below = malloc(groups * (sizeof(double) + sizeof(float)));
    float *bounds = (float *)(below + groups);
    double size = 0.0, top = 0.0, rest;
    int64_t alive = groups, previous = -1;
    int found = UNDECIDED;
    if (!below || largest_float((const int32_t *)x, (int32_t *)bounds, before, groups, after, threads)) goto end;
    for (int64_t g = 0; g < groups; g++) size += bounds[g];
    if (!(size < INFINITY)) goto end;
    if (size * (1.0 + 2.0 * rounding) <= radius) found = WITHIN;
    if (!(size * (1.0 - 2.0 * rounding) > radius)) goto end;
    for (int64_t g = 0; g < groups; g++) top = LARGER(top, bounds[g]);
    for (int64_t g = 0; g < groups; g++) below[g] = bounds[g] - top;
    volatile double lost = rounding * top; /* no fused multiplication, which rounds otherwise */
    double tau = (size - target) / groups - top - lost;
    tau = LARGER(tau, -target);
    for (;;) {
        int64_t count = 0;
        rest = 0.0;
        for (int64_t i = 0; i < alive; i++) {
            const double over = below[i] - tau;
            rest += over > 0.0 ? over : 0.0;
            below[count] = below[i];
            count += over > 0.0;
        }
        if (rest <= enough || count == previous) break;
        tau += (rest - target) / count;
        previous = alive = count;
    }
    const double scale = rest > target ? target / rest : 1.0;
    for (int64_t g = 0; g < groups; g++) {
        const double over = bounds[g] - top - tau;
        const double bound = (over > 0.0 ? over : 0.0) * scale * keep;
        bounds[g] = bound > TINY ? (float)bound : 0.0f;
    }
    found = clamp_float((const int32_t *)x, (int32_t *)out, (const int32_t *)bounds, before, groups, after, threads)
        ? UNDECIDED : PROJECTED;
end:
    free(below);
    return found;
}

/* Project groups in place onto the ball of their largest magnitudes, by Newton's method from a threshold close to the
   one sought. Return whether it got there; nothing was written to x otherwise.
   tops, kept: norms before and after, (groups,). shift: the threshold, in and out. */
int project_near_float(float *x, double *tops, double *kept, int64_t before, int64_t groups, int64_t after,
    int64_t threads, double target, double low, double slack, double radius, double keep, double *shift) {
    float *bounds = malloc(groups * sizeof(float));
    double tau = *shift;
    int done = 0;
    if (!bounds || largest_float((const int32_t *)x, (int32_t *)bounds, before, groups, after, threads)) {
        free(bounds);
        return 0;
    }
    for (int64_t g = 0; g < groups; g++) tops[g] = bounds[g];
    for (int turn = 0; turn < TURNS && !done; turn++) {
        double rest = 0.0;
        int64_t count = 0;
        for (int64_t g = 0; g < groups; g++) kept[g] = tops[g] <= tau ? 0.0 : tops[g] - tau;
        for (int64_t g = 0; g < groups; g++) rest += kept[g];
        for (int64_t g = 0; g < groups; g++) count += kept[g] != 0.0;
        if (low <= rest && rest <= target) {
            done = 1;
        } else {
            if (!(rest <= MOST) || count == 0) break;
            tau += (rest - target + slack) / count;
            if (!(0.0 < tau && tau <= radius)) break;
        }
    }
    if (done) {
        for (int64_t g = 0; g < groups; g++) {
            const double bound = kept[g] * keep;
            bounds[g] = bound > TINY ? (float)bound : 0.0f;
        }
        done = !clamp_float((const int32_t *)x, (int32_t *)x, (const int32_t *)bounds, before, groups, after, threads);
        *shift = tau;
    }
    free(bounds);
    return done;
}

/* Return the entry of rank k, 0 the smallest, and leave all smaller ones before it (Hoare's selection). */
static float select_float(float *v, int64_t n, int64_t k) {
    int64_t left = 0, right = n - 1;
    while (left < right) {
        const float pivot = v[(left + right) / 2];
        int64_t i = left, j = right;
        while (i <= j) {
            while (v[i] < pivot) i++;
            while (pivot < v[j]) j--;
            if (i <= j) {
                const float other = v[i];
                v[i++] = v[j];
                v[j--] = other;
            }
        }
        if (k <= j) right = j;
        else if (k >= i) left = i;
        else break;
    }
    return v[k];
}

/* Clear the groups of the smallest magnitudes in place, of equal ones the first, and all dead ones, which count as the
   smallest. Return whether that was done: not where a magnitude is NaN or infinite.
   tops, left: magnitudes before; what is left of them, infinity for all: both (groups,). dead: (groups,), or nothing.
   tau: between the two kinds, 0 where zeros and dead ones are all that goes. */
int clear_smallest_float(float *x, double *tops, double *left, const char *dead, int64_t before, int64_t groups,
    int64_t after, int64_t threads, int64_t cleared, double *tau) {
    float *bounds = malloc(2 * groups * sizeof(float)), *sorted = bounds + groups;
    int64_t equal = cleared;
    int done = 0;
    if (!bounds || largest_float((const int32_t *)x, (int32_t *)bounds, before, groups, after, threads)) goto end;
    for (int64_t g = 0; g < groups; g++) {
        if (!(bounds[g] < INFINITY)) goto end;
        if (dead && dead[g]) bounds[g] = 0.0f;
        tops[g] = sorted[g] = bounds[g];
    }
    const float low = select_float(sorted, groups, cleared - 1);
    float high = cleared < groups ? INFINITY : low;
    for (int64_t g = cleared; g < groups; g++) high = SMALLER(high, sorted[g]);
    for (int64_t g = 0; g < groups; g++) equal -= bounds[g] < low;
    for (int64_t g = 0; g < groups; g++) {
        const int goes = low > 0.0f && (bounds[g] < low || (bounds[g] == low && equal-- > 0));
        bounds[g] = goes || (dead && dead[g]) ? 0.0f : INFINITY;
        left[g] = bounds[g];
    }
    *tau = low > 0.0f ? low + 0.5 * ((double)high - low) : 0.0;
    done = !clamp_float((const int32_t *)x, (int32_t *)x, (const int32_t *)bounds, before, groups, after, threads);
end:
    free(bounds);
    return done;
}
"""


def thresholds_text(turns: int) -> str:
    """Return the text; it stands behind that of the passes.

    Args:
        turns: Evaluations that ``project_near_float`` makes at most.
    """
    numbers = {"TURNS": turns, "TINY": 2.0**-126, "MOST": sys.float_info.max}
    numbers |= {"UNDECIDED": UNDECIDED, "WITHIN": WITHIN, "PROJECTED": PROJECTED}
    return "".join(f"#define {name} {value!r}\n" for name, value in numbers.items()) + _THRESHOLDS
