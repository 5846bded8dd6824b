"""C text of whole projections of float32 groups: largest magnitudes, the threshold and the clamp in one call."""

import sys

UNDECIDED, WITHIN, PROJECTED = range(3)  # what `project_float` returns

# sums go from the first group to the last, as those of the eager threshold do, so that both find the same
_THRESHOLDS = """
/* The ball: its radius; target: the radius less what rounding may add to a sum; enough: and with it; rounding: of a sum
   of norms, relative; low, slack: the least sum that is close enough to the target from a near start, and what rounding
   may add to it there. */
typedef struct { double radius, target, enough, rounding, low, slack; } ball_t;

/* Find the threshold of norms by Newton's method from below, which drops norms that cannot survive. Return PROJECTED,
   or WITHIN, where they lie in the ball, or UNDECIDED: they are not finite, or so close to the ball that the order of a
   sum decides. kept, below: what is left of the norms, and memory; both (groups,). */
static int threshold(const double *norms, double *kept, double *below, int64_t groups, const ball_t *ball,
    double *shift) {
    double size = 0.0, top = 0.0, rest;
    int64_t alive = groups, previous = -1;
    for (int64_t g = 0; g < groups; g++) size += norms[g];
    if (!(size < INFINITY)) return UNDECIDED;
    if (size * (1.0 + 2.0 * ball->rounding) <= ball->radius) return WITHIN;
    if (!(size * (1.0 - 2.0 * ball->rounding) > ball->radius)) return UNDECIDED;
    for (int64_t g = 0; g < groups; g++) top = LARGER(top, norms[g]);
    for (int64_t g = 0; g < groups; g++) below[g] = norms[g] - top;
    volatile double lost = ball->rounding * top; /* no fused multiplication, which rounds otherwise */
    double tau = (size - ball->target) / groups - top - lost;
    tau = LARGER(tau, -ball->target);
    for (;;) {
        int64_t count = 0;
        rest = 0.0;
        for (int64_t i = 0; i < alive; i++) {
            const double over = below[i] - tau;
            rest += over > 0.0 ? over : 0.0;
            below[count] = below[i];
            count += over > 0.0;
        }
        if (rest <= ball->enough || count == previous) break;
        tau += (rest - ball->target) / count;
        previous = alive = count;
    }
    const double scale = rest > ball->target ? ball->target / rest : 1.0;
    for (int64_t g = 0; g < groups; g++) {
        const double over = norms[g] - top - tau;
        kept[g] = (over > 0.0 ? over : 0.0) * scale;
    }
    *shift = top + tau;
    return PROJECTED;
}

/* Find the threshold of norms by Newton's method from one close to it; return PROJECTED, or UNDECIDED. */
static int near_threshold(const double *norms, double *kept, int64_t groups, const ball_t *ball, double *shift) {
    double tau = *shift;
    if (!(0.0 < tau && tau <= ball->radius)) return UNDECIDED;
    for (int turn = 0; turn < TURNS; turn++) {
        double rest = 0.0;
        int64_t count = 0;
        for (int64_t g = 0; g < groups; g++) kept[g] = norms[g] <= tau ? 0.0 : norms[g] - tau;
        for (int64_t g = 0; g < groups; g++) rest += kept[g];
        for (int64_t g = 0; g < groups; g++) count += kept[g] != 0.0;
        if (ball->low <= rest && rest <= ball->target) {
            *shift = tau;
            return PROJECTED;
        }
        if (!(rest <= MOST) || count == 0) break;
        tau += (rest - ball->target + ball->slack) / count;
        if (!(0.0 < tau && tau <= ball->radius)) break;
    }
    return UNDECIDED;
}

static void round_bounds(float *bounds, const double *kept, int64_t groups, double keep) {
    for (int64_t g = 0; g < groups; g++) {
        const double bound = kept[g] * keep;
        bounds[g] = bound > TINY ? (float)bound : 0.0f;
    }
}

/* Project groups onto the ball of their largest magnitudes. Return PROJECTED, or, with nothing written, what
   `threshold` returns; UNDECIDED also where there is no memory. */
int project_float(const float *x, float *out, int64_t before, int64_t groups, int64_t after, int64_t threads,
    double radius, double target, double enough, double rounding, double keep) {
    const ball_t ball = {radius, target, enough, rounding, 0.0, 0.0};
    double *norms = malloc(groups * (3 * sizeof(double) + sizeof(float))), shift;
    double *kept = norms + groups, *other = kept + groups;
    float *bounds = (float *)(other + groups);
    int found = UNDECIDED;
    if (!norms || largest_float((const int32_t *)x, (int32_t *)bounds, before, groups, after, threads)) goto end;
    for (int64_t g = 0; g < groups; g++) norms[g] = bounds[g];
    found = threshold(norms, kept, other, groups, &ball, &shift);
    if (found != PROJECTED) goto end;
    round_bounds(bounds, kept, groups, keep);
    if (clamp_float((const int32_t *)x, (int32_t *)out, (const int32_t *)bounds, before, groups, after, threads))
        found = UNDECIDED;
end:
    free(norms);
    return found;
}

/* One of several tensors that are projected in place, each onto a ball of its own, or whose smallest groups are
   cleared. norms, kept: before and after, (groups,), infinite where a group was left alone; memory: of groups doubles
   and as many floats. dead: (groups,), in and out; fresh: how many are new. cleared: how many groups are to go. shift:
   the threshold, in and out; 0 where none is known, or nothing was done. */
typedef struct {
    float *x;
    double *norms, *kept, *memory;
    char *dead;
    int64_t before, groups, after, threads, found, cleared, fresh;
    ball_t ball;
    double shift;
} part_t;

static float *bounds_of(const part_t *p) { return (float *)(p->memory + p->groups); }

static int largest_of(const part_t *p) {
    return largest_float((const int32_t *)p->x, (int32_t *)bounds_of(p), p->before, p->groups, p->after, p->threads);
}

static int clamp_to_bounds(const part_t *p) {
    int32_t *x = (int32_t *)p->x, *bounds = (int32_t *)bounds_of(p);
    return clamp_float(x, x, bounds, p->before, p->groups, p->after, p->threads);
}

/* Project all parts in place, or none: return whether that was done. What fails for want of memory may be
   done again. */
int project_parts_float(part_t *parts, int64_t count, double keep) {
    int failed = 0;
    for (part_t *p = parts; p < parts + count; p++) {
        if (largest_of(p)) return 0;
        for (int64_t g = 0; g < p->groups; g++) p->norms[g] = bounds_of(p)[g];
        p->found = near_threshold(p->norms, p->kept, p->groups, &p->ball, &p->shift);
        if (p->found == PROJECTED) continue;
        p->shift = 0.0;
        p->found = threshold(p->norms, p->kept, p->memory, p->groups, &p->ball, &p->shift);
        if (p->found == UNDECIDED) return 0;
        for (int64_t g = 0; p->found == WITHIN && g < p->groups; g++) p->kept[g] = INFINITY;
    }
    for (part_t *p = parts; p < parts + count; p++) {
        if (p->found == WITHIN) continue;
        round_bounds(bounds_of(p), p->kept, p->groups, keep);
        failed |= clamp_to_bounds(p);
    }
    return !failed;
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

/* Find which groups of a part are to go: the smallest, of equal ones the first, as many as are to be cleared, and all
   dead ones, which count as zero. Return whether all is finite; nothing was written to x. */
static int choose_smallest(part_t *p) {
    float *bounds = bounds_of(p), *sorted = (float *)p->memory, high = INFINITY;
    const char *dead = p->dead;
    int64_t zeros = 0, found = 0, equal = p->cleared;
    int finite = 1;
    for (int64_t g = 0; g < p->groups; g++) finite &= bounds[g] < INFINITY;
    if (!finite) return 0;
    for (int64_t g = 0; g < p->groups; g++) bounds[g] = dead[g] ? 0.0f : bounds[g];
    for (int64_t g = 0; g < p->groups; g++) p->norms[g] = bounds[g];
    for (int64_t g = 0; g < p->groups; g++) zeros += bounds[g] == 0.0f;
    for (int64_t g = 0; g < p->groups; g++) p->kept[g] = dead[g] ? 0.0 : INFINITY;
    for (int64_t g = 0; g < p->groups; g++) found += dead[g] != 0;
    p->shift = p->fresh = 0;
    p->found = found;
    if (zeros >= p->cleared) return 1; /* most steps of a fit */
    memcpy(sorted, bounds, p->groups * sizeof(float));
    const float low = select_float(sorted, p->groups, p->cleared - 1);
    if (p->cleared == p->groups) high = low;
    for (int64_t g = p->cleared; g < p->groups; g++) high = SMALLER(high, sorted[g]);
    for (int64_t g = 0; g < p->groups; g++) equal -= bounds[g] < low;
    p->shift = low + 0.5 * ((double)high - low);
    for (int64_t g = 0; g < p->groups; g++)
        if (bounds[g] < low || (bounds[g] == low && equal-- > 0)) {
            p->fresh += !dead[g];
            p->kept[g] = 0.0;
        }
    p->found += p->fresh;
    return 1;
}

/* Clear the smallest groups of all parts in place, or of none, where one holds NaN or infinity: return whether that was
   done. */
int clear_parts_float(part_t *parts, int64_t count) {
    int failed = 0;
    for (part_t *p = parts; p < parts + count; p++)
        if (largest_of(p) || !choose_smallest(p)) return 0;
    for (part_t *p = parts; p < parts + count; p++) {
        if (!p->found) continue;
        for (int64_t g = 0; g < p->groups; g++) bounds_of(p)[g] = p->kept[g];
        failed |= clamp_to_bounds(p);
        for (int64_t g = 0; p->fresh && g < p->groups; g++) p->dead[g] = p->kept[g] == 0.0;
    }
    return !failed;
}
"""

# products are rounded before anything is added to them, as in eager operations: each loop is a function of its own, so
# that no compiler makes one rounding of two
_TANGENTS = """
#define APART static __attribute__((noinline)) void

APART divide(const double *mu, const double *above, const double *count, double *at_zero, double *slope, int64_t n) {
    for (int64_t g = 0; g < n; g++) at_zero[g] = mu[g] + above[g] / count[g];
    for (int64_t g = 0; g < n; g++) slope[g] = 1.0 / count[g];
}

APART multiply(const double *a, const double *b, double *out, int64_t n) {
    for (int64_t g = 0; g < n; g++) out[g] = a[g] * b[g];
}

APART scale(const double *a, double factor, double *out, int64_t n) {
    for (int64_t g = 0; g < n; g++) out[g] = factor * a[g];
}

APART add_to(const double *a, double *out, int64_t n) {
    for (int64_t g = 0; g < n; g++) out[g] = a[g] + out[g];
}

static int64_t count_above(const double *crossing, double level, int64_t n) {
    int64_t found = 0;
    for (int64_t g = 0; g < n; g++) found += crossing[g] > level;
    return found;
}

/* What `newton.solve_tangents` does, bit for bit. totals: (n,), or nothing; update: (n,), the terms; memory: (3, n).
   Return theta. */
double solve_tangents(const double *mu, const double *above, const double *count, const double *totals,
    double *update, double *memory, int64_t n, double target, double guess) {
    double *at_zero = memory, *slope = at_zero + n, *crossing = slope + n, theta = guess;
    divide(mu, above, count, at_zero, slope, n);
    multiply(mu, count, crossing, n);
    add_to(above, crossing, n);
    int64_t number = count_above(crossing, theta, n), falls = 0;
    if (!number) {
        theta = 0.0;
        number = n;
    }
    for (;; falls = 1) {
        double sum = 0.0, slopes = 0.0;
        for (int64_t g = 0; g < n; g++) {
            sum += crossing[g] > theta ? at_zero[g] : 0.0;
            slopes += crossing[g] > theta ? slope[g] : 0.0;
        }
        theta = (sum - target) / slopes;
        const int64_t left = count_above(crossing, theta, n);
        if (!left || left == number || (falls && left > number)) break;
        number = left;
    }
    scale(slope, theta, update, n);
    for (int64_t g = 0; g < n; g++) {
        const double rest = at_zero[g] - update[g];
        update[g] = rest > 0.0 && !(totals && totals[g] <= theta) ? rest : 0.0;
    }
    return theta;
}

/* Whether newton.solve has come to its end: bounds have moved by as much as their precision at most. */
int has_settled(const double *update, const double *mu, const double *count, int64_t n, double theta,
    double tolerance) {
    double moved = 0.0, size = -INFINITY;
    for (int64_t g = 0; g < n; g++) moved = LARGER(moved, fabs(update[g] - mu[g]));
    for (int64_t g = 0; g < n; g++) {
        const double most = update[g] + theta / count[g];
        size = LARGER(size, most);
    }
    return moved <= tolerance * size;
}
"""


def thresholds_text(turns: int) -> str:
    """Return the text; it stands behind that of the passes.

    Args:
        turns: Evaluations from a start near the threshold, at most.
    """
    numbers = {"TURNS": turns, "TINY": 2.0**-126, "MOST": sys.float_info.max}
    numbers |= {"UNDECIDED": UNDECIDED, "WITHIN": WITHIN, "PROJECTED": PROJECTED}
    return "".join(f"#define {name} {value!r}\n" for name, value in numbers.items()) + _THRESHOLDS + _TANGENTS
