/* What the parts of disk.usage share. All of it lives in static memory: a module runs once in its process. */
#ifndef DISK_H
#define DISK_H

#include <limits.h>
#include <stdint.h>

#define MOUNTS "/proc/self/mountinfo"
#define MOST_MOUNTS 4096

struct mount {
    char *point, *type, *source, *device;
    int read_only;
    int chosen;          /* it is shown */
    const char *problem; /* why there are no figures; NULL when there are */
};

struct answer {
    int32_t index, error;
    uint64_t size, used, free, inodes, inodes_free;
};

extern struct mount mounts[MOST_MOUNTS];
extern int mount_count;

/* mounts.c: reads the table, 0 or -1 with errno; chooses what is shown; finds the mount that holds a path. */
int read_mounts(void);
void choose(int all, int network);
struct mount *holding(const char *path);

/* asking.c: fills the answers of the chosen mounts, or says in `problem` why not. */
void ask_all(struct answer *answers);
/* The same for a path, which is also resolved (PATH_MAX bytes): 1, 0 whoever asked died, -1 no answer, -2 no process. */
int ask_path(const char *path, struct answer *answer, char *resolved);

#endif
