/* Ranks of one machine add up tensors, and hand them round, through memory that they share.
 *
 * The memory holds a mark of each rank and then, for each rank, two parts to put numbers in, which
 * take turns: a rank fills a part again only after all have met once more, and so have read it. */
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "numbers.h"

#define SPINS 2000          /* looks before sleeping, some 20 microseconds: others are mostly as far */
#define NAP_NS 100000000    /* after so long asleep, look whether the other is still there */
#define BLOCK 1024          /* numbers that are added up at once, in the first-level cache */

typedef struct {
    uint32_t stage;  /* how often this rank has met the others */
    int32_t process;
    uint32_t turn;   /* which of its two parts is next */
    char rest[52];   /* one cache line each */
} Mark;

typedef struct {
    char *memory;
    int64_t rank, ranks, bytes; /* of a part */
    int64_t limit_s;            /* how long to wait for another rank */
} Room;

static Mark *mark_of(const Room *room, int64_t rank) { return (Mark *)room->memory + rank; }

static char *part_of(const Room *room, int64_t rank) {
    int64_t part = 2 * rank + mark_of(room, room->rank)->turn;
    return room->memory + room->ranks * sizeof(Mark) + part * room->bytes;
}

static void take_turn(const Room *room) { mark_of(room, room->rank)->turn ^= 1; }

/* 0 when the rank has come as far as `stage`; else 1, it has ended, or 2, it takes too long. */
static int64_t wait_for(Mark *other, uint32_t stage, int64_t limit_s) {
    time_t end = time(NULL) + limit_s;
    for (int64_t looks = 0;; looks++) {
        uint32_t seen = __atomic_load_n(&other->stage, __ATOMIC_ACQUIRE);
        if ((int32_t)(seen - stage) >= 0) return 0;
        if (looks < SPINS) {
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
            continue;
        }
        struct timespec nap = {0, NAP_NS};
        syscall(SYS_futex, &other->stage, FUTEX_WAIT, seen, &nap, NULL, 0);
        if (__atomic_load_n(&other->stage, __ATOMIC_ACQUIRE) != seen) continue;
        if (kill(other->process, 0) && errno == ESRCH) return 1;
        if (time(NULL) > end) return 2;
    }
}

/* Wait until all ranks are here. 0, or what `wait_for` says of a rank, plus 2 x its number. */
static int64_t meet(const Room *room) {
    Mark *own = mark_of(room, room->rank);
    uint32_t stage = own->stage + 1;
    __atomic_store_n(&own->stage, stage, __ATOMIC_RELEASE);
    syscall(SYS_futex, &own->stage, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    for (int64_t rank = 0; rank < room->ranks; rank++) {
        if (rank == room->rank) continue;
        int64_t problem = wait_for(mark_of(room, rank), stage, room->limit_s);
        if (problem) return problem + 2 * rank;
    }
    return 0;
}

/* Numbers from, to of all ranks' parts, added up in float in the order of the ranks, to our own. */
static void add_parts(const Room *room, int64_t from, int64_t to, int64_t is_bf16) {
    float sums[BLOCK];
    for (int64_t start = from; start < to; start += BLOCK) {
        int64_t count = least(BLOCK, to - start);
        for (int64_t rank = 0; rank < room->ranks; rank++) {
            const float *exact = (const float *)part_of(room, rank) + start;
            const bf16 *rounded = (const bf16 *)part_of(room, rank) + start;
            for (int64_t i = 0; i < count; i++)
                sums[i] = (rank ? sums[i] : 0) + (is_bf16 ? load(rounded[i]) : exact[i]);
        }
        float *exact = (float *)part_of(room, room->rank) + start;
        bf16 *rounded = (bf16 *)part_of(room, room->rank) + start;
        for (int64_t i = 0; i < count; i++)
            if (is_bf16)
                rounded[i] = store(sums[i]);
            else
                exact[i] = sums[i];
    }
}

/* Where the share of a rank begins that it adds up for all: whole cache lines. */
static int64_t share_from(int64_t count, int64_t rank, int64_t ranks) {
    return rank == ranks ? count : count * rank / ranks / 32 * 32;
}

/* x [count], bfloat16 or float, becomes the sum over all ranks, the same on each. Returns what
 * `meet` does. */
int64_t add_up(char *memory, char *x, int64_t count, int64_t is_bf16, int64_t rank, int64_t ranks,
               int64_t bytes, int64_t limit_s) {
    Room room = {memory, rank, ranks, bytes, limit_s};
    int64_t size = is_bf16 ? sizeof(bf16) : sizeof(float), problem;
    for (int64_t start = 0; start < count; start += bytes / size) {
        int64_t some = least(bytes / size, count - start);
        memcpy(part_of(&room, rank), x + start * size, some * size);
        if ((problem = meet(&room))) return problem;
        add_parts(&room, share_from(some, rank, ranks), share_from(some, rank + 1, ranks), is_bf16);
        if ((problem = meet(&room))) return problem;
        for (int64_t other = 0; other < ranks; other++) {
            int64_t from = share_from(some, other, ranks), to = share_from(some, other + 1, ranks);
            memcpy(x + (start + from) * size, part_of(&room, other) + from * size, (to - from) * size);
        }
        take_turn(&room);
    }
    return 0;
}

/* out [ranks][count] gets the bytes x [count] of every rank; x may be its place in out. */
int64_t hand_round(char *memory, const char *x, char *out, int64_t count, int64_t rank,
                   int64_t ranks, int64_t bytes, int64_t limit_s) {
    Room room = {memory, rank, ranks, bytes, limit_s};
    int64_t problem;
    for (int64_t start = 0; start < count; start += bytes) {
        int64_t some = least(bytes, count - start);
        memcpy(part_of(&room, rank), x + start, some);
        if ((problem = meet(&room))) return problem;
        for (int64_t other = 0; other < ranks; other++) {
            char *to = out + other * count + start;
            if (to != x + start) memcpy(to, part_of(&room, other), some);
        }
        take_turn(&room);
    }
    return 0;
}
