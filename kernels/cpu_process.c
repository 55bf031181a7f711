/* What concerns the process rather than a product: pages and threads. */
#include <omp.h>
#include <stdint.h>
#include <sys/mman.h>

#include "cpu_vector.h"

#define LARGE_PAGE ((uintptr_t)1 << 21)

/* Ask for large pages in [start, start + bytes), before its first use: with 4 KiB pages, whoever streams through memory
misses an address translation at every page. Where the system has none to give, everything works as before. */
EXPORT void trailmark_ask_for_large_pages(void *start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t first = ((uintptr_t)start + LARGE_PAGE - 1) & ~(LARGE_PAGE - 1);
    uintptr_t last = ((uintptr_t)start + (uintptr_t)bytes) & ~(LARGE_PAGE - 1);
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

/* The number of threads of parallel regions that the calling thread starts without naming one, torch's included. */
EXPORT void trailmark_set_num_threads(int num_threads) {
    omp_set_num_threads(num_threads);
}
