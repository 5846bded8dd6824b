"""C text of the sums of the exact method over float32 groups, on one thread or several.

Numbers are added up in the order of `ordered_sums`, so that both find the same bit for bit: 16 by halves in REAL, what
comes of them in float64, from the first to the last. Threads share columns or runs, and change no order.
"""

SUMS = """
#define UNIT 16 /* numbers that are added up in REAL */
#define SIDE 64 /* neighbours in a run that are added up apart */
#define PIECE (UNIT * SIDE)
#define BLOCK 1024 /* columns at once */

/* levels: of each column or chosen run; nothing for norms. others: largest magnitudes without levels, counts with. */
typedef struct {
    const float *x;
    const REAL *levels;
    const int64_t *chosen;
    double *totals;
    REAL *others;
    int64_t rows, columns;
} sums_t;

static inline REAL above(float x, REAL level) {
    const REAL over = (REAL)fabsf(x) - level;
    return over > 0 ? over : 0;
}

/* Add up 16 rows of at most BLOCK columns by halves, four rows at once: of more, memory brings less. */
static void add_unit(const float *const *row, const REAL *restrict levels, double *restrict totals,
    REAL *restrict others, int64_t width) {
    REAL quarters[4][BLOCK];
    for (int q = 0; q < 4; q++) {
        const float *x = row[q], *y = row[q + 8], *z = row[q + 4], *w = row[q + 12];
        REAL *restrict sum = quarters[q];
        if (levels) {
            _Pragma("omp simd")
            for (int64_t c = 0; c < width; c++) {
                const REAL a = above(x[c], levels[c]), b = above(y[c], levels[c]);
                const REAL d = above(z[c], levels[c]), e = above(w[c], levels[c]);
                sum[c] = (a + b) + (d + e);
                others[c] += (REAL)((a > 0) + (b > 0) + (d > 0) + (e > 0));
            }
        } else {
            _Pragma("omp simd")
            for (int64_t c = 0; c < width; c++) {
                const REAL a = fabsf(x[c]), b = fabsf(y[c]), d = fabsf(z[c]), e = fabsf(w[c]);
                const REAL f = LARGER(a, b), g = LARGER(d, e), most = LARGER(f, g);
                sum[c] = (a + b) + (d + e);
                others[c] = LARGER(most, others[c]);
            }
        }
    }
    _Pragma("omp simd")
    for (int64_t c = 0; c < width; c++)
        totals[c] += (quarters[0][c] + quarters[2][c]) + (quarters[1][c] + quarters[3][c]);
}

/* Add up columns [first, last) of (rows, columns); rows that a last unit lacks are zeros. */
static void *sums_of_columns(void *given) {
    const piece_t *p = given;
    const sums_t *s = p->source;
    static const float zeros[BLOCK];
    for (int64_t r = 0; r < s->rows; r += UNIT)
        for (int64_t c = p->first; c < p->last; c += BLOCK) {
            const float *row[UNIT];
            for (int64_t i = 0; i < UNIT; i++) row[i] = r + i < s->rows ? s->x + (r + i) * s->columns + c : zeros;
            add_unit(row, s->levels ? s->levels + c : 0, s->totals + c, s->others + c, SMALLER(BLOCK, p->last - c));
        }
    for (int64_t c = p->first; c < p->last; c++)
        if (s->totals[c] != s->totals[c]) s->others[c] = NAN;
    return 0;
}

/* Add up a piece of a run by halves: the same for 16 rows of SIDE columns, which fit into registers. */
static void add_piece(const float *restrict x, const REAL *level, double *restrict totals, REAL *restrict others) {
    if (level) {
        const REAL high = *level;
        _Pragma("omp simd")
        for (int c = 0; c < SIDE; c++) {
            REAL quarter[4];
            int32_t count = 0;
            for (int q = 0; q < 4; q++) {
                const REAL a = above(x[q * SIDE + c], high), b = above(x[(q + 8) * SIDE + c], high);
                const REAL d = above(x[(q + 4) * SIDE + c], high), e = above(x[(q + 12) * SIDE + c], high);
                quarter[q] = (a + b) + (d + e);
                count += (a > 0) + (b > 0) + (d > 0) + (e > 0);
            }
            others[c] += (REAL)count;
            totals[c] += (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
        }
    } else {
        _Pragma("omp simd")
        for (int c = 0; c < SIDE; c++) {
            REAL quarter[4], most = others[c];
            for (int q = 0; q < 4; q++) {
                const REAL a = fabsf(x[q * SIDE + c]), b = fabsf(x[(q + 8) * SIDE + c]);
                const REAL d = fabsf(x[(q + 4) * SIDE + c]), e = fabsf(x[(q + 12) * SIDE + c]);
                const REAL f = LARGER(a, b), g = LARGER(d, e), h = LARGER(f, g);
                quarter[q] = (a + b) + (d + e);
                most = LARGER(h, most);
            }
            others[c] = most;
            totals[c] += (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
        }
    }
}

/* Add up chosen runs [first, last); what a last piece lacks is zeros. */
static void *sums_of_runs(void *given) {
    const piece_t *p = given;
    const sums_t *s = p->source;
    for (int64_t g = p->first; g < p->last; g++) {
        const float *x = s->x + (s->chosen ? s->chosen[g] : g) * s->columns;
        const REAL *level = s->levels ? s->levels + g : 0;
        double totals[SIDE] = {0}, sum = 0;
        REAL others[SIDE] = {0}, found = 0;
        for (int64_t at = 0; at < s->columns; at += PIECE) {
            float last[PIECE];
            const int64_t left = s->columns - at;
            for (int i = 0; i < PIECE; i += 16) __builtin_prefetch(x + at + 2 * PIECE + i);
            if (left < PIECE) {
                memcpy(last, x + at, left * sizeof(float));
                memset(last + left, 0, (PIECE - left) * sizeof(float));
            }
            add_piece(left < PIECE ? last : x + at, level, totals, others);
        }
        for (int c = 0; c < SIDE; c++)
            found = level ? found + others[c] : totals[c] != totals[c] ? NAN : LARGER(others[c], found);
        for (int c = 0; c < SIDE; c++) sum += totals[c];
        s->others[g] = found;
        s->totals[g] = sum;
    }
    return 0;
}

/* x: (rows, columns). levels, totals, others: (columns,); the last two hold zeros. */
void column_sums_REAL(const float *x, const REAL *levels, double *totals, REAL *others, int64_t rows,
    int64_t columns, int64_t threads) {
    const sums_t sums = {x, levels, 0, totals, others, rows, columns};
    in_pieces(sums_of_columns, (piece_t){&sums, 0, 0, 0, 0, 0, 0}, 0, columns, threads);
}

/* x: (runs, columns), of which some are chosen, or all. levels, totals, others: (chosen,). */
void run_sums_REAL(const float *x, const int64_t *chosen, const REAL *levels, double *totals, REAL *others,
    int64_t runs, int64_t columns, int64_t threads) {
    const sums_t sums = {x, levels, chosen, totals, others, 0, columns};
    in_pieces(sums_of_runs, (piece_t){&sums, 0, 0, 0, 0, 0, 0}, 0, runs, threads);
}
"""
