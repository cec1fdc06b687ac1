/*
 * PID 1 before the agent: notes the time stamp counter when the kernel is done, becomes the agent, and leaves a child that
 * notes it again when the agent calls the host. The call is caught by seccomp (SECCOMP_RET_USER_NOTIF), so the agent is as
 * it is shipped. With "benchcalls=1" on the kernel's command line every system call of the agent is noted: that takes time.
 * No libc, so that the kernel has little more to unpack.
 */
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/vm_sockets.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#define READY_PORT 1026 /* docs/architecture.md */
#define CALLS_MAX 20000
/* The first descriptors after the three of the console: a pipe, and what tells of the calls. */
#define READ_END 3
#define WRITE_END 4
#define LISTENER 5

typedef unsigned long u64;

static struct { u64 number, begin, end; } calls[CALLS_MAX];

static inline u64 now(void)
{
	unsigned low, high;
	asm volatile("rdtsc" : "=a"(low), "=d"(high));
	return (u64)high << 32 | low;
}

static long call(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 asm("r10") = d, r8 asm("r8") = e, r9 asm("r9") = f;
	long result;
	asm volatile("syscall" : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
		     : "rcx", "r11", "memory");
	return result;
}
#define CALL3(number, a, b, c) call(number, (long)(a), (long)(b), (long)(c), 0, 0, 0)

static void put(const char *text)
{
	int len = 0;
	while (text[len])
		len++;
	CALL3(SYS_write, 1, text, len);
}

static void put_number(u64 value)
{
	char text[24];
	int at = sizeof(text) - 1;
	text[at] = 0;
	do {
		text[--at] = '0' + value % 10;
		value /= 10;
	} while (value);
	put(text + at);
}

static void line(const char *name, u64 a, u64 b)
{
	put(name);
	put(" ");
	put_number(a);
	put(" ");
	put_number(b);
	put("\n");
}

static void fail(const char *what, long error)
{
	line(what, -error, 0);
	CALL3(SYS_exit, 1, 0, 0);
}

/* Whether PID 1 connects to the host's port by this address. */
static int is_ready(u64 address)
{
	struct sockaddr_vm to = { 0 };
	struct iovec here = { &to, sizeof(to) }, there = { (void *)address, sizeof(to) };
	call(SYS_process_vm_readv, 1, (long)&here, 1, (long)&there, 1, 0);
	return to.svm_family == AF_VSOCK && to.svm_port == READY_PORT;
}

static void watch(u64 began)
{
	long init = CALL3(SYS_pidfd_open, 1, 0, 0), listener;
	int count = 0;
	if (init < 0)
		fail("clock: pidfd_open failed", init);
	do
		listener = CALL3(SYS_pidfd_getfd, init, LISTENER, 0);
	while (listener < 0 && CALL3(SYS_sched_yield, 0, 0, 0) == 0);
	CALL3(SYS_write, WRITE_END, "", 1);
	for (;;) {
		struct seccomp_notif request = { 0 };
		long error = CALL3(SYS_ioctl, listener, SECCOMP_IOCTL_NOTIF_RECV, &request);
		u64 at = now();
		if (error)
			fail("clock: no notification", error);
		if (count == CALLS_MAX)
			fail("clock: more system calls than it counts", 0);
		calls[count].number = request.data.nr;
		calls[count].begin = at;
		if (request.data.nr == SYS_connect && is_ready(request.data.args[1])) {
			line("clock", began, at);
			for (int i = 0; i <= count; i++) {
				put_number(calls[i].number);
				line("", calls[i].begin, calls[i].end);
			}
			put("clock end\n");
			return;
		}
		struct seccomp_notif_resp answer = { request.id, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE };
		calls[count++].end = now();
		error = CALL3(SYS_ioctl, listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
		if (error)
			fail("clock: a call was not let go", error);
	}
}

/* The kernel puts parameters that it does not know into the environment of PID 1. */
static int wants_all(char **environment)
{
	for (; *environment; environment++) {
		const char *name = "benchcalls=", *at = *environment;
		while (*name && *name == *at)
			name++, at++;
		if (!*name)
			return 1;
	}
	return 0;
}

__attribute__((used)) void start(u64 *stack)
{
	u64 began = now();
	char **argv = (char **)(stack + 1), **environment = argv + stack[0] + 1;
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_connect, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, wants_all(environment) ? SECCOMP_RET_USER_NOTIF : SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(filter) / sizeof(*filter), filter };
	int pipe[2];
	CALL3(SYS_pipe2, pipe, O_CLOEXEC, 0);
	if (CALL3(SYS_fork, 0, 0, 0) == 0) {
		watch(began);
		CALL3(SYS_exit, 0, 0, 0);
	}
	long error = CALL3(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
	if (error != LISTENER)
		fail("clock: seccomp failed", error);
	/* The descriptor closes as this becomes the agent: the child must have it before. */
	char byte;
	CALL3(SYS_read, READ_END, &byte, 1);
	argv[0] = "/init";
	error = CALL3(SYS_execve, argv[0], argv, environment);
	fail("clock: cannot become /init", error);
}

asm(".globl _start\n_start: mov %rsp, %rdi\nand $-16, %rsp\ncall start\n");
