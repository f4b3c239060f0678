/* Asking the file systems how full they are, by a child that can be given up. */
#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ONE_MS 2000 /* for one file system */
#define ALL_MS 12000

static void ask_one(struct answer *answer, const char *path)
{
    struct statvfs found;
    answer->error = statvfs(path, &found) ? errno : 0;
    if (answer->error)
        return;
    answer->size = (uint64_t)found.f_blocks * found.f_frsize;
    answer->used = (uint64_t)(found.f_blocks - found.f_bfree) * found.f_frsize;
    answer->free = (uint64_t)found.f_bavail * found.f_frsize;
    answer->inodes = found.f_files;
    answer->inodes_free = found.f_ffree;
}

static void tell(const void *data, size_t left)
{
    const char *at = data;
    while (left > 0) {
        ssize_t done = write(0, at, left);
        if (done <= 0)
            _exit(1);
        at += done;
        left -= (size_t)done;
    }
}

/* What the child does: asks, tells on descriptor 0, and holds nothing else of the runner's. */
static void child(int pipe_end, int from, const char *path)
{
    static struct answer answer;
    static char resolved[PATH_MAX];
    dup2(pipe_end, 0);
    if (syscall(SYS_close_range, 1u, ~0u, 0u))
        for (int fd = 1; fd < 1024; fd++)
            close(fd);
    if (path) {
        answer.error = realpath(path, resolved) ? 0 : errno;
        if (!answer.error)
            ask_one(&answer, resolved);
        tell(&answer, sizeof answer);
        tell(resolved, sizeof resolved);
        _exit(0);
    }
    for (int index = from; index < mount_count; index++) {
        if (!mounts[index].chosen || mounts[index].problem)
            continue;
        answer.index = index;
        ask_one(&answer, mounts[index].point);
        tell(&answer, sizeof answer);
    }
    _exit(0);
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* All of `left` bytes: 1; the end before: 0; not until `deadline`: -1. */
static int hear(int fd, void *data, size_t left, int64_t deadline)
{
    char *at = data;
    while (left > 0) {
        struct pollfd wait = {fd, POLLIN, 0};
        int64_t rest = deadline - now_ms();
        ssize_t got;
        if (rest <= 0 || poll(&wait, 1, (int)rest) == 0)
            return -1;
        got = read(fd, at, left);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return 0;
        at += got;
        left -= (size_t)got;
    }
    return 1;
}

/* A child that hangs in the kernel outlives its KILL: it is left to the runner's end. */
static void end_child(pid_t pid)
{
    kill(pid, SIGKILL);
    for (int tries = 0; tries < 50 && waitpid(pid, NULL, WNOHANG) == 0; tries++)
        poll(NULL, 0, 2);
}

/* Start a child that asks from `from` on; its pid, and where to hear it in `fd`. Negative: none could be made. */
static pid_t start_child(int from, const char *path, int *fd)
{
    int ends[2];
    pid_t pid;
    if (pipe2(ends, O_CLOEXEC))
        return -1;
    pid = fork();
    if (pid == 0)
        child(ends[1], from, path);
    close(ends[1]);
    if (pid < 0)
        close(ends[0]);
    *fd = ends[0];
    return pid;
}

static int next_to_ask(int from)
{
    while (from < mount_count && (!mounts[from].chosen || mounts[from].problem))
        from++;
    return from;
}

void ask_all(struct answer *answers)
{
    static struct answer answer;
    int64_t end = now_ms() + ALL_MS;
    int next = next_to_ask(0);
    while (next < mount_count && now_ms() < end) {
        int fd, heard;
        pid_t pid = start_child(next, NULL, &fd);
        if (pid < 0)
            break;
        while ((heard = hear(fd, &answer, sizeof answer, now_ms() + ONE_MS)) == 1) {
            answers[answer.index] = answer;
            next = next_to_ask(answer.index + 1);
        }
        close(fd);
        end_child(pid);
        if (next < mount_count) {
            mounts[next].problem = heard < 0 ? "no answer within 2 s" : "whoever asked it died";
            next = next_to_ask(next);
        }
    }
    for (; next < mount_count; next = next_to_ask(next + 1))
        mounts[next].problem = "not asked: no process or no time was left for it";
}

int ask_path(const char *path, struct answer *answer, char *resolved)
{
    int fd, heard;
    int64_t deadline = now_ms() + ONE_MS;
    pid_t pid = start_child(0, path, &fd);
    if (pid < 0)
        return -2;
    heard = hear(fd, answer, sizeof *answer, deadline);
    if (heard == 1)
        heard = hear(fd, resolved, PATH_MAX, deadline);
    close(fd);
    end_child(pid);
    return heard;
}
