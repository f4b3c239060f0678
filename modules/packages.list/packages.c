/*
 * packages.list: the installed packages, from the databases of dpkg and apk.
 *
 *   args   {"match": "ssl", "count_only": false, "skip": 0}
 *   reply  {"databases": ["dpkg"], "count": 412, "packages": [{"name", "version", "arch"}], "next": null,
 *           "unfinished": 0, "unreadable": 0}
 *
 * `match` is a part of the name; ASCII letters match in both cases. `count` is of all that match. When they do
 * not fit in one reply, `next` is the `skip` to ask with for the rest. `unfinished` packages (unpacked, not
 * configured) and stanzas that name no package are counted, not listed.
 *
 * The databases are text that others write; they are read here as bytes, in a sandbox that can do nothing but
 * read these two files. The whole memory that this needs is in the static buffers below.
 */
#include "instar_module.h"

#define DPKG "/var/lib/dpkg/status"
#define APK "/lib/apk/db/installed"
#define CHUNK 65536u
#define MOST_FILE ((int64_t)256 << 20) /* bytes that are looked at */
#define MOST_REPLY 180000u             /* bytes of JSON; the host takes some more */
#define ROOM 256u                      /* of one field; what is longer is cut */

struct field {
    uint32_t length;
    char text[ROOM];
};

/* One package while its lines come in. */
struct stanza {
    struct field name, version, arch, status;
    int any; /* it had a line */
};

struct work {
    const struct instar_host *host;
    struct field match;
    int count_only;
    int64_t skip, count, shown, unfinished, unreadable;
    uint32_t used; /* bytes of the reply */
    int full;
    int is_apk;
};

static uint8_t chunk[CHUNK];
static struct field line;
static struct stanza stanza;
static struct work work;

static char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c + 32) : c;
}

static int contains(const struct field *whole, const struct field *part)
{
    for (uint32_t at = 0; at + part->length <= whole->length; at++) {
        uint32_t same = 0;
        while (same < part->length && lower(whole->text[at + same]) == lower(part->text[same]))
            same++;
        if (same == part->length)
            return 1;
    }
    return 0;
}

static int ends_with(const struct field *whole, const char *end)
{
    uint32_t length = instar_length(end);
    if (whole->length < length)
        return 0;
    for (uint32_t at = 0; at < length; at++)
        if (whole->text[whole->length - length + at] != end[at])
            return 0;
    return 1;
}

static int starts_with(const char *text, uint32_t length, const char *start)
{
    uint32_t at = 0;
    while (start[at] && at < length && text[at] == start[at])
        at++;
    return !start[at];
}

/* Keep what stands after `start` of the line, without blanks around it, in a field that is still empty. */
static void take(struct field *field, const char *start)
{
    uint32_t at = instar_length(start), end = line.length;
    if (field->length || !starts_with(line.text, line.length, start))
        return;
    while (at < end && (line.text[at] == ' ' || line.text[at] == '\t'))
        at++;
    while (end > at && (line.text[end - 1] == ' ' || line.text[end - 1] == '\r'))
        end--;
    for (; at < end; at++)
        field->text[field->length++] = line.text[at];
}

/* At least as many bytes as JSON needs for it. */
static uint32_t cost(const struct field *field)
{
    uint32_t bytes = 0;
    for (uint32_t at = 0; at < field->length; at++) {
        unsigned char c = (unsigned char)field->text[at];
        bytes += c < 0x20 || c >= 0x7f || c == '"' || c == '\\' ? 6 : 1;
    }
    return bytes;
}

static void put(const char *key, const struct field *field)
{
    instar_key(work.host, key);
    instar_string_n(work.host, field->text, field->length);
}

static void show(void)
{
    uint32_t bytes = 48 + cost(&stanza.name) + cost(&stanza.version) + cost(&stanza.arch);
    work.full = work.full || work.used + bytes > MOST_REPLY;
    if (work.full)
        return;
    work.used += bytes;
    work.shown++;
    instar_begin_object(work.host);
    put("name", &stanza.name);
    put("version", &stanza.version);
    put("arch", &stanza.arch);
    instar_end_object(work.host);
}

/* dpkg says "<wanted> <error> <state>"; apk lists only what is installed. */
static int installed(void)
{
    static const char *const states[] = {" installed", " triggers-awaited", " triggers-pending", 0};
    static const char *const halves[] = {" unpacked", " half-installed", " half-configured", 0};
    if (work.is_apk)
        return 1;
    for (int n = 0; states[n]; n++)
        if (ends_with(&stanza.status, states[n]))
            return 1;
    for (int n = 0; halves[n]; n++)
        work.unfinished += ends_with(&stanza.status, halves[n]);
    return 0;
}

static void end_stanza(void)
{
    if (stanza.any && !stanza.name.length)
        work.unreadable++;
    else if (stanza.any && installed() && contains(&stanza.name, &work.match)) {
        if (!work.count_only && work.count >= work.skip)
            show();
        work.count++;
    }
    stanza.name.length = stanza.version.length = stanza.arch.length = stanza.status.length = 0;
    stanza.any = 0;
}

static void end_line(void)
{
    if (!line.length) {
        end_stanza();
        return;
    }
    stanza.any = 1;
    if (work.is_apk) {
        take(&stanza.name, "P:");
        take(&stanza.version, "V:");
        take(&stanza.arch, "A:");
    } else {
        take(&stanza.name, "Package:");
        take(&stanza.version, "Version:");
        take(&stanza.arch, "Architecture:");
        take(&stanza.status, "Status:");
    }
    line.length = 0;
}

/* One database, streamed. INSTAR_OK, INSTAR_ABSENT, or another reason why it cannot be read. */
static int64_t read_database(const char *path, int is_apk)
{
    int64_t offset = 0, got;
    work.is_apk = is_apk;
    line.length = 0;
    while ((got = instar_file_read(work.host, path, offset, chunk, CHUNK)) > 0 && offset < MOST_FILE) {
        offset += got;
        for (int64_t at = 0; at < got; at++) {
            if (chunk[at] == '\n')
                end_line();
            else if (line.length < ROOM)
                line.text[line.length++] = (char)chunk[at];
        }
    }
    if (got < 0)
        return got;
    if (line.length)
        end_line();
    end_stanza();
    return INSTAR_OK;
}

/* The first argument that is not known, in `out`; 0 when there is none. */
static int unknown(const char *json, const char *const *known, struct field *out)
{
    int depth = 0, key = 0;
    for (uint32_t at = 0; json[at]; at++) {
        char c = json[at];
        if (c == '"') {
            uint32_t start = ++at;
            while (json[at] && json[at] != '"')
                at += json[at] == '\\' && json[at + 1] ? 2 : 1;
            if (depth == 1 && key) {
                int n = 0;
                while (known[n] && !(instar_length(known[n]) == at - start &&
                                     starts_with(json + start, at - start, known[n])))
                    n++;
                if (!known[n]) {
                    for (out->length = 0; start < at && out->length < 60; start++)
                        out->text[out->length++] = json[start];
                    return 1;
                }
            }
            if (!json[at])
                return 0;
        } else if (c == '{' || c == '[')
            key = ++depth == 1;
        else if (c == '}' || c == ']')
            depth--;
        else if (depth == 1 && (c == ',' || c == ':'))
            key = c == ',';
    }
    return 0;
}

static void append(struct field *field, const char *text, uint32_t length)
{
    for (uint32_t at = 0; at < length && field->length + 1 < ROOM; at++)
        field->text[field->length++] = text[at];
    field->text[field->length] = 0;
}

static int32_t refuse_unknown(const struct instar_host *host)
{
    static const char *const known[] = {"match", "count_only", "skip", 0};
    static const char *const expected = "cannot list packages: expected 'match', 'count_only' or 'skip', got '";
    static struct field name, text;
    name.length = text.length = 0;
    if (instar_args(host, (char *)chunk, CHUNK) >= (int32_t)CHUNK)
        return instar_fail(host, "cannot list packages: expected short arguments, got more than 64 KiB");
    if (!unknown((const char *)chunk, known, &name))
        return INSTAR_OK;
    append(&text, expected, instar_length(expected));
    append(&text, name.text, name.length);
    append(&text, "'", 1);
    return instar_fail(host, text.text);
}

static int32_t read_arguments(const struct instar_host *host)
{
    int32_t length;
    if (refuse_unknown(host))
        return 1;
    length = instar_get_text(host, "match", work.match.text, ROOM);
    if (length >= (int32_t)ROOM)
        return instar_fail(host, "cannot list packages: expected at most 255 bytes as 'match', got more");
    work.match.length = length > 0 ? (uint32_t)length : 0;
    work.count_only = instar_get_bool(host, "count_only", 0);
    work.skip = instar_get_int(host, "skip", 0);
    if (work.skip < 0)
        return instar_fail(host, "cannot list packages: expected 0 or more as 'skip', got less");
    return INSTAR_OK;
}

static int32_t run(const struct instar_host *host)
{
    int64_t dpkg, apk;
    work.host = host;
    work.count = work.shown = work.unfinished = work.unreadable = 0;
    work.used = 0;
    work.full = 0;
    if (read_arguments(host))
        return 1;
    instar_key(host, "packages");
    instar_begin_list(host);
    dpkg = read_database(DPKG, 0);
    apk = read_database(APK, 1);
    instar_end_list(host);
    if (dpkg == INSTAR_ABSENT && apk == INSTAR_ABSENT)
        return instar_fail(host, "cannot list packages: expected a database of dpkg or apk, got neither");
    if (dpkg != INSTAR_OK && apk != INSTAR_OK)
        return instar_fail(host, "cannot list packages: the database cannot be read");
    instar_key(host, "databases");
    instar_begin_list(host);
    if (dpkg == INSTAR_OK)
        instar_string(host, "dpkg");
    if (apk == INSTAR_OK)
        instar_string(host, "apk");
    instar_end_list(host);
    instar_put_int(host, "count", work.count);
    instar_put_int(host, "unfinished", work.unfinished);
    instar_put_int(host, "unreadable", work.unreadable);
    instar_key(host, "next");
    if (work.full)
        instar_int(host, work.skip + work.shown);
    else
        instar_null(host);
    return INSTAR_OK;
}

INSTAR_ONESHOT("packages.list", "1.0.0", run);
