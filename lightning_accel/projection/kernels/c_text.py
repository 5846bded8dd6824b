"""C text of the passes over memory: largest magnitudes of groups, and clamps, on one thread or several.

Magnitudes are compared as integers, whose order is theirs once the sign bit is gone: NaN is above infinity then, and
stays what it is. So results are those of the eager passes bit for bit, whatever the order of the work.

Tensors are contiguous ``(before, groups, after)``. Long runs of one group are worked on run by run; short ones as
columns of ``(before, groups * after)``, of which narrow ones are laid side by side, so that loops stay long.
"""

from lightning_accel.projection.kernels.c_sums import SUMS
from lightning_accel.projection.kernels.c_thresholds import thresholds_text

_MOST_PIECES = 64

_HEAD = """
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LONG 64 /* entries of a run */
#define WIDE 512 /* entries of a row */
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
#define PIECES(threads, rows) LARGER(1, SMALLER(THREADS, SMALLER(threads, rows)))

typedef struct {
    const void *source, *bounds;
    void *target;
    int64_t first, last, columns, groups;
} piece_t;

/* What runs a function on each thread of a team: GOMP_parallel of the OpenMP runtime that torch computes with. Its
   threads are awake, and wait for work on the cores that threads of our own would need. Nothing where it is another. */
typedef void (*team_t)(void (*)(void *), void *, unsigned, unsigned);
static team_t team;
void work_with(team_t found) { team = found; }

typedef struct {
    void *(*work)(void *);
    piece_t *pieces;
    int64_t count, next;
} shared_t;

static void take_pieces(void *given) {
    shared_t *s = given;
    for (int64_t i; (i = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED)) < s->count;) s->work(&s->pieces[i]);
}

/* Cut rows into a piece a thread, at most one a row. A thread that does not start is done without. */
static void in_pieces(void *(*work)(void *), piece_t whole, int64_t stride, int64_t rows, int64_t threads) {
    const int64_t count = PIECES(threads, rows);
    pthread_t ids[THREADS];
    piece_t pieces[THREADS];
    char begun[THREADS];
    for (int64_t i = 0; i < count; i++) {
        pieces[i] = whole;
        pieces[i].target = (char *)whole.target + i * stride;
        pieces[i].first = rows * i / count;
        pieces[i].last = rows * (i + 1) / count;
    }
    if (team && count > 1) { /* all threads, for a smaller team would end those that it leaves out */
        shared_t shared = {work, pieces, count, 0};
        team(take_pieces, &shared, threads, 0);
        return;
    }
    for (int64_t i = 0; i < count; i++) begun[i] = i + 1 < count && !pthread_create(&ids[i], 0, work, &pieces[i]);
    for (int64_t i = 0; i < count; i++)
        if (!begun[i]) work(&pieces[i]);
    for (int64_t i = 0; i < count; i++)
        if (begun[i]) pthread_join(ids[i], 0);
}

/* How many rows to lay side by side. */
static int64_t side_by_side(int64_t rows, int64_t width) {
    const int64_t most = WIDE / LARGER(width, 1);
    return LARGER(1, SMALLER(most, rows));
}
"""

_LARGEST = """
#define MAGNITUDE ((TYPE)(((UNSIGNED)-1) >> 1))
#define SIGN ((TYPE)~MAGNITUDE)
#define LANES (256 / (int)sizeof(TYPE))

static void *largest_of_runs_BITS(void *given) {
    const piece_t *p = given;
    TYPE *out = p->target;
    for (int64_t r = p->first; r < p->last; r++) {
        const TYPE *x = (const TYPE *)p->source + r * p->columns;
        TYPE lanes[LANES] = {0}, most = 0;
        int64_t c = 0;
        for (; c + LANES <= p->columns; c += LANES) {
            _Pragma("omp simd")
            for (int l = 0; l < LANES; l++) lanes[l] = LARGER(lanes[l], (TYPE)(x[c + l] & MAGNITUDE));
        }
        for (; c < p->columns; c++) most = LARGER(most, (TYPE)(x[c] & MAGNITUDE));
        for (int l = 0; l < LANES; l++) most = LARGER(most, lanes[l]);
        out[r] = most;
    }
    return 0;
}

static void *largest_of_columns_BITS(void *given) {
    const piece_t *p = given;
    const int64_t width = p->columns;
    TYPE *out = p->target;
    memset(out, 0, width * sizeof(TYPE));
    int64_t r = p->first;
    for (; r + 4 <= p->last; r += 4) {
        const TYPE *x = (const TYPE *)p->source + r * width;
        _Pragma("omp simd")
        for (int64_t c = 0; c < width; c++) {
            TYPE a = x[c] & MAGNITUDE, b = x[c + width] & MAGNITUDE;
            TYPE d = x[c + 2 * width] & MAGNITUDE, e = x[c + 3 * width] & MAGNITUDE;
            a = LARGER(a, b);
            d = LARGER(d, e);
            a = LARGER(a, d);
            out[c] = LARGER(out[c], a);
        }
    }
    for (; r < p->last; r++) {
        const TYPE *x = (const TYPE *)p->source + r * width;
        for (int64_t c = 0; c < width; c++) out[c] = LARGER(out[c], (TYPE)(x[c] & MAGNITUDE));
    }
    return 0;
}

/* Write the largest magnitude of each group; return 0, or 1 where there is no memory. */
int largest_BITS(const TYPE *x, TYPE *out, int64_t before, int64_t groups, int64_t after, int64_t threads) {
    if (after >= LONG || before == 1) {
        TYPE *runs = before == 1 ? out : malloc(before * groups * sizeof(TYPE));
        if (!runs) return 1;
        in_pieces(largest_of_runs_BITS, (piece_t){x, 0, runs, 0, 0, after, groups}, 0, before * groups, threads);
        if (before == 1) return 0;
        memset(out, 0, groups * sizeof(TYPE));
        for (int64_t b = 0; b < before; b++)
            for (int64_t g = 0; g < groups; g++) out[g] = LARGER(out[g], runs[b * groups + g]);
        free(runs);
        return 0;
    }
    const int64_t beside = side_by_side(before, groups * after), width = beside * groups * after;
    const int64_t rows = before / beside, rest = (before % beside) * groups * after;
    const int64_t pieces = PIECES(threads, rows);
    TYPE *found = malloc(pieces * width * sizeof(TYPE));
    if (!found) return 1;
    piece_t whole = {x, 0, found, 0, 0, width, groups};
    in_pieces(largest_of_columns_BITS, whole, width * sizeof(TYPE), rows, threads);
    for (int64_t c = 0; c < rest; c++) found[c] = LARGER(found[c], (TYPE)(x[rows * width + c] & MAGNITUDE));
    memset(out, 0, groups * sizeof(TYPE));
    for (int64_t i = 0; i < pieces * beside; i++)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t a = 0; a < after; a++) out[g] = LARGER(out[g], found[(i * groups + g) * after + a]);
    free(found);
    return 0;
}
"""

_CLAMP = """
static void *clamp_runs_BITS(void *given) {
    const piece_t *p = given;
    for (int64_t r = p->first; r < p->last; r++) {
        const TYPE *x = (const TYPE *)p->source + r * p->columns;
        TYPE *out = (TYPE *)p->target + r * p->columns;
        const TYPE level = ((const TYPE *)p->bounds)[r % p->groups];
        if (level == 0) {
            memset(out, 0, p->columns * sizeof(TYPE));
        } else if (level == INFINITE) {
            if (out != x) memcpy(out, x, p->columns * sizeof(TYPE));
        } else {
            _Pragma("omp simd")
            for (int64_t c = 0; c < p->columns; c++) out[c] = SMALLER((TYPE)(x[c] & MAGNITUDE), level) | (x[c] & SIGN);
        }
    }
    return 0;
}

static void *clamp_columns_BITS(void *given) {
    const piece_t *p = given;
    const TYPE *level = p->bounds;
    int64_t r = p->first;
    for (; r + 2 <= p->last; r += 2) {
        const TYPE *x = (const TYPE *)p->source + r * p->columns, *y = x + p->columns;
        TYPE *out = (TYPE *)p->target + r * p->columns, *other = out + p->columns;
        _Pragma("omp simd")
        for (int64_t c = 0; c < p->columns; c++) {
            const TYPE high = level[c], sign = high ? SIGN : 0;
            out[c] = SMALLER((TYPE)(x[c] & MAGNITUDE), high) | (x[c] & sign);
            other[c] = SMALLER((TYPE)(y[c] & MAGNITUDE), high) | (y[c] & sign);
        }
    }
    for (; r < p->last; r++) {
        const TYPE *x = (const TYPE *)p->source + r * p->columns;
        TYPE *out = (TYPE *)p->target + r * p->columns;
        _Pragma("omp simd")
        for (int64_t c = 0; c < p->columns; c++)
            out[c] = SMALLER((TYPE)(x[c] & MAGNITUDE), level[c]) | (x[c] & (level[c] ? SIGN : 0));
    }
    return 0;
}

/* Clamp each group to its bound: 0 clears it, infinity leaves it alone. Return 0, or 1 where there is no memory. */
int clamp_BITS(const TYPE *x, TYPE *out, const TYPE *bounds, int64_t before, int64_t groups, int64_t after,
    int64_t threads) {
    if (after >= LONG || before == 1) {
        in_pieces(clamp_runs_BITS, (piece_t){x, bounds, out, 0, 0, after, groups}, 0, before * groups, threads);
        return 0;
    }
    const int64_t beside = side_by_side(before, groups * after), width = beside * groups * after;
    const int64_t rows = before / beside, rest = before % beside;
    TYPE *levels = malloc(width * sizeof(TYPE)), *at = levels;
    if (!levels) return 1;
    for (int64_t i = 0; i < beside; i++)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t a = 0; a < after; a++) *at++ = bounds[g] == INFINITE ? MAGNITUDE : bounds[g];
    in_pieces(clamp_columns_BITS, (piece_t){x, levels, out, 0, 0, width, groups}, 0, rows, threads);
    piece_t last = {x + rows * width, levels, out + rows * width, 0, rest, groups * after, groups};
    clamp_columns_BITS(&last);
    free(levels);
    return 0;
}

/* Clear dead groups in place; to look: only where no entry is NaN or infinite. Return whether that was done: nothing
   was written otherwise. dead: (groups,). */
int clear_BITS(TYPE *x, const char *dead, int64_t before, int64_t groups, int64_t after, int64_t threads, int look) {
    TYPE *bounds = malloc(groups * sizeof(TYPE));
    int done = bounds && !(look && largest_BITS(x, bounds, before, groups, after, threads));
    for (int64_t g = 0; look && done && g < groups; g++) done = bounds[g] < INFINITE;
    for (int64_t g = 0; done && g < groups; g++) bounds[g] = dead[g] ? 0 : INFINITE;
    done = done && !clamp_BITS(x, x, bounds, before, groups, after, threads);
    free(bounds);
    return done;
}
"""


def passes_text(kind: str, bits: int, infinity: int, turns: int) -> str:
    """Return the text of the passes over floats of a kind.

    Args:
        kind: What the names of the functions end in: ``largest_<kind>`` and ``clamp_<kind>``; there are more for
            ``float``, see `c_thresholds`.
        bits: Of a float, 16, 32 or 64.
        infinity: Its bits, as an integer.
        turns: Evaluations from a start near a threshold, at most; see `c_thresholds`.
    """
    text = _LARGEST + _CLAMP
    for name, value in (("UNSIGNED", f"uint{bits}_t"), ("TYPE", f"int{bits}_t"), ("BITS", kind)):
        text = text.replace(name, value)
    head = f"#define THREADS {_MOST_PIECES}\n{_HEAD}#define INFINITE ((int{bits}_t){infinity})\n"
    return head + text + (thresholds_text(turns) if kind == "float" else "")


def sums_text(real: str) -> str:
    """Return the text of the sums over float32 groups, a library of its own: the bi-level method needs none.

    Args:
        real: The type in which levels are subtracted and sums begin, ``float`` or ``double``; names end in it.
    """
    return f"#define THREADS {_MOST_PIECES}\n{_HEAD}{SUMS}".replace("REAL", real)
