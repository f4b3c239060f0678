/* The least that a native module can do. */
#include "instar_module.h"

static int32_t run(const struct instar_host *host)
{
    instar_put_int(host, "n", instar_get_int(host, "n", 0));
    return INSTAR_OK;
}

INSTAR_ONESHOT("bench.native", "1.0.0", run);
