/* instarctl job run example.release --all */
#include "instar_module.h"

static char text[16384];

/* The value of `key` in lines of KEY=value or KEY="value", cut out of `text`; 0 when it is not there. */
static char *find(const char *key)
{
    char *line = text;
    while (*line) {
        char *at = line;
        uint32_t same = 0;
        while (key[same] && *at == key[same])
            at++, same++;
        if (!key[same] && *at == '=') {
            char *end = ++at;
            while (*end && *end != '\n')
                end++;
            if (*at == '"' && end > at + 1 && end[-1] == '"')
                at++, end--;
            *end = 0;
            return at;
        }
        while (*line && *line++ != '\n') {
        }
    }
    return 0;
}

static int32_t run(const struct instar_host *host)
{
    int64_t length = instar_file_read(host, "/etc/os-release", 0, text, sizeof text - 1);
    char *id;

    if (length < 0)
        return instar_fail(host, "cannot tell the system: expected /etc/os-release, got no such file");
    text[length] = 0;
    id = find("ID");
    instar_put_string(host, "id", id ? id : "");
    return INSTAR_OK;
}

INSTAR_ONESHOT("example.release", "1.0.0", run);
