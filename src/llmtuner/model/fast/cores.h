/* Cores of ranks that wait for others are lent to those that still compute. */
#ifndef LLMTUNER_CORES_H
#define LLMTUNER_CORES_H

/* How many threads a function uses; while there is one, this rank counts as computing. */
typedef struct { int threads; } Team;

Team gather(void);
void scatter(Team *team);

/* First line of a function whose loops then say num_threads(team.threads). */
#define WITH_TEAM Team team __attribute__((cleanup(scatter))) = gather()

#endif
