/* All decoder layers of one step in one parallel region.

Between Python and C, and into and out of parallel regions, a call of one operation costs some 10 us: ten operations a
layer and four more with adapters are 3 ms (5 ms) of a decode step of 30 layers that takes 50. Here they cost a barrier. */
#include <omp.h>
#include <stdlib.h>

#include "cpu_team.h"

/* Weights and cache of one layer; biases and head norms may be NULL; window 0: all keys. */
typedef struct {
    const void *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias, *post_norm, *gate_up, *gate_up_bias, *down,
        *down_bias;
    void *k, *v;
    int64_t window;
} Layer;

/* One step. x: [T, I] in, the residual before the last delta out; delta: [T, I] out. Mirrors `LayersCall` in
layers_cpu.py. */
typedef struct {
    const Layer *layers;
    int64_t num_layers, T, I, F, H, G, D; /* hidden, intermediate size; query, key heads; their size */
    void *x, *delta, *normed, *qkv, *attended, *gate_up, *hidden;
    const float *cos, *sin;
    const int64_t *positions, *slots;
    const Run *runs;
    int64_t num_runs, longest;
    const void *lora_weights;
    const int64_t *lora_table; /* [adapter rows, layers, 7, 3] */
    int64_t lora_row_stride, lora_layer_stride;
    const int32_t *lora_segments;
    int64_t num_segments;
    double eps, scale;
    int64_t dtype, lora_dtype, num_threads;
} Step;

enum { QKV, O, GATE_UP, DOWN, GROUPS };

typedef struct {
    int64_t *run_of, *next; /* next: one counter per product */
    float *scores, *widened;
    LoraWork *lora; /* [layers, GROUPS], where the step has adapters */
    int64_t room;   /* scores of one thread */
} Scratch;

static int64_t widest(const Step *s) {
    int64_t heads = s->H * s->D, most = s->I > s->F ? s->I : s->F;
    return most > heads ? most : heads;
}

/* The adapters of one group of one layer. bounds: where its modules' outputs begin, and the end. widened: where the group's
product leaves x as float32, or NULL. */
static LoraCall lora_call(const Step *s, const float *widened, int64_t layer, int group, const int64_t *bounds) {
    static const int64_t first[GROUPS] = {0, 3, 4, 6}, count[GROUPS] = {3, 1, 2, 1};
    void *outputs[GROUPS] = {s->qkv, s->normed, s->gate_up, s->delta};
    const void *inputs[GROUPS] = {s->normed, s->attended, s->normed, s->hidden};
    const int64_t sizes[GROUPS] = {s->I, s->H * s->D, s->I, s->F};
    return (LoraCall){outputs[group],
                      widened ? widened : inputs[group],
                      s->lora_weights,
                      s->lora_table + layer * s->lora_layer_stride,
                      s->lora_row_stride,
                      s->lora_segments,
                      s->num_segments,
                      first[group],
                      count[group],
                      bounds,
                      sizes[group],
                      bounds[count[group]],
                      (int)s->dtype,
                      widened ? F32 : (int)s->dtype,
                      (int)s->lora_dtype};
}

static void product(const Step *s, const Scratch *m, int64_t layer, int group, const void *w, const void *bias,
                    int64_t out_size, const void *next_w, int64_t next_I) {
    const LoraCall shape = lora_call(s, NULL, layer, group, (const int64_t[]){0, 0, 0, 0});
    Linear l = {shape.y, shape.x, w, bias, s->T, shape.I, out_size, 0, (int)s->dtype, next_w, next_I,
                m->lora ? m->lora[layer * GROUPS + group].wanted : NULL};
    team_linear(&l, (int)s->dtype, m->next + layer * GROUPS + group, m->widened);
    if (m->lora) team_lora_add(m->lora + layer * GROUPS + group);
}

static void run_layer(const Step *s, const Scratch *m, int64_t index, float *scores) {
    const Layer *layer = s->layers + index;
    const int dtype = (int)s->dtype;
    int64_t qkv_size = (s->H + 2 * s->G) * s->D;
    team_add_rms_norm(s->normed, s->x, index ? s->delta : NULL, layer->input_norm, s->T, s->I, (float)s->eps, dtype);
    product(s, m, index, QKV, layer->qkv, layer->qkv_bias, qkv_size, layer->o, s->H * s->D);
    Rope rope = {s->qkv,          layer->k,      layer->v, s->cos, s->sin, s->positions, s->slots,
                 layer->q_norm, layer->k_norm, s->H,     s->G,   s->D,   (float)s->eps};
    team_rope_kv(&rope, s->T, dtype);
    Attention attention = {s->attended, s->qkv, layer->k, layer->v, s->runs,       m->run_of,
                           s->T,        s->H,   s->G,     s->D,     layer->window, (float)s->scale};
    team_attention(&attention, attention_chunk(s->T, s->G, (int)s->num_threads), scores, dtype);
    product(s, m, index, O, layer->o, layer->o_bias, s->I, layer->gate_up, s->I);
    /* The product left the attention's output in `normed`, which the norm reads row by row before it writes there. */
    team_add_rms_norm(s->normed, s->x, s->normed, layer->post_norm, s->T, s->I, (float)s->eps, dtype);
    product(s, m, index, GATE_UP, layer->gate_up, layer->gate_up_bias, 2 * s->F, layer->down, s->F);
    team_silu_mul(s->hidden, s->gate_up, s->T, s->F, dtype);
    const void *next_qkv = index + 1 < s->num_layers ? layer[1].qkv : NULL;
    product(s, m, index, DOWN, layer->down, layer->down_bias, s->I, next_qkv, s->I);
}

static int allocate(Scratch *m, const Step *s) {
    m->run_of = attention_runs(s->runs, s->num_runs, s->T);
    m->next = calloc((size_t)(s->num_layers * GROUPS + 1), sizeof(int64_t));
    m->room = attention_scratch(s->longest);
    m->scores = malloc(sizeof(float) * (size_t)(m->room * s->num_threads));
    int is_short = !m->run_of || !m->next || !m->scores;
    if (linear_widens((int)s->dtype)) {
        m->widened = malloc(sizeof(float) * (size_t)(s->T * widest(s) + 1));
        is_short |= !m->widened;
    }
    if (s->num_segments) {
        m->lora = calloc((size_t)(s->num_layers * GROUPS), sizeof(LoraWork));
        is_short |= !m->lora;
    }
    return is_short;
}

static void release(Scratch *m, const Step *s) {
    for (int64_t i = 0; m->lora && i < s->num_layers * GROUPS; i++) lora_release(m->lora + i);
    free(m->lora);
    free(m->widened);
    free(m->scores);
    free(m->next);
    free(m->run_of);
}

/* Returns 0, or 1 when memory ran out. */
EXPORT int trailmark_layers(const Step *s) {
    int64_t heads = s->H * s->D, keys = s->G * s->D;
    const int64_t qkv[] = {0, heads, heads + keys, heads + 2 * keys}, hidden[] = {0, s->I},
                  gate_up[] = {0, s->F, 2 * s->F};
    const int64_t *bounds[GROUPS] = {qkv, hidden, gate_up, hidden};
    Scratch m = {0};
    int is_short = allocate(&m, s);
    if (!is_short) {
#pragma omp parallel num_threads((int)s->num_threads)
        {
            if (m.lora) {
#pragma omp for schedule(static) reduction(| : is_short)
                for (int64_t i = 0; i < s->num_layers * GROUPS; i++) {
                    LoraCall call = lora_call(s, m.widened, i / GROUPS, (int)(i % GROUPS), bounds[i % GROUPS]);
                    is_short |= lora_prepare(m.lora + i, &call, (int)s->num_threads);
                }
            }
            /* All threads read the same `is_short` behind the loop's barrier. */
            if (!is_short)
                for (int64_t layer = 0; layer < s->num_layers; layer++)
                    run_layer(s, &m, layer, m.scores + m.room * omp_get_thread_num());
        }
    }
    release(&m, s);
    return is_short;
}
