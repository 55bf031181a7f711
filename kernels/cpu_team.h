/* The kernels as a team calls them: every thread of one parallel region makes the same call with the same arguments and
leaves it when all of the work is done. Outside a parallel region one thread does it all. */
#ifndef TRAILMARK_CPU_TEAM_H
#define TRAILMARK_CPU_TEAM_H

#include "cpu_vector.h"

/* `count` stretches of memory, each of `bytes`, the next one `stride` further. */
typedef struct {
    const char *start;
    int64_t bytes, count, stride;
} Range;

/* What a thread reads soon. */
typedef struct {
    const Range *ranges;
    int64_t num_ranges, num_lines;
} Wanted;

/* y = x W^T (+ bias) (+ y). y may be float32 where `out_dtype` says so, then without `add`. next_w, next_I: the packed
weight that the team multiplies by next, and its input size; NULL where that is not known. wanted: for each thread, what else
it is to bring into its cache meanwhile, or NULL. */
typedef struct {
    void *y;
    const void *x, *w, *bias;
    int64_t num_rows, I, O;
    int add, out_dtype;
    const void *next_w;
    int64_t next_I;
    const Wanted *wanted;
} Linear;

/* Whether a product in this dtype wants num_rows * I floats of scratch. */
int linear_widens(int dtype);
/* *next: 0 at the call, and not used by any other call of the region. */
void team_linear(const Linear *l, int dtype, int64_t *next, float *scratch);

void team_add_rms_norm(void *y, void *x, const void *delta, const void *weight, int64_t T, int64_t I, float eps,
                       int dtype);
void team_silu_mul(void *y, const void *gate_up, int64_t T, int64_t n, int dtype);

typedef struct {
    void *qkv, *k, *v;
    const float *cos, *sin;
    const int64_t *positions, *slots;
    const void *q_norm, *k_norm;
    int64_t H, G, D;
    float eps;
} Rope;

void team_rope_kv(const Rope *r, int64_t T, int dtype);

typedef struct {
    int64_t row, num_rows, context_len, slot, list; /* list: address of int64 slots, 0 where they are neighbours */
} Run;

/* run_of: [num_rows], which run each row belongs to. */
typedef struct {
    void *out;
    const void *qkv, *k, *v;
    const Run *runs;
    const int64_t *run_of;
    int64_t num_rows, H, G, D, window;
    float scale;
} Attention;

/* Rows' runs, to be freed, NULL when memory ran out; and the floats of scratch that each thread needs. */
int64_t *attention_runs(const Run *runs, int64_t num_runs, int64_t num_rows);
int64_t attention_scratch(int64_t longest);
void team_attention(const Attention *a, int64_t chunk, float *scratch, int dtype);
/* Items (a row's head) that a thread takes at once. */
int64_t attention_chunk(int64_t num_rows, int64_t G, int num_threads);

/* One group of linears' adapters: the arguments of trailmark_lora_add; x of float32 where x_dtype says so. */
typedef struct {
    void *y;
    const void *x, *weights;
    const int64_t *table;
    int64_t table_stride;
    const int32_t *segments;
    int64_t num_segments, first_module, num_modules;
    const int64_t *bounds;
    int64_t I, stride;
    int dtype, x_dtype, w_dtype;
} LoraCall;

typedef struct LoraProduct LoraProduct;
typedef struct LoraSegment LoraSegment;
typedef struct LoraItem LoraItem;

typedef struct {
    LoraCall call;
    LoraProduct *products;
    LoraSegment *segments;
    LoraItem *items; /* shrinks, then expands */
    float *shrunk;
    int64_t num_products, num_segments, num_shrinks, num_expands;
    int num_threads, is_fixed;  /* is_fixed: a thread knows its items of long segments beforehand */
    int64_t fixed_per_thread;   /* and the first so many short segments */
    Range *ranges;
    Wanted *wanted; /* [num_threads] */
} LoraWork;

/* By one thread. Returns 0, or 1 when memory ran out; to be released in either case. */
int lora_prepare(LoraWork *w, const LoraCall *call, int num_threads);
void lora_release(LoraWork *w);
void team_lora_add(const LoraWork *w);

#endif
