/* The date as the process sees it that this is loaded into (LD_PRELOAD): later by as many seconds as the file holds that FAULT_CLOCK names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *later;
static int (*gettime)(clockid_t, struct timespec *);

/* Before there is a jail. The libc's own function makes no system call, which a jail could forbid. */
__attribute__((constructor)) static void load(void) {
    const char *path = getenv("FAULT_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *later, PROT_READ, MAP_SHARED, fd, 0);
    if (map != MAP_FAILED)
        later = map;
    if (fd >= 0)
        close(fd);
    gettime = dlsym(RTLD_NEXT, "clock_gettime");
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result;
    if (!gettime)
        load();
    result = gettime(clock, time);
    if (!result && later && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        time->tv_sec += *later;
    return result;
}

int gettimeofday(struct timeval *time, void *zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now))
        return -1;
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *time) {
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now))
        return -1;
    if (time)
        *time = now.tv_sec;
    return now.tv_sec;
}
