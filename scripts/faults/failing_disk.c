/* A disk below $FAILING_DISK that notes every call that changes it, and refuses them from a given one on.
 *
 * Loaded with LD_PRELOAD, so that Python, torch's C++ and Megatron meet it alike. Calls are counted from `disk_begin` to
 * `disk_end`; a line of the log is the call and its paths, tab-separated: create, write, sync, rename, mkdir, unlink, rmdir.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_FDS 4096
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char *path_of[MAX_FDS]; /* of descriptors opened below the root; NULL elsewhere */
static const char *root;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int active, calls, first_refused, refused_error, only_once, log_fd = -1;

void disk_begin(const char *log, int first, int error, int once) {
    root = getenv("FAILING_DISK");
    log_fd = log ? REAL(open)(log, O_WRONLY | O_CREAT | O_TRUNC, 0600) : -1;
    calls = 0, first_refused = first, refused_error = error, only_once = once, active = 1;
}

int disk_end(void) {
    active = 0;
    if (log_fd >= 0) REAL(close)(log_fd);
    log_fd = -1;
    return calls;
}

static int is_below(const char *path) {
    return root && path && !strncmp(path, root, strlen(root));
}

/* The absolute path that a call names, or NULL where it is not below the root. */
static const char *resolve(int folder, const char *path, char *into) {
    if (!path || path[0] == '/' || folder == AT_FDCWD) return is_below(path) ? path : NULL;
    if (folder < 0 || folder >= MAX_FDS || !path_of[folder]) return NULL;
    snprintf(into, PATH_MAX, "%s/%s", path_of[folder], path);
    return into;
}

static const char *of_fd(int fd) { return fd >= 0 && fd < MAX_FDS ? path_of[fd] : NULL; }

/* Counts a call; -1 with errno set where it is refused. What needs no room a full disk does not refuse. */
static int admit(const char *call, const char *path, const char *to) {
    if (!active || !path) return 0;
    pthread_mutex_lock(&lock);
    int number = calls++;
    int needs_room = strcmp(call, "unlink") && strcmp(call, "rmdir");
    int is_full = refused_error == ENOSPC || refused_error == EDQUOT;
    int refused = first_refused >= 0 && (only_once ? number == first_refused : number >= first_refused);
    if (refused && is_full && !needs_room && number != first_refused) refused = 0;
    if (!refused && log_fd >= 0) {
        char line[3 * PATH_MAX];
        int size = snprintf(line, sizeof line, to ? "%s\t%s\t%s\n" : "%s\t%s\n", call, path, to);
        if (REAL(write)(log_fd, line, size) != size) abort();
    }
    pthread_mutex_unlock(&lock);
    if (refused) errno = refused_error;
    return refused ? -1 : 0;
}

static int opened(int fd, const char *path) {
    if (fd >= 0 && fd < MAX_FDS && path) {
        free(path_of[fd]);
        path_of[fd] = strdup(path);
    }
    return fd;
}

static int open_at(int folder, const char *name, int flags, mode_t mode) {
    char buffer[PATH_MAX];
    const char *path = resolve(folder, name, buffer);
    if (flags & (O_CREAT | O_TRUNC) && admit("create", path, NULL)) return -1;
    return opened(REAL(openat)(folder, name, flags, mode), path);
}

#define MODE(flags, last)                          \
    mode_t mode = 0;                               \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {       \
        va_list arguments;                         \
        va_start(arguments, last);                 \
        mode = va_arg(arguments, mode_t);          \
        va_end(arguments);                         \
    }

int open(const char *path, int flags, ...) { MODE(flags, flags) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, flags) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags, flags) return open_at(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags, flags) return open_at(folder, path, flags, mode); }

/* libstdc++ opens with these, whose own call of open() cannot be met */
static FILE *open_stream(FILE *(*real)(const char *, const char *), const char *path, const char *mode) {
    const char *below = is_below(path) ? path : NULL;
    if (mode[0] != 'r' && admit("create", below, NULL)) return NULL;
    FILE *stream = real(path, mode);
    if (stream) opened(fileno(stream), below);
    return stream;
}

FILE *fopen(const char *path, const char *mode) { return open_stream(REAL(fopen), path, mode); }
FILE *fopen64(const char *path, const char *mode) { return open_stream(REAL(fopen64), path, mode); }

int close(int fd) {
    if (fd >= 0 && fd < MAX_FDS && path_of[fd]) free(path_of[fd]), path_of[fd] = NULL;
    return REAL(close)(fd);
}

int fclose(FILE *stream) {
    int fd = fileno(stream);
    if (fd >= 0 && fd < MAX_FDS && path_of[fd]) free(path_of[fd]), path_of[fd] = NULL;
    return REAL(fclose)(stream);
}

#define ON_FD(call, type, name, parameters, ...)                              \
    type name parameters {                                                    \
        return admit(call, of_fd(fd), NULL) ? -1 : REAL(name)(__VA_ARGS__);   \
    }

ON_FD("write", ssize_t, write, (int fd, const void *data, size_t size), fd, data, size)
ON_FD("write", ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
ON_FD("write", ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), fd, data, size, at)
ON_FD("write", ssize_t, writev, (int fd, const struct iovec *parts, int count), fd, parts, count)
ON_FD("write", int, ftruncate, (int fd, off_t size), fd, size)
ON_FD("write", int, ftruncate64, (int fd, off64_t size), fd, size)
ON_FD("sync", int, fsync, (int fd), fd)
ON_FD("sync", int, fdatasync, (int fd), fd)

static int rename_at(int from_folder, const char *from, int to_folder, const char *to) {
    char from_buffer[PATH_MAX], to_buffer[PATH_MAX];
    const char *target = resolve(to_folder, to, to_buffer);
    if (admit("rename", resolve(from_folder, from, from_buffer), target)) return -1;
    return REAL(renameat)(from_folder, from, to_folder, to);
}

int rename(const char *from, const char *to) { return rename_at(AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return rename_at(from_folder, from, to_folder, to);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    char buffer[PATH_MAX];
    return admit("mkdir", resolve(folder, path, buffer), NULL) ? -1 : REAL(mkdirat)(folder, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int folder, const char *path, int flags) {
    char buffer[PATH_MAX];
    const char *call = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    return admit(call, resolve(folder, path, buffer), NULL) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
