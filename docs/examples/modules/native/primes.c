/* instarctl job run example.primes below=1000000 --group web */
#include "instar_module.h"

#include <stdlib.h>

static int32_t run(const struct instar_host *host)
{
    int64_t below = instar_get_int(host, "below", 1000), count = 0;
    char *composite;

    if (below < 2 || below > 50000000)
        return instar_fail(host, "cannot count: expected 'below' from 2 to 50000000, got another number");
    composite = calloc((size_t)below, 1);
    if (!composite)
        return instar_fail(host, "cannot count: expected memory for the sieve, got none");
    for (int64_t n = 2; n < below; n++) {
        if (composite[n])
            continue;
        count++;
        for (int64_t multiple = n * n; multiple < below; multiple += n)
            composite[multiple] = 1;
        if (count % 100000 == 0)
            instar_progress(host, (double)n / (double)below, "counting");
    }
    free(composite);
    instar_put_int(host, "primes", count);
    return INSTAR_OK;
}

INSTAR_ONESHOT("example.primes", "1.0.0", run);
