// Stands between the program and the kernel, and lets one chosen call on the data directory fail.
//
// It is loaded with LD_PRELOAD, but does not replace functions of libc: not all calls go through them, fallocate and
// fstatfs for instance come straight from rustix. Instead it has the kernel turn every system call that has to do with
// files into a SIGSYS (seccomp), makes the call itself in the handler, or fails it, and says so in a trace. Its own calls
// carry a sixth argument that none of these calls has, by which the kernel lets them pass.
//
// Set in the environment:
//   SHIM_DIRECTORY  only calls on this directory, what lies in it, and its parent, are traced and may fail
//   SHIM_TRACE      the file to write to, a line for each such call: number, call, file, result
//   SHIM_CALL, SHIM_FILE, SHIM_NTH, SHIM_FAULT
//                   the fault, if there is to be one: the call, the file's class (its name with `#` for the digits that
//                   it begins with; `.` for the directory, `..` for its parent), the which of these, and what happens:
//                     a number  fails with this errno, and nothing is done
//                     short     does half of what it is asked for, and says so: no failure at all
//                     torn      writes half, in whole sectors, and fails with EIO
//                     lost      a sync that fails with EIO and loses what was written to the file since the last sync

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

// What the sixth argument of the shim's own calls is.
#define PASS 0x5ca1ab1eu

// The status of a process that can't be watched: the test skips, and says so.
#define EXIT_UNSUPPORTED 77

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#define ARGUMENT(context, n) ((long)(context)->uc_mcontext.gregs[(const int[]){REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8}[n]])
#define SET_RESULT(context, result) ((context)->uc_mcontext.gregs[REG_RAX] = (result))
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#define ARGUMENT(context, n) ((long)(context)->uc_mcontext.regs[n])
#define SET_RESULT(context, result) ((context)->uc_mcontext.regs[0] = (unsigned long)(result))
#else
#define UNSUPPORTED
#define ARCHITECTURE 0
#define ARGUMENT(context, n) 0L
#define SET_RESULT(context, result) ((void)(result))
#endif

// How a call names its file.
enum { BY_DESCRIPTOR, BY_PATH, BY_PATH_AT };

static const struct call {
    long number;
    int naming;
    const char *name;
} calls[] = {
#ifdef SYS_open
    {SYS_open, BY_PATH, "open"},
    {SYS_creat, BY_PATH, "create"},
    {SYS_rename, BY_PATH, "rename"},
    {SYS_unlink, BY_PATH, "unlink"},
    {SYS_mkdir, BY_PATH, "mkdir"},
    {SYS_stat, BY_PATH, "stat"},
    {SYS_truncate, BY_PATH, "ftruncate"},
#endif
    {SYS_openat, BY_PATH_AT, "open"},
#ifdef SYS_renameat
    {SYS_renameat, BY_PATH_AT, "rename"},
#endif
    {SYS_renameat2, BY_PATH_AT, "rename"},
    {SYS_unlinkat, BY_PATH_AT, "unlink"},
    {SYS_mkdirat, BY_PATH_AT, "mkdir"},
    {SYS_statx, BY_PATH_AT, "stat"},
    {SYS_fstat, BY_DESCRIPTOR, "stat"},
    {SYS_fsync, BY_DESCRIPTOR, "fsync"},
    {SYS_fdatasync, BY_DESCRIPTOR, "fdatasync"},
    {SYS_ftruncate, BY_DESCRIPTOR, "ftruncate"},
    {SYS_fallocate, BY_DESCRIPTOR, "fallocate"},
    {SYS_fstatfs, BY_DESCRIPTOR, "fstatfs"},
    {SYS_flock, BY_DESCRIPTOR, "flock"},
    {SYS_getdents64, BY_DESCRIPTOR, "list"},
    {SYS_pread64, BY_DESCRIPTOR, "pread"},
    {SYS_pwrite64, BY_DESCRIPTOR, "pwrite"},
    {SYS_pwritev, BY_DESCRIPTOR, "pwritev"},
};
#define CALLS (sizeof calls / sizeof *calls)

// Classes shorter than this are all there are.
#define CLASS_MAX 128

static const char *directory;
static int trace = -1;
static const char *fault_call, *fault_file, *fault;
static long fault_nth;
static long counted, matched;

// What was written since the last sync, for `lost`. More than one file is never in flight at once but for the snapshot's,
// and a test that overruns this is told.
#define WRITES_MAX 256
static struct { int descriptor; size_t length; off_t offset; char *before; } writes[WRITES_MAX];
static int writes_count;
static int writes_lock;

// A system call that the filter lets pass; the result as the kernel gives it, negative for an error.
static long pass(long number, long a, long b, long c, long d, long e) {
    long result = syscall(number, a, b, c, d, e, (long)PASS << 32 | PASS);
    return result == -1 ? -errno : result;
}

static void say(const char *format, ...) {
    char line[PATH_MAX + 256];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    (void)!write(trace, line, (size_t)length);
}

static void lock(void) {
    while (__atomic_exchange_n(&writes_lock, 1, __ATOMIC_ACQUIRE)) {
    }
}

static void unlock(void) { __atomic_store_n(&writes_lock, 0, __ATOMIC_RELEASE); }

static void remember_write(int descriptor, size_t length, off_t offset, char *before) {
    lock();
    if (writes_count == WRITES_MAX) {
        say("shim: too many writes without a sync\n");
        abort();
    }
    writes[writes_count].descriptor = descriptor;
    writes[writes_count].length = length;
    writes[writes_count].offset = offset;
    writes[writes_count].before = before;
    writes_count += 1;
    unlock();
}

// Forgets what was written to a file; if it is `lost`, the file holds again what it held before, the latest write undone
// first.
static void settle_writes(int descriptor, int lost) {
    lock();
    for (int at = writes_count - 1; lost && at >= 0; at--) {
        for (size_t done = 0; writes[at].descriptor == descriptor && done < writes[at].length;) {
            long written = pass(SYS_pwrite64, descriptor, (long)writes[at].before + (long)done,
                                (long)(writes[at].length - done), writes[at].offset + (off_t)done, 0);
            if (written <= 0) {
                abort();
            }
            done += (size_t)written;
        }
    }
    int kept = 0;
    for (int at = 0; at < writes_count; at++) {
        if (writes[at].descriptor == descriptor) {
            free(writes[at].before);
        } else {
            writes[kept++] = writes[at];
        }
    }
    writes_count = kept;
    unlock();
}

// The class of the file at `path`; NULL if it is not to be watched.
static const char *class_of(const char *path, char *class) {
    size_t length = strlen(directory);
    size_t parent_length = (size_t)(strrchr(directory, '/') - directory);
    if (strlen(path) == parent_length && strncmp(path, directory, parent_length) == 0) {
        return strcpy(class, "..");
    }
    if (strncmp(path, directory, length) != 0 || (path[length] != 0 && path[length] != '/')) {
        return NULL;
    }
    if (path[length] == 0 || path[length + 1] == 0) {
        return strcpy(class, ".");
    }
    const char *name = path + length + 1;
    size_t digits = strspn(name, "0123456789abcdef");
    snprintf(class, CLASS_MAX, "%s%s", digits == 16 ? "#" : "", digits == 16 ? name + 16 : name);
    return class;
}

static const char *path_of(const struct call *call, const long *argument, char *buffer) {
    if (call->naming == BY_PATH) {
        return (const char *)argument[0];
    }
    if (call->naming == BY_PATH_AT && argument[1] != 0 && *(const char *)argument[1] == '/') {
        return (const char *)argument[1];
    }
    // Of the descriptor. Relative paths are none of the program's own.
    if (call->naming == BY_PATH_AT && argument[1] != 0 && *(const char *)argument[1] != 0) {
        return "";
    }
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%ld", argument[0]);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

static int creates(const struct call *call, const long *argument) {
    if (strcmp(call->name, "open") != 0) {
        return 0;
    }
    return ((call->naming == BY_PATH_AT ? argument[2] : argument[1]) & O_CREAT) != 0;
}

static long do_it(const struct call *call, const long *argument) {
    char *before = NULL;
    if (call->number == SYS_pwrite64) {
        // Zeros where the file ends before.
        before = calloc(1, (size_t)argument[2] + 1);
        if (before == NULL) {
            abort();
        }
        (void)pass(SYS_pread64, argument[0], (long)before, argument[2], argument[3], 0);
    }
    long result = pass(call->number, argument[0], argument[1], argument[2], argument[3], argument[4]);
    if (call->number == SYS_pwrite64 && result > 0) {
        remember_write((int)argument[0], (size_t)result, argument[3], before);
    } else if ((call->number == SYS_fdatasync || call->number == SYS_fsync) && result == 0) {
        settle_writes((int)argument[0], 0);
    } else if (strcmp(call->name, "open") == 0 && result >= 0) {
        // What this number named before is closed.
        settle_writes((int)result, 0);
    }
    if (call->number == SYS_pwrite64 && result <= 0) {
        free(before);
    }
    return result;
}

static long do_half(const struct call *call, const long *argument) {
    long half[] = {argument[0], argument[1], (argument[2] + 1) / 2, argument[3], argument[4]};
    return do_it(call, half);
}

static long fail(const struct call *call, const long *argument) {
    if (strcmp(fault, "short") == 0) {
        return do_half(call, argument);
    }
    if (strcmp(fault, "torn") == 0) {
        // Sectors are written whole or not at all: what the log stands on.
        long whole[] = {argument[0], argument[1], argument[2] / 2 / 512 * 512, argument[3], argument[4]};
        if (whole[2] > 0) {
            do_it(call, whole);
        }
        return -EIO;
    }
    if (strcmp(fault, "lost") == 0) {
        settle_writes((int)argument[0], 1);
        return -EIO;
    }
    return -strtol(fault, NULL, 10);
}

static void on_call(int signal, siginfo_t *info, void *machine) {
    (void)signal;
    ucontext_t *context = machine;
    int errno_before = errno;
    const struct call *call = calls;
    while (call->number != info->si_syscall) {
        call++;
    }
    long argument[5];
    for (int n = 0; n < 5; n++) {
        argument[n] = ARGUMENT(context, n);
    }
    char buffer[PATH_MAX], class_buffer[CLASS_MAX];
    const char *class = class_of(path_of(call, argument, buffer), class_buffer);
    const char *name = creates(call, argument) ? "create" : call->name;
    long result;
    if (class == NULL) {
        result = pass(call->number, argument[0], argument[1], argument[2], argument[3], argument[4]);
    } else {
        int chosen = fault != NULL && strcmp(name, fault_call) == 0 && strcmp(class, fault_file) == 0 &&
                     __atomic_add_fetch(&matched, 1, __ATOMIC_RELAXED) == fault_nth;
        long number = __atomic_add_fetch(&counted, 1, __ATOMIC_RELAXED);
        result = chosen ? fail(call, argument) : do_it(call, argument);
        say("%ld %s %s %ld%s\n", number, name, class, result, chosen ? " FAULT" : "");
    }
    SET_RESULT(context, result);
    errno = errno_before;
}

static void unsupported(const char *what) {
    fprintf(stderr, "shim: %s\n", what);
    _exit(EXIT_UNSUPPORTED);
}

static void watch(void) {
    struct sock_filter filter[CALLS + 9];
    size_t at = 0;
#define LOAD(field) filter[at++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF_EQUAL(value, yes, no) \
    filter[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(value), (unsigned char)(yes), (unsigned char)(no))
    LOAD(arch);
    IF_EQUAL(ARCHITECTURE, 0, CALLS + 5);
    LOAD(args[5]);
    IF_EQUAL(PASS, 0, 2);
    filter[at++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5]) + 4);
    IF_EQUAL(PASS, CALLS + 1, 0);
    LOAD(nr);
    for (size_t call = 0; call < CALLS; call++) {
        IF_EQUAL(calls[call].number, CALLS - call, 0);
    }
    filter[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP);
    struct sock_fprog program = {(unsigned short)at, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
        unsupported("this kernel does not let a process watch its own calls (seccomp)");
    }
}

__attribute__((constructor)) static void begin(void) {
    directory = getenv("SHIM_DIRECTORY");
    const char *trace_path = getenv("SHIM_TRACE");
    if (directory == NULL || trace_path == NULL) {
        return;
    }
#ifdef UNSUPPORTED
    unsupported("this processor is not known to the shim");
#endif
    trace = open(trace_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    fault = getenv("SHIM_FAULT");
    fault_call = getenv("SHIM_CALL");
    fault_file = getenv("SHIM_FILE");
    const char *nth = getenv("SHIM_NTH");
    fault_nth = nth == NULL ? 0 : strtol(nth, NULL, 10);
    struct sigaction action = {0};
    action.sa_sigaction = on_call;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART;
    if (trace < 0 || sigaction(SIGSYS, &action, NULL) != 0) {
        unsupported("no trace can be written");
    }
    watch();
}
