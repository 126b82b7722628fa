/* One slot for each rank on this machine, in memory that they share. */
#include "cores.h"

#include <omp.h>
#include <stdint.h>
#include <time.h>

#define BREAK_NS 2000000 /* a rank that has called nothing for so long waits for others */

typedef struct {
    int64_t threads;     /* cores that the rank was given; 0: there is no such rank */
    int64_t is_computing;
    int64_t stopped_ns;  /* when it last computed */
    int64_t rest[5];     /* one cache line each */
} Slot;

static Slot *slots;
static int64_t own_slot, num_slots, num_cores;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

#define GET(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)
#define SET(field, value) __atomic_store_n(&(field), value, __ATOMIC_RELAXED)

/* memory: `slots_of_ranks` slots, zero or left by other ranks of this job; cores: most threads. */
void share_cores(void *memory, int64_t slots_of_ranks, int64_t own, int64_t cores) {
    slots = memory, num_slots = slots_of_ranks, own_slot = own, num_cores = cores;
    SET(slots[own].is_computing, 0);
    SET(slots[own].stopped_ns, 0);
    SET(slots[own].threads, omp_get_max_threads());
}

/* The cores of all ranks, shared out among those that compute; never less than a rank's own. */
Team gather(void) {
    int threads = omp_get_max_threads();
    if (!slots) return (Team){threads};
    SET(slots[own_slot].is_computing, 1);
    int64_t now = now_ns(), all = threads, computing = 1;
    for (int64_t rank = 0; rank < num_slots; rank++) {
        Slot *other = slots + rank;
        if (rank == own_slot || !GET(other->threads)) continue;
        all += GET(other->threads);
        computing += GET(other->is_computing) || now - GET(other->stopped_ns) < BREAK_NS;
    }
    int64_t share = (all < num_cores ? all : num_cores) / computing;
    return (Team){share > threads ? (int)share : threads};
}

void scatter(Team *team) {
    (void)team;
    if (!slots) return;
    SET(slots[own_slot].stopped_ns, now_ns());
    SET(slots[own_slot].is_computing, 0);
}
