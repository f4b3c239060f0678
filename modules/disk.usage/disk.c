/*
 * disk.usage: the mounted file systems, and how full they are.
 *
 *   args   {"path": "/var/log", "all": false, "network": false}
 *   reply  {"file_systems": [{"mount", "type", "source", "read_only", "size", "used", "free", "used_percent",
 *           "inodes", "inodes_used", "inodes_free"} or {…, "problem"}], "left_out": 12, "cut": 0}
 *
 * Sizes are bytes; `free` is what programs without rights may still write. `path` shows the one file system that
 * holds it. Left out, and counted, are those of the kernel (proc, cgroup, …) and second mounts of one device,
 * unless `all` is true.
 *
 * A network mount whose server is gone holds whoever asks it, for ever. So all questions are asked by a child
 * process, which is given up after two seconds; and network and FUSE mounts are asked only when `network` is true
 * or `path` leads there.
 */
#include "disk.h"

#include <errno.h>
#include <string.h>

#include "instar_module.h"

#define MOST_REPLY 180000u /* bytes of JSON */
#define MOST_ARGS 16384

static uint32_t cost(const char *text)
{
    uint32_t bytes = 0;
    for (; *text; text++)
        bytes += (unsigned char)*text < 0x20 || (unsigned char)*text >= 0x7f || *text == '"' || *text == '\\' ? 6 : 1;
    return bytes;
}

static uint64_t percent(uint64_t used, uint64_t free)
{
    uint64_t whole;
    for (; used >> 56 || free >> 56; used >>= 8)
        free >>= 8; /* nobody sees the difference in a percentage */
    whole = used + free;
    return whole ? (used * 100 + whole - 1) / whole : 0;
}

static void show(const struct instar_host *host, const struct mount *mount, const struct answer *answer)
{
    instar_begin_object(host);
    instar_put_string(host, "mount", mount->point);
    instar_put_string(host, "type", mount->type);
    instar_put_string(host, "source", mount->source);
    instar_put_bool(host, "read_only", mount->read_only);
    if (mount->problem)
        instar_put_string(host, "problem", mount->problem);
    else if (answer->error)
        instar_put_string(host, "problem", strerror(answer->error));
    else {
        instar_put_int(host, "size", (int64_t)answer->size);
        instar_put_int(host, "used", (int64_t)answer->used);
        instar_put_int(host, "free", (int64_t)answer->free);
        instar_put_int(host, "used_percent", (int64_t)percent(answer->used, answer->free));
        instar_put_int(host, "inodes", (int64_t)answer->inodes);
        instar_put_int(host, "inodes_used", (int64_t)(answer->inodes - answer->inodes_free));
        instar_put_int(host, "inodes_free", (int64_t)answer->inodes_free);
    }
    instar_end_object(host);
}

static int32_t usage(const struct instar_host *host, int all, int network)
{
    static struct answer answers[MOST_MOUNTS];
    uint32_t room = MOST_REPLY;
    int left_out = 0, cut = 0;
    choose(all, network);
    ask_all(answers);
    instar_key(host, "file_systems");
    instar_begin_list(host);
    for (int index = 0; index < mount_count; index++) {
        const struct mount *mount = &mounts[index];
        uint32_t needs = 320 + cost(mount->point) + cost(mount->source) + cost(mount->type);
        int empty = !mount->problem && !answers[index].error && !answers[index].size;
        if (!mount->chosen || (empty && !all))
            left_out++;
        else if (needs > room) {
            room = 0;
            cut++;
        } else {
            room -= needs;
            show(host, mount, &answers[index]);
        }
    }
    instar_end_list(host);
    instar_put_int(host, "left_out", left_out);
    instar_put_int(host, "cut", cut);
    return INSTAR_OK;
}

static int32_t fail_with(const struct instar_host *host, const char *before, const char *why)
{
    static char text[512];
    size_t length = strlen(before);
    memcpy(text, before, length);
    strncpy(text + length, why, sizeof text - length - 1);
    return instar_fail(host, text);
}

static int32_t usage_of(const struct instar_host *host, const char *path)
{
    static struct answer answer;
    static char resolved[PATH_MAX];
    struct mount *mount;
    int heard = ask_path(path, &answer, resolved);
    if (heard == -2)
        return fail_with(host, "cannot look at the path: no process to ask with: ", strerror(errno));
    if (heard < 0)
        return instar_fail(host, "cannot look at the path: its file system gave no answer within 2 s");
    if (heard == 0 || answer.error)
        return fail_with(host, "cannot look at the path: ", heard ? strerror(answer.error) : "whoever asked died");
    mount = holding(resolved);
    if (!mount)
        return instar_fail(host, "cannot look at the path: no mount holds it");
    instar_put_string(host, "path", resolved);
    instar_key(host, "file_systems");
    instar_begin_list(host);
    show(host, mount, &answer);
    instar_end_list(host);
    instar_put_int(host, "left_out", mount_count - 1);
    instar_put_int(host, "cut", 0);
    return INSTAR_OK;
}

/* How many members an object has, by its JSON text. */
static int members(const char *json)
{
    int depth = 0, found = 0;
    for (; *json; json++) {
        if (*json == '"') {
            for (json++; *json && *json != '"'; json++)
                json += *json == '\\' && json[1];
            if (!*json)
                break;
        } else if (*json == '{' || *json == '[')
            depth++;
        else if (*json == '}' || *json == ']')
            depth--;
        else if (*json == ':' && depth == 1)
            found++;
    }
    return found;
}

static int32_t read_arguments(const struct instar_host *host, char *path, uint32_t room, int *all, int *network)
{
    static const char *const names[] = {"path", "all", "network"};
    static char json[MOST_ARGS];
    int known = 0;
    int32_t length;
    for (int n = 0; n < 3; n++)
        known += instar_kind(host, names[n]) != INSTAR_ABSENT;
    if (instar_args(host, json, MOST_ARGS) >= MOST_ARGS || members(json) > known)
        return instar_fail(host, "cannot show disks: expected only 'path', 'all' or 'network', got something else");
    length = instar_get_text(host, "path", path, room);
    if (length >= (int32_t)room || (length >= 0 && path[0] != '/'))
        return instar_fail(host, "cannot show disks: expected an absolute path as 'path'");
    *all = instar_get_bool(host, "all", 0);
    *network = instar_get_bool(host, "network", 0);
    return INSTAR_OK;
}

static int32_t run(const struct instar_host *host)
{
    static char path[PATH_MAX];
    int all, network;
    if (read_arguments(host, path, sizeof path, &all, &network))
        return 1;
    if (read_mounts())
        return fail_with(host, "cannot read " MOUNTS ": ", strerror(errno));
    return path[0] ? usage_of(host, path) : usage(host, all, network);
}

INSTAR_ONESHOT("disk.usage", "1.0.0", run);
