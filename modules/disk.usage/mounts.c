/* The table of mounts: reading it, and choosing from it. */
#define _GNU_SOURCE
#include "disk.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define MOST_BYTES (4 << 20)

struct mount mounts[MOST_MOUNTS];
int mount_count;
static char bytes[MOST_BYTES + 1];

/* The kernel writes blanks, newlines and backslashes in names as \ooo. */
static void unescape(char *text)
{
    char *to = text;
    for (; *text; text++) {
        if (text[0] == '\\' && text[1] >= '0' && text[1] <= '3' && text[2] >= '0' && text[2] <= '7' &&
            text[3] >= '0' && text[3] <= '7') {
            *to++ = (char)(((text[1] - '0') << 6) | ((text[2] - '0') << 3) | (text[3] - '0'));
            text += 3;
        } else
            *to++ = *text;
    }
    *to = 0;
}

/* Cut the next word off, as strsep does for one blank. */
static char *word(char **rest)
{
    char *start = *rest, *end;
    if (!start)
        return NULL;
    end = strchr(start, ' ');
    *rest = end ? end + 1 : NULL;
    if (end)
        *end = 0;
    return start;
}

static int has_option(const char *options, const char *option)
{
    size_t length = strlen(option);
    for (; options; options = strchr(options, ','), options = options ? options + 1 : NULL)
        if (!strncmp(options, option, length) && (options[length] == ',' || !options[length]))
            return 1;
    return 0;
}

/* id parent major:minor root point options [tag…] - type source options */
static void parse_line(char *line)
{
    struct mount *mount = &mounts[mount_count];
    char *options, *tag, *more;
    word(&line);
    word(&line);
    mount->device = word(&line);
    word(&line);
    mount->point = word(&line);
    options = word(&line);
    while ((tag = word(&line)) && strcmp(tag, "-"))
        ;
    mount->type = word(&line);
    mount->source = word(&line);
    more = word(&line);
    if (!mount->source)
        return;
    unescape(mount->point);
    unescape(mount->source);
    mount->read_only = has_option(options, "ro") || has_option(more, "ro");
    mount->chosen = 0;
    mount->problem = NULL;
    mount_count++;
}

int read_mounts(void)
{
    size_t length = 0;
    ssize_t got;
    char *at, *end;
    int fd = open(MOUNTS, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    while (length < MOST_BYTES && (got = read(fd, bytes + length, MOST_BYTES - length)) > 0)
        length += (size_t)got;
    close(fd);
    bytes[length] = 0;
    mount_count = 0;
    for (at = bytes; *at && mount_count < MOST_MOUNTS; at = end + 1) {
        end = strchr(at, '\n');
        if (!end)
            break;
        *end = 0;
        parse_line(at);
    }
    return 0;
}

static int one_of(const char *word, const char *const *list)
{
    for (; *list; list++)
        if (!strcmp(word, *list))
            return 1;
    return 0;
}

static int is_pseudo(const struct mount *mount)
{
    static const char *const types[] = {
        "autofs", "binder", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs",
        "efivarfs", "fusectl", "hugetlbfs", "mqueue", "nsfs", "proc", "pstore", "ramfs", "resctrl", "rpc_pipefs",
        "securityfs", "selinuxfs", "smackfs", "sysfs", "tracefs", NULL};
    return one_of(mount->type, types);
}

/* Those that are asked elsewhere than in this kernel. */
static int is_remote(const struct mount *mount)
{
    static const char *const types[] = {
        "nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "glusterfs", "lustre", "afs", "9p", "ncpfs", "coda", "ocfs2",
        "gfs2", "beegfs", "orangefs", "fuse", "virtiofs", NULL};
    return one_of(mount->type, types) || !strncmp(mount->type, "fuse.", 5);
}

/* A later mount on the same place hides this one. */
static int is_hidden(int index)
{
    for (int later = index + 1; later < mount_count; later++)
        if (!strcmp(mounts[index].point, mounts[later].point))
            return 1;
    return 0;
}

/* Of the mounts of one device that can be seen, the one with the shortest name is shown. */
static int is_second(int index)
{
    size_t length = strlen(mounts[index].point);
    for (int other = 0; other < mount_count; other++) {
        size_t its = strlen(mounts[other].point);
        if (other != index && !strcmp(mounts[index].device, mounts[other].device) &&
            (its < length || (its == length && other < index)) && !is_hidden(other))
            return 1;
    }
    return 0;
}

void choose(int all, int network)
{
    for (int index = 0; index < mount_count; index++) {
        struct mount *mount = &mounts[index];
        mount->chosen = all ? !is_hidden(index) : !is_pseudo(mount) && !is_hidden(index) && !is_second(index);
        if (mount->chosen && is_remote(mount) && !network)
            mount->problem = "not asked: a network or FUSE mount may never answer (see the argument 'network')";
    }
}

/* The mount that holds a resolved path: the longest that is a start of it, the last of those that are equal. */
struct mount *holding(const char *path)
{
    struct mount *best = NULL;
    size_t longest = 0;
    for (int index = 0; index < mount_count; index++) {
        size_t length = strlen(mounts[index].point);
        int root = length == 1 && mounts[index].point[0] == '/';
        if (length >= longest && !strncmp(path, mounts[index].point, length) &&
            (root || path[length] == '/' || !path[length])) {
            best = &mounts[index];
            longest = length;
        }
    }
    return best;
}
