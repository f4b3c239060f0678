/*
 * instar_module.h: what a module of kind `native` or `wasm` is built with. Interface version (ABI) 1.
 *
 * One file, C99, also for C++; the notes marked Rust say what a `#[repr(C)]` binding must know. The same
 * source compiles to both kinds:
 *
 *   cc -shared -fPIC -O2 -I sdk -o hello.so hello.c
 *   clang --target=wasm32 -O2 -ffreestanding -nostdlib -Wl,--no-entry -I sdk -o hello.wasm hello.c
 *
 * A module that runs once:
 *
 *   #include "instar_module.h"
 *
 *   static int32_t run(const struct instar_host *host)
 *   {
 *       instar_put_int(host, "twice", 2 * instar_get_int(host, "n", 0));
 *       return INSTAR_OK;
 *   }
 *   INSTAR_ONESHOT("example.hello", "1.0.0", run);
 *
 * Rules that hold everywhere:
 *   - Texts are UTF-8, given as pointer and length in bytes; what is not UTF-8 is replaced by U+FFFD. The
 *     functions below that take `const char *` alone want a NUL at the end.
 *   - `host` is good only until the function that got it returns, and only on the thread that called it.
 *   - The reply is an object. Calls that build it in an order that makes no JSON are refused with
 *     INSTAR_BAD_ORDER; the first such mistake, and a pointer that leads nowhere, become the error of the
 *     whole call whatever the module returns, so a module need not check each one. So does state that could
 *     not be saved. INSTAR_ABSENT and INSTAR_REFUSED are answers, for the module to judge.
 *   - A function that fills `out` copies at most `room - 1` bytes and a NUL, and returns the length of the
 *     whole text (without the NUL): when that is `room` or more, the text was cut.
 */
#ifndef INSTAR_MODULE_H
#define INSTAR_MODULE_H

#include <stddef.h>
#include <stdint.h>

#define INSTAR_ABI 1u
#define INSTAR_MODULE_MAGIC 0x494E5354u /* in struct instar_module */
#define INSTAR_HOST_MAGIC 0x484F5354u   /* in struct instar_host */

/* What the host's functions return when they cannot do it. 0 or more: they did. */
#define INSTAR_OK 0
#define INSTAR_ABSENT (-1)      /* no such argument, no state saved yet, no such file */
#define INSTAR_BAD_POINTER (-2) /* a pointer and length that are not the module's memory */
#define INSTAR_BAD_ORDER (-3)   /* the reply would not be JSON: a value without a key, an end without a begin */
#define INSTAR_BAD_VALUE (-4)   /* another type than asked for, not JSON, not a finite number */
#define INSTAR_REFUSED (-5)     /* a file that `touches.read` does not name, state of a module that keeps none */
#define INSTAR_FAILED (-6)      /* the machine could not: no space, no permission */
#define INSTAR_TOO_LARGE (-7)   /* the reply is more than a result can carry: 224 KiB, 30 levels */

/* What an argument is (instar_kind). */
#define INSTAR_NULL 0
#define INSTAR_BOOL 1
#define INSTAR_INT 2    /* a whole number that fits in 64 bits */
#define INSTAR_DOUBLE 3 /* any other number */
#define INSTAR_TEXT 4
#define INSTAR_LIST 5
#define INSTAR_OBJECT 6

/*
 * Arguments are named by their key, or by a JSON pointer when the name begins with '/': "/paths/0" is the
 * first item of the list `paths`. One that is absent or null gives what `otherwise` says. One of another
 * type does too, and the whole call then ends with an error that names it.
 */

#ifndef __wasm__

/*
 * What the runner gives to a module. New functions are added at the end and `size` grows: one that was not
 * in version 1 is there when INSTAR_HAS says so. Rust: `#[repr(C)]`, each member `unsafe extern "C" fn`,
 * in this order; `self_` is passed on as it is.
 */
struct instar_host {
    uint32_t magic; /* INSTAR_HOST_MAGIC */
    uint32_t abi;   /* INSTAR_ABI */
    uint32_t size;  /* of this struct, bytes */
    uint32_t reserved;
    void *self; /* first argument of every function below */

    /* the arguments: all of them as JSON text, then one by one */
    int32_t (*args)(void *self, char *out, uint32_t room);
    int32_t (*kind)(void *self, const char *key, uint32_t key_length);
    int32_t (*count)(void *self, const char *key, uint32_t key_length);
    int32_t (*get_text)(void *self, const char *key, uint32_t key_length, char *out, uint32_t room);
    int64_t (*get_int)(void *self, const char *key, uint32_t key_length, int64_t otherwise);
    double (*get_double)(void *self, const char *key, uint32_t key_length, double otherwise);
    int32_t (*get_bool)(void *self, const char *key, uint32_t key_length, int32_t otherwise);

    /* the reply */
    int32_t (*text)(void *self, const char *text, uint32_t length);
    int32_t (*key)(void *self, const char *key, uint32_t length);
    int32_t (*begin_object)(void *self);
    int32_t (*end_object)(void *self);
    int32_t (*begin_list)(void *self);
    int32_t (*end_list)(void *self);
    int32_t (*put_string)(void *self, const char *text, uint32_t length);
    int32_t (*put_int)(void *self, int64_t value);
    int32_t (*put_double)(void *self, double value);
    int32_t (*put_bool)(void *self, int32_t value);
    int32_t (*put_null)(void *self);
    int32_t (*put_json)(void *self, const char *json, uint32_t length);
    int32_t (*fail)(void *self, const char *text, uint32_t length);

    /* what is told while it runs */
    int32_t (*progress)(void *self, double fraction, const char *text, uint32_t length);
    int32_t (*log)(void *self, const char *text, uint32_t length);

    /* state, files, time */
    int32_t (*load)(void *self, char *out, uint32_t room);
    int32_t (*save)(void *self, const char *json, uint32_t length);
    int32_t (*data)(void *self, char *out, uint32_t room);
    int64_t (*file_read)(void *self, const char *path, uint32_t path_length, int64_t offset, void *out, uint32_t room);
    int32_t (*file_list)(void *self, const char *path, uint32_t path_length, char *out, uint32_t room);
    double (*now)(void *self);
};

#define INSTAR_HAS(host, member) \
    ((host)->size >= offsetof(struct instar_host, member) + sizeof(void *) && (host)->member)
#define INSTAR_CALL0(host, name) (host)->name((host)->self)
#define INSTAR_CALL(host, name, ...) (host)->name((host)->self, __VA_ARGS__)

#else /* __wasm__: the same functions are imports from "instar", without `self` */

struct instar_host {
    uint32_t abi;
};

#define INSTAR_IMPORT(type, name, arguments) \
    __attribute__((import_module("instar"), import_name(#name))) extern type instar_import_##name arguments
#ifdef __cplusplus
extern "C" {
#endif
INSTAR_IMPORT(int32_t, args, (char *out, uint32_t room));
INSTAR_IMPORT(int32_t, kind, (const char *key, uint32_t key_length));
INSTAR_IMPORT(int32_t, count, (const char *key, uint32_t key_length));
INSTAR_IMPORT(int32_t, get_text, (const char *key, uint32_t key_length, char *out, uint32_t room));
INSTAR_IMPORT(int64_t, get_int, (const char *key, uint32_t key_length, int64_t otherwise));
INSTAR_IMPORT(double, get_double, (const char *key, uint32_t key_length, double otherwise));
INSTAR_IMPORT(int32_t, get_bool, (const char *key, uint32_t key_length, int32_t otherwise));
INSTAR_IMPORT(int32_t, text, (const char *text, uint32_t length));
INSTAR_IMPORT(int32_t, key, (const char *key, uint32_t length));
INSTAR_IMPORT(int32_t, begin_object, (void));
INSTAR_IMPORT(int32_t, end_object, (void));
INSTAR_IMPORT(int32_t, begin_list, (void));
INSTAR_IMPORT(int32_t, end_list, (void));
INSTAR_IMPORT(int32_t, put_string, (const char *text, uint32_t length));
INSTAR_IMPORT(int32_t, put_int, (int64_t value));
INSTAR_IMPORT(int32_t, put_double, (double value));
INSTAR_IMPORT(int32_t, put_bool, (int32_t value));
INSTAR_IMPORT(int32_t, put_null, (void));
INSTAR_IMPORT(int32_t, put_json, (const char *json, uint32_t length));
INSTAR_IMPORT(int32_t, fail, (const char *text, uint32_t length));
INSTAR_IMPORT(int32_t, progress, (double fraction, const char *text, uint32_t length));
INSTAR_IMPORT(int32_t, log, (const char *text, uint32_t length));
INSTAR_IMPORT(int32_t, load, (char *out, uint32_t room));
INSTAR_IMPORT(int32_t, save, (const char *json, uint32_t length));
INSTAR_IMPORT(int32_t, data, (char *out, uint32_t room));
INSTAR_IMPORT(int64_t, file_read, (const char *path, uint32_t path_length, int64_t offset, void *out, uint32_t room));
INSTAR_IMPORT(int32_t, file_list, (const char *path, uint32_t path_length, char *out, uint32_t room));
INSTAR_IMPORT(double, now, (void));
#ifdef __cplusplus
}
#endif
#undef INSTAR_IMPORT

#define INSTAR_HAS(host, member) 1 /* what is not there is an import that fails, before anything runs */
#define INSTAR_CALL0(host, name) ((void)(host), instar_import_##name())
#define INSTAR_CALL(host, name, ...) ((void)(host), instar_import_##name(__VA_ARGS__))

#endif

/* ---- The functions a module calls; texts that end with a NUL. */

static inline uint32_t instar_length(const char *text)
{
    const volatile char *at = text; /* volatile: no compiler makes a call of strlen of it, which wasm has not */
    uint32_t length = 0;
    if (!text)
        return 0;
    while (at[length])
        length++;
    return length;
}

/* All arguments, a JSON object. */
static inline int32_t instar_args(const struct instar_host *host, char *out, uint32_t room)
{
    return INSTAR_CALL(host, args, out, room);
}

/* INSTAR_NULL … INSTAR_OBJECT, or INSTAR_ABSENT. */
static inline int32_t instar_kind(const struct instar_host *host, const char *key)
{
    return INSTAR_CALL(host, kind, key, instar_length(key));
}

/* How many items a list or members an object has; INSTAR_ABSENT for anything else. */
static inline int32_t instar_count(const struct instar_host *host, const char *key)
{
    return INSTAR_CALL(host, count, key, instar_length(key));
}

/* A text's length, or INSTAR_ABSENT, and then `out` is "". A list or an object comes as JSON text. */
static inline int32_t instar_get_text(const struct instar_host *host, const char *key, char *out, uint32_t room)
{
    return INSTAR_CALL(host, get_text, key, instar_length(key), out, room);
}

static inline int64_t instar_get_int(const struct instar_host *host, const char *key, int64_t otherwise)
{
    return INSTAR_CALL(host, get_int, key, instar_length(key), otherwise);
}

static inline double instar_get_double(const struct instar_host *host, const char *key, double otherwise)
{
    return INSTAR_CALL(host, get_double, key, instar_length(key), otherwise);
}

/* 1 or 0. */
static inline int32_t instar_get_bool(const struct instar_host *host, const char *key, int32_t otherwise)
{
    return INSTAR_CALL(host, get_bool, key, instar_length(key), otherwise);
}

/* Add to the reply's member `text`, anywhere between the other calls: for a person to read. */
static inline int32_t instar_text(const struct instar_host *host, const char *text)
{
    return INSTAR_CALL(host, text, text, instar_length(text));
}

/* In an object each value needs its key first; in a list it must not have one. */
static inline int32_t instar_key(const struct instar_host *host, const char *key)
{
    return INSTAR_CALL(host, key, key, instar_length(key));
}

static inline int32_t instar_begin_object(const struct instar_host *host) { return INSTAR_CALL0(host, begin_object); }
static inline int32_t instar_end_object(const struct instar_host *host) { return INSTAR_CALL0(host, end_object); }
static inline int32_t instar_begin_list(const struct instar_host *host) { return INSTAR_CALL0(host, begin_list); }
static inline int32_t instar_end_list(const struct instar_host *host) { return INSTAR_CALL0(host, end_list); }

static inline int32_t instar_string_n(const struct instar_host *host, const char *text, uint32_t length)
{
    return INSTAR_CALL(host, put_string, text, length);
}

static inline int32_t instar_string(const struct instar_host *host, const char *text)
{
    return INSTAR_CALL(host, put_string, text, instar_length(text));
}

static inline int32_t instar_int(const struct instar_host *host, int64_t value)
{
    return INSTAR_CALL(host, put_int, value);
}

/* A finite number: JSON has no others. */
static inline int32_t instar_double(const struct instar_host *host, double value)
{
    return INSTAR_CALL(host, put_double, value);
}

static inline int32_t instar_bool(const struct instar_host *host, int32_t value)
{
    return INSTAR_CALL(host, put_bool, value);
}

static inline int32_t instar_null(const struct instar_host *host) { return INSTAR_CALL0(host, put_null); }

/* One whole JSON value that the module wrote itself. */
static inline int32_t instar_json(const struct instar_host *host, const char *json)
{
    return INSTAR_CALL(host, put_json, json, instar_length(json));
}

/* A key and its value at once. */
static inline int32_t instar_put_string(const struct instar_host *host, const char *key, const char *text)
{
    instar_key(host, key);
    return instar_string(host, text);
}

static inline int32_t instar_put_int(const struct instar_host *host, const char *key, int64_t value)
{
    instar_key(host, key);
    return instar_int(host, value);
}

static inline int32_t instar_put_double(const struct instar_host *host, const char *key, double value)
{
    instar_key(host, key);
    return instar_double(host, value);
}

static inline int32_t instar_put_bool(const struct instar_host *host, const char *key, int32_t value)
{
    instar_key(host, key);
    return instar_bool(host, value);
}

/* Why it cannot be done; always gives 1, to be returned: `return instar_fail(host, "cannot …");`. */
static inline int32_t instar_fail(const struct instar_host *host, const char *text)
{
    (void)INSTAR_CALL(host, fail, text, instar_length(text));
    return 1;
}

/* `fraction` of the whole, 0 to 1, or -1: not known. Shown while the job runs; may be lost. */
static inline int32_t instar_progress(const struct instar_host *host, double fraction, const char *text)
{
    return INSTAR_CALL(host, progress, fraction, text, instar_length(text));
}

/* One line of the job's log; may be lost. */
static inline int32_t instar_log(const struct instar_host *host, const char *text)
{
    return INSTAR_CALL(host, log, text, instar_length(text));
}

/* What was saved last, a JSON object, or INSTAR_ABSENT. */
static inline int32_t instar_load(const struct instar_host *host, char *out, uint32_t room)
{
    return INSTAR_CALL(host, load, out, room);
}

/* Keep a JSON object; when it returns INSTAR_OK it outlives a power cut. */
static inline int32_t instar_save(const struct instar_host *host, const char *json)
{
    return INSTAR_CALL(host, save, json, instar_length(json));
}

/* The path of the module's own folder. A wasm module can read below it, with instar_file_read. */
static inline int32_t instar_data(const struct instar_host *host, char *out, uint32_t room)
{
    return INSTAR_CALL(host, data, out, room);
}

/* Up to `room` bytes from `offset`: how many, 0 at the end. Only what `touches.read` names or holds. No NUL. */
static inline int64_t instar_file_read(const struct instar_host *host, const char *path, int64_t offset, void *out,
                                       uint32_t room)
{
    return INSTAR_CALL(host, file_read, path, instar_length(path), offset, out, room);
}

/* A folder, as a JSON list of {"name","kind":"file|folder|link|other","size","mode","mtime"}, sorted by name. */
static inline int32_t instar_file_list(const struct instar_host *host, const char *path, char *out, uint32_t room)
{
    return INSTAR_CALL(host, file_list, path, instar_length(path), out, room);
}

/* Seconds since 1970, by the machine's clock. */
static inline double instar_now(const struct instar_host *host) { return INSTAR_CALL0(host, now); }

/*
 * ---- What a module gives to the runner.
 *
 * run, start, request  INSTAR_OK, or anything else for 'failed' (see instar_fail)
 * step                 seconds until it wants to be called again, negative for never; first called after start
 * ready_to_stop        0 while an operation is under way; state is saved before anything else is answered
 * stop                 the last call
 * health               0 or "" when well, else what is wrong
 *
 * A one-shot module has `run`; a service has `start` and `request`, and the others or 0.
 */
typedef int32_t (*instar_call)(const struct instar_host *host);
typedef double (*instar_step)(const struct instar_host *host);
typedef void (*instar_stop)(const struct instar_host *host);
typedef const char *(*instar_health)(const struct instar_host *host);

#ifdef __cplusplus
extern "C" {
#endif

#ifndef __wasm__

/* Rust: `#[no_mangle] pub static instar_module_v1: Module`, `#[repr(C)]`, functions as `Option<extern "C" fn>`. */
struct instar_module {
    uint32_t magic; /* INSTAR_MODULE_MAGIC */
    uint32_t abi;   /* INSTAR_ABI */
    uint32_t size;  /* of this struct, bytes */
    uint32_t reserved;
    const char *name; /* as in module.toml: another name is refused */
    const char *version;
    instar_call run;
    instar_call start;
    instar_step step;
    instar_call request;
    instar_call ready_to_stop;
    instar_stop stop;
    instar_health health;
};

#define INSTAR_EXPORT __attribute__((visibility("default")))
extern INSTAR_EXPORT const struct instar_module instar_module_v1;

#define INSTAR_ONESHOT(NAME, VERSION, RUN)                                                                       \
    const struct instar_module instar_module_v1 = {                                                              \
        INSTAR_MODULE_MAGIC, INSTAR_ABI, sizeof(struct instar_module), 0, NAME, VERSION, RUN, 0, 0, 0, 0, 0, 0}
#define INSTAR_SERVICE(NAME, VERSION, START, STEP, REQUEST, READY_TO_STOP, STOP, HEALTH)                         \
    const struct instar_module instar_module_v1 = {                                                              \
        INSTAR_MODULE_MAGIC, INSTAR_ABI, sizeof(struct instar_module), 0, NAME, VERSION, 0, START, STEP, REQUEST, \
        READY_TO_STOP, STOP, HEALTH}

#else /* __wasm__: exported functions, and the memory that the linker exports as `memory` */

#ifdef __cplusplus
#define INSTAR_C extern "C"
#else
#define INSTAR_C
#endif

#define INSTAR_ENTRY(TYPE, NAME) INSTAR_C __attribute__((export_name("instar_" #NAME), used)) TYPE instar_do_##NAME(void)
#define INSTAR_DESCRIBE(NAME, VERSION)                            \
    static const struct instar_host instar_the_host = {INSTAR_ABI}; \
    INSTAR_ENTRY(uint32_t, magic) { return INSTAR_MODULE_MAGIC; } \
    INSTAR_ENTRY(uint32_t, abi) { return INSTAR_ABI; }            \
    INSTAR_ENTRY(const char *, name) { return NAME; }             \
    INSTAR_ENTRY(const char *, version) { return VERSION; }
#define INSTAR_PASS(TYPE, RETURNS, NAME, FUNCTION, NONE)              \
    INSTAR_ENTRY(RETURNS, NAME)                                       \
    {                                                                 \
        const TYPE function = (FUNCTION);                             \
        return function ? function(&instar_the_host) : NONE; \
    }
#define INSTAR_END struct instar_host /* takes the semicolon that follows the macro */

#define INSTAR_ONESHOT(NAME, VERSION, RUN)         \
    INSTAR_DESCRIBE(NAME, VERSION)                 \
    INSTAR_PASS(instar_call, int32_t, run, RUN, 0) \
    INSTAR_END
#define INSTAR_SERVICE(NAME, VERSION, START, STEP, REQUEST, READY_TO_STOP, STOP, HEALTH) \
    INSTAR_DESCRIBE(NAME, VERSION)                                                       \
    INSTAR_PASS(instar_call, int32_t, start, START, 0)                                   \
    INSTAR_PASS(instar_step, double, step, STEP, -1)                                     \
    INSTAR_PASS(instar_call, int32_t, request, REQUEST, 0)                               \
    INSTAR_PASS(instar_call, int32_t, ready_to_stop, READY_TO_STOP, 1)                   \
    INSTAR_ENTRY(void, stop)                                                             \
    {                                                                                    \
        const instar_stop function = (STOP);                                             \
        if (function)                                                                    \
            function(&instar_the_host);                                                  \
    }                                                                                    \
    INSTAR_PASS(instar_health, const char *, health, HEALTH, 0)                          \
    INSTAR_END

#endif

#ifdef __cplusplus
}
#endif

#endif
