"""C text of products of few rows with one matrix, as the loops over time make them at every step.

Libraries are made for large matrices: with 2 to 32 rows they pack the second factor at every call, which can cost more
than the product. Here it is packed once for all steps, in tiles as wide as some registers, and read in one piece.
"""

PRODUCTS_IN_C = """
typedef void (*product_t)(const char *, const char *, const int *, const int *, const int *, const real *, const real *,
    const int *, const real *, const int *, const real *, real *, const int *);
#if defined(__GNUC__) && defined(__AVX512F__)
#define FEW_ROWS 32
#define VECTOR_BYTES 64
#elif defined(__GNUC__) && defined(__AVX2__)
#define FEW_ROWS 4
#define VECTOR_BYTES 32
#else
#define FEW_ROWS 0
#define VECTOR_BYTES 32
#endif
#define LANES ((long)(VECTOR_BYTES / sizeof(real)))
typedef real lanes __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
/* Columns of a tile: one row alone needs several sums side by side, or each addition waits for the one before. */
static inline long tile_columns(long rows) {
    return (rows == 1 ? 8 : 2) * LANES;
}
/* W (inner, columns) as tiles one after another; NULL where the library's product is the better one. `whead` is the
   distance of its rows, or less the distance of its columns (below 0) where it lies column by column. */
static inline real *packed(long rows, long steps, long columns, long inner, const real *W, long whead) {
    if (rows > FEW_ROWS || steps < 4)
        return 0;
    const long tile = tile_columns(rows), tiles = (columns + tile - 1) / tile;
    real *const made = (real *)aligned_alloc(64, (size_t)((tiles * tile * inner * (long)sizeof(real) + 63) / 64 * 64));
    if (!made)
        return 0;
    for (long j = 0; j < tiles; ++j) {
        const long start = j * tile, width = columns - start < tile ? columns - start : tile;
        real *const panel = made + j * inner * tile;
        if (width < tile)
            memset(panel, 0, (size_t)(inner * tile) * sizeof(real));
        if (whead >= 0)
            for (long k = 0; k < inner; ++k)
                memcpy(panel + k * tile, W + k * columns + start, (size_t)width * sizeof(real));
        else
            for (long first = 0; first < inner; first += LANES) {
                const long end = inner - first < LANES ? inner : first + LANES;
                for (long v = 0; v < width; ++v)
                    for (long k = first; k < end; ++k)
                        panel[k * tile + v] = W[k - (start + v) * whead];
            }
    }
    return made;
}
#define TILE_OF_ROWS(NAME, ROWS, VECTORS) \\
static void NAME(long inner, const real *A, long ahead, const real *W, real *C, long chead, long width, \\
    real keep) { \\
    lanes sums[ROWS][VECTORS]; \\
    memset(sums, 0, sizeof(sums)); \\
    if (keep != 0) \\
        for (int r = 0; r < ROWS; ++r) \\
            memcpy(sums[r], C + r * chead, (size_t)width * sizeof(real)); \\
    for (long k = 0; k < inner; ++k, W += VECTORS * LANES) \\
        for (int r = 0; r < ROWS; ++r) { \\
            const real a = A[r * ahead + k]; \\
            for (int v = 0; v < VECTORS; ++v) \\
                sums[r][v] += a * *(const lanes *)(W + v * LANES); \\
        } \\
    for (int r = 0; r < ROWS; ++r) \\
        memcpy(C + r * chead, sums[r], (size_t)width * sizeof(real)); \\
}
TILE_OF_ROWS(wide_row, 1, 8)
TILE_OF_ROWS(one_row, 1, 2)
TILE_OF_ROWS(two_rows, 2, 2)
TILE_OF_ROWS(four_rows, 4, 2)
TILE_OF_ROWS(eight_rows, 8, 2)
/* Every other product goes through the tiles from the last to the first: what the one before it read at its end is
   still in the processor's own memory, which holds a part of them only. */
static void tiles(long rows, long columns, long inner, const real *A, long ahead, const real *made, real *C, long chead,
    real keep, long turn) {
    const long tile = tile_columns(rows), count = (columns + tile - 1) / tile;
    for (long i = 0; i < count; ++i) {
        const long at = turn & 1 ? count - 1 - i : i, j = at * tile;
        const long width = columns - j < tile ? columns - j : tile;
        const real *const W = made + at * inner * tile;
        if (rows == 1) {
            wide_row(inner, A, ahead, W, C + j, chead, width, keep);
            continue;
        }
        long r = 0;
        for (; r + 8 <= rows; r += 8)
            eight_rows(inner, A + r * ahead, ahead, W, C + r * chead + j, chead, width, keep);
        if (rows - r >= 4) {
            four_rows(inner, A + r * ahead, ahead, W, C + r * chead + j, chead, width, keep);
            r += 4;
        }
        if (rows - r >= 2) {
            two_rows(inner, A + r * ahead, ahead, W, C + r * chead + j, chead, width, keep);
            r += 2;
        }
        if (rows - r == 1)
            one_row(inner, A + r * ahead, ahead, W, C + r * chead + j, chead, width, keep);
    }
}
/* C (rows, columns) = A (rows, inner) W (inner, columns) + keep * C, row by row but for W, see `packed`. `keep` is 0
   or 1, `turn` the time step. */
static inline void product(product_t call, long rows, long columns, long inner, const real *A, long ahead,
    const real *W, long whead, const real *W_packed, real *C, long chead, real keep, long turn) {
    if (W_packed) {
        tiles(rows, columns, inner, A, ahead, W_packed, C, chead, keep, turn);
        return;
    }
    const int m = (int)columns, n = (int)rows, k = (int)inner, lda = (int)ahead, ldc = (int)chead;
    const int ldw = (int)(whead < 0 ? -whead : columns);
    const real one = 1;
    call(whead < 0 ? "T" : "N", "N", &m, &n, &k, &one, W, &ldw, A, &lda, &keep, C, &ldc);
}
"""
