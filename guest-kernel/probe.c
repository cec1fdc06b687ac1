// PID 1 of the guest kernel's test: tries what containers need and prints one line a claim on the console,
// "ok <claim>" or "not ok <claim>: <errno>", then "done" and reboots, which ends the VM.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/bpf.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nf_tables_compat.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter_ipv4/ip_tables.h>
#include <linux/netfilter_ipv6/ip6_tables.h>
#include <linux/netlink.h>
#include <linux/perf_event.h>
#include <linux/rtnetlink.h>
#include <linux/seccomp.h>
#include <mqueue.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ipc.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

static char text[65536];

__attribute__((format(printf, 2, 3))) static void claim(int holds, const char *format, ...)
{
	int error = errno;
	va_list args;

	printf(holds ? "ok " : "not ok ");
	va_start(args, format);
	vprintf(format, args);
	va_end(args);
	if (holds)
		printf("\n");
	else
		printf(": %s\n", strerror(error));
}

static const char *contents(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t size = 0, got;

	while (fd >= 0 && (got = read(fd, text + size, sizeof(text) - 1 - size)) > 0)
		size += got;
	text[size] = 0;
	if (fd >= 0)
		close(fd);
	return text;
}

static int has_word(const char *list, const char *word)
{
	size_t length = strlen(word);

	for (const char *at = list; (at = strstr(at, word)); at += length)
		if ((at == list || strchr(" \t\n", at[-1])) && (!at[length] || strchr(" \t\n", at[length])))
			return 1;
	errno = ENOENT;
	return 0;
}

static int write_file(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t wrote = fd < 0 ? -1 : write(fd, value, strlen(value));

	if (fd >= 0)
		close(fd);
	return wrote == (ssize_t)strlen(value);
}

static void each_word(const char *file, const char *what, const char *words)
{
	char copy[1024], *rest = copy, *word;
	static char list[65536];

	strcpy(list, contents(file));
	strcpy(copy, words);
	while ((word = strsep(&rest, " ")))
		claim(has_word(list, word), "%s %s", what, word);
}

static void each_path(const char *folder, const char *what, const char *names)
{
	char copy[1024], path[256], *rest = copy, *name;

	strcpy(copy, names);
	while ((name = strsep(&rest, " "))) {
		snprintf(path, sizeof(path), "%s/%s", folder, name);
		claim(access(path, F_OK) == 0, "%s %s", what, name);
	}
}

static void namespaces(void)
{
	static const struct { const char *name; int flag; } kinds[] = {
		{ "mount", CLONE_NEWNS }, { "uts", CLONE_NEWUTS }, { "ipc", CLONE_NEWIPC }, { "pid", CLONE_NEWPID },
		{ "network", CLONE_NEWNET }, { "user", CLONE_NEWUSER }, { "cgroup", CLONE_NEWCGROUP },
		{ "time", 0x80 /* CLONE_NEWTIME */ },
	};

	for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
		int status;
		pid_t child = fork();

		if (child == 0)
			_exit(unshare(kinds[i].flag) ? errno : 0);
		waitpid(child, &status, 0);
		errno = WEXITSTATUS(status);
		claim(status == 0, "%s namespace", kinds[i].name);
	}
}

// v2 knows device rules only as BPF: a program that allows everything.
static int attach_device_program(const char *cgroup)
{
	struct bpf_insn code[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 1 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr load = {
		.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE, .insn_cnt = ARRAY_SIZE(code),
		.insns = (unsigned long)code, .license = (unsigned long)"GPL",
	};
	union bpf_attr attach = { .attach_type = BPF_CGROUP_DEVICE };
	int program = syscall(SYS_bpf, BPF_PROG_LOAD, &load, sizeof(load));

	if (program < 0)
		return 0;
	attach.target_fd = open(cgroup, O_RDONLY | O_DIRECTORY);
	attach.attach_bpf_fd = program;
	return syscall(SYS_bpf, BPF_PROG_ATTACH, &attach, sizeof(attach)) == 0;
}

static void cgroups(void)
{
	mkdir("/cgroup", 0755);
	claim(mount("cgroup", "/cgroup", "cgroup2", 0, NULL) == 0, "cgroup v2 mounts");
	each_word("/cgroup/cgroup.controllers", "controller", "cpuset cpu io memory hugetlb pids misc");
	claim(write_file("/cgroup/cgroup.subtree_control", "+cpuset +cpu +io +memory +hugetlb +pids +misc"),
	      "all controllers can be delegated");
	mkdir("/cgroup/a", 0755);
	each_path("/cgroup/a", "cgroup file",
		  "cgroup.kill cgroup.freeze cpu.max cpu.weight cpu.stat cpu.pressure cpuset.cpus cpuset.mems "
		  "memory.max memory.swap.max memory.events memory.oom.group memory.pressure pids.max io.max "
		  "io.weight io.bfq.weight io.latency io.stat hugetlb.2MB.max misc.max");
	claim(attach_device_program("/cgroup/a"), "a BPF device program attaches to a cgroup");
}

static void filesystems(void)
{
	each_word("/proc/filesystems", "file system",
		  "overlay fuse virtiofs erofs ext4 ext2 tmpfs devtmpfs proc sysfs cgroup2 devpts mqueue hugetlbfs "
		  "binfmt_misc securityfs bpf");

	mkdir("/t", 0755);
	claim(mount("tmpfs", "/t", "tmpfs", 0, "mode=0755") == 0, "tmpfs mounts");
	mkdir("/t/lower", 0755);
	mkdir("/t/upper", 0755);
	mkdir("/t/work", 0755);
	mkdir("/t/merged", 0755);
	close(open("/t/lower/file", O_CREAT | O_WRONLY, 0644));
	claim(setxattr("/t/lower/file", "user.a", "b", 1, 0) == 0, "tmpfs holds user xattrs");
	claim(mount("overlay", "/t/merged", "overlay", 0,
		    "lowerdir=/t/lower,upperdir=/t/upper,workdir=/t/work,userxattr") == 0 &&
	      umount("/t/merged") == 0, "an overlay mounts with user xattrs");
	claim(mount("overlay", "/t/merged", "overlay", 0,
		    "lowerdir=/t/lower,upperdir=/t/upper,workdir=/t/work") == 0, "an overlay mounts");
	struct stat status = { 0 };
	claim(unlink("/t/merged/file") == 0 && lstat("/t/upper/file", &status) == 0 &&
	      S_ISCHR(status.st_mode) && status.st_rdev == makedev(0, 0), "the overlay makes whiteouts");
	mkdir("/t/pts", 0755);
	claim(mount("devpts", "/t/pts", "devpts", 0, "newinstance,ptmxmode=0666") == 0 &&
	      open("/t/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC) >= 0, "a pty opens in its own devpts");
	mkdir("/t/mqueue", 0755);
	claim(mount("mqueue", "/t/mqueue", "mqueue", 0, NULL) == 0, "mqueue mounts");
	mkdir("/t/huge", 0755);
	claim(mount("hugetlbfs", "/t/huge", "hugetlbfs", 0, "pagesize=2M") == 0, "hugetlbfs mounts");
	claim(write_file("/proc/sys/vm/nr_hugepages", "1"), "huge pages can be reserved");
	mkdir("/t/disk", 0755);
	claim(mount("/dev/vda", "/t/disk", "ext4", MS_RDONLY, NULL) == 0 &&
	      access("/t/disk/mark", F_OK) == 0, "ext4 on a virtio block device mounts");
}

static int set_int_80(void)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "0"(20L /* getpid */) : "memory", "r8", "r9", "r10", "r11");
	return result == getpid();
}

static void system_calls(void)
{
	struct { unsigned words[30]; } ring = { 0 };
	struct perf_event_attr clock = { .type = PERF_TYPE_SOFTWARE, .size = sizeof(clock), .config = PERF_COUNT_SW_TASK_CLOCK };
	unsigned action = SECCOMP_RET_LOG;
	unsigned long aio = 0;
	char handle[256] = { 0 };
	int mount_id;
	struct mq_attr queue = { .mq_maxmsg = 1, .mq_msgsize = 8 };

	*(unsigned *)handle = 128;
	claim(syscall(425, 4, &ring) >= 0, "io_uring_setup");
	claim(syscall(SYS_io_setup, 4, &aio) == 0, "io_setup");
	claim(syscall(SYS_userfaultfd, O_CLOEXEC) >= 0, "userfaultfd");
	claim(syscall(SYS_memfd_create, "m", 0) >= 0, "memfd_create");
	claim(syscall(447, 0) >= 0, "memfd_secret");
	claim(syscall(SYS_kcmp, 1, 1, 0, 0, 1) >= 0, "kcmp");
	claim(mq_open("/q", O_CREAT | O_RDWR, 0600, &queue) >= 0, "mq_open");
	claim(shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600) >= 0, "shmget");
	claim(syscall(SYS_inotify_init1, 0) >= 0, "inotify_init1");
	claim(syscall(SYS_fanotify_init, 4 /* FAN_CLASS_CONTENT */, 0) >= 0, "fanotify_init with permissions");
	claim(syscall(SYS_name_to_handle_at, AT_FDCWD, "/t/upper", handle, &mount_id, 0) == 0, "name_to_handle_at");
	claim(syscall(434, 1, 0) >= 0, "pidfd_open");
	claim(syscall(SYS_add_key, "user", "k", "v", 1, -3 /* session */) >= 0, "add_key");
	claim(syscall(SYS_set_mempolicy, 0, NULL, 0) == 0, "set_mempolicy");
	claim(syscall(SYS_perf_event_open, &clock, 0, -1, -1, 0) >= 0, "perf_event_open");
	claim(syscall(SYS_membarrier, 0, 0, 0) >= 0, "membarrier");
	claim(syscall(444, NULL, 0, 1) > 0, "landlock");
	claim(syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0, "seccomp filters");
	claim(syscall(428, AT_FDCWD, "/t", 1) >= 0, "open_tree clones a mount");
	claim(syscall(SYS_modify_ldt, 0, handle, sizeof(handle)) >= 0, "modify_ldt");
	claim(syscall(SYS_ioperm, 0x80, 1, 1) == 0, "ioperm");
	claim(syscall(SYS_pkey_alloc, 0, 0) >= 0 || errno == ENOSPC, "pkey_alloc is known");
	claim(set_int_80(), "32-bit system calls");
}

static void proc_and_sys(void)
{
	glob_t ports = { 0 };
	static const char *const absent[] = { "/dev/mem", "/dev/port", "/dev/ttyp0", "/proc/modules", "/proc/kcore" };

	each_path("/proc", "/proc", "config.gz pressure/memory self/io self/pagemap self/smaps self/cgroup self/cpuset "
		  "self/schedstat self/stack self/timens_offsets self/task sys/kernel/yama/ptrace_scope "
		  "sys/net/ipv4/ip_forward sys/net/ipv6/conf/all sys/net/netfilter/nf_conntrack_max "
		  "sys/net/bridge/bridge-nf-call-iptables sys/fs/mqueue sys/kernel/shmmax sys/kernel/ns_last_pid");
	each_path("/sys/bus/virtio/drivers", "driver", "virtio_blk virtio_net virtio_rng virtio_balloon virtio_mem "
		  "virtio_console virtiofs vmw_vsock_virtio_transport");
	each_path("/dev", "device", "null zero full random urandom tty ptmx fuse net/tun loop-control kmsg hwrng");
	claim(glob("/dev/vport*p1", 0, NULL, &ports) == 0, "a port of the virtio console");
	claim(has_word(contents("/sys/kernel/mm/transparent_hugepage/enabled"), "[madvise]"),
	      "transparent huge pages where asked for");
	claim(strstr(contents("/sys/class/misc/hw_random/rng_current"), "virtio_rng") != NULL, "entropy comes from virtio");
	for (size_t i = 0; i < ARRAY_SIZE(absent); i++) {
		int gone = access(absent[i], F_OK) != 0;

		errno = EEXIST;
		claim(gone, "no %s", absent[i]);
	}
	claim(strcmp(contents("/proc/sys/kernel/panic"), "-1\n") == 0, "a panic reboots at once");
}

// One netlink message under construction.
struct message {
	struct nlmsghdr header;
	char body[2048];
};

static void *grow(struct message *m, size_t size)
{
	void *at = (char *)m + NLMSG_ALIGN(m->header.nlmsg_len);

	memset(at, 0, NLMSG_ALIGN(size));
	m->header.nlmsg_len = NLMSG_ALIGN(m->header.nlmsg_len) + size;
	return at;
}

static struct nlattr *attribute(struct message *m, int type, const void *value, size_t size)
{
	struct nlattr *at = grow(m, NLA_HDRLEN + size);

	at->nla_type = type;
	at->nla_len = NLA_HDRLEN + size;
	memcpy((char *)at + NLA_HDRLEN, value, size);
	return at;
}

static void string(struct message *m, int type, const char *value)
{
	attribute(m, type, value, strlen(value) + 1);
}

static void big_endian(struct message *m, int type, unsigned value)
{
	value = __builtin_bswap32(value);
	attribute(m, type, &value, sizeof(value));
}

static void end_nest(struct message *m, struct nlattr *nest)
{
	nest->nla_type |= NLA_F_NESTED;
	nest->nla_len = (char *)m + m->header.nlmsg_len - (char *)nest;
}

static void begin(struct message *m, int type, int flags)
{
	memset(m, 0, sizeof(*m));
	m->header.nlmsg_len = NLMSG_HDRLEN;
	m->header.nlmsg_type = type;
	m->header.nlmsg_flags = NLM_F_REQUEST | flags;
	m->header.nlmsg_seq = 1;
}

static void begin_netfilter(struct message *m, int subsystem, int type, int flags, int family, int resource)
{
	struct nfgenmsg *general;

	begin(m, subsystem << 8 | type, flags);
	general = grow(m, sizeof(*general));
	general->nfgen_family = family;
	general->res_id = __builtin_bswap16(resource);
}

// Sends one buffer of messages; holds when the first answer is no error.
static int ask(int protocol, const void *buffer, size_t size)
{
	struct { struct nlmsghdr header; struct nlmsgerr error; char rest[8192]; } answer = { 0 };
	struct timeval patience = { .tv_sec = 5 };
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
	int holds = 0;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (send(fd, buffer, size, 0) == (ssize_t)size && recv(fd, &answer, sizeof(answer), 0) > 0) {
		holds = answer.header.nlmsg_type != NLMSG_ERROR || answer.error.error == 0;
		if (!holds)
			errno = -answer.error.error;
	}
	close(fd);
	return holds;
}

static int make_link(const char *kind)
{
	struct message m;
	struct ifinfomsg *info;
	struct nlattr *nest;

	begin(&m, RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK);
	info = grow(&m, sizeof(*info));
	info->ifi_family = AF_UNSPEC;
	nest = attribute(&m, IFLA_LINKINFO, NULL, 0);
	string(&m, IFLA_INFO_KIND, kind);
	end_nest(&m, nest);
	return ask(NETLINK_ROUTE, &m, m.header.nlmsg_len);
}

// table inet t { chain c { type nat hook postrouting priority 100; } }
static int make_nat_chain(void)
{
	struct message m[4];
	char batch[sizeof(m)];
	size_t size = 0;
	struct nlattr *nest;

	begin_netfilter(&m[0], 0, NFNL_MSG_BATCH_BEGIN, 0, AF_UNSPEC, NFNL_SUBSYS_NFTABLES);
	begin_netfilter(&m[1], NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWTABLE, NLM_F_CREATE, 1 /* NFPROTO_INET */, 0);
	string(&m[1], NFTA_TABLE_NAME, "t");
	begin_netfilter(&m[2], NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWCHAIN, NLM_F_CREATE | NLM_F_ACK, 1, 0);
	string(&m[2], NFTA_CHAIN_TABLE, "t");
	string(&m[2], NFTA_CHAIN_NAME, "c");
	nest = attribute(&m[2], NFTA_CHAIN_HOOK, NULL, 0);
	big_endian(&m[2], NFTA_HOOK_HOOKNUM, 4 /* postrouting */);
	big_endian(&m[2], NFTA_HOOK_PRIORITY, 100);
	end_nest(&m[2], nest);
	string(&m[2], NFTA_CHAIN_TYPE, "nat");
	begin_netfilter(&m[3], 0, NFNL_MSG_BATCH_END, 0, AF_UNSPEC, NFNL_SUBSYS_NFTABLES);
	for (int i = 0; i < 4; i++) {
		memcpy(batch + size, &m[i], m[i].header.nlmsg_len);
		size += NLMSG_ALIGN(m[i].header.nlmsg_len);
	}
	return ask(NETLINK_NETFILTER, batch, size);
}

// What iptables-nft asks before it uses an extension: is there this match (0) or target (1)?
static int compat_knows(const char *name, unsigned revision, unsigned is_target)
{
	struct message m;

	begin_netfilter(&m, NFNL_SUBSYS_NFT_COMPAT, NFNL_MSG_COMPAT_GET, 0, AF_INET, 0);
	string(&m, NFTA_COMPAT_NAME, name);
	big_endian(&m, NFTA_COMPAT_REV, revision);
	big_endian(&m, NFTA_COMPAT_TYPE, is_target);
	return ask(NETLINK_NETFILTER, &m, m.header.nlmsg_len);
}

static int table_exists(int family, int level, int option, const char *name)
{
	struct ipt_getinfo info = { 0 };
	socklen_t size = sizeof(info);
	int fd = socket(family, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
	int result;

	strcpy(info.name, name);
	result = getsockopt(fd, level, option, &info, &size);
	close(fd);
	return result == 0;
}

static void network(void)
{
	static const struct { const char *name; int family, type; } sockets[] = {
		{ "unix", AF_UNIX, SOCK_SEQPACKET }, { "IPv4", AF_INET, SOCK_STREAM }, { "IPv6", AF_INET6, SOCK_DGRAM },
		{ "packet", AF_PACKET, SOCK_RAW }, { "vsock", AF_VSOCK, SOCK_STREAM },
	};
	static const char *const links[] = { "dummy", "bridge", "veth" };
	static const char *const tables[] = { "filter", "nat", "mangle", "raw" };
	static const struct { const char *name; unsigned revision, target; } extensions[] = {
		{ "addrtype", 1, 0 }, { "comment", 0, 0 }, { "conntrack", 3, 0 }, { "mark", 1, 0 }, { "multiport", 1, 0 },
		{ "owner", 1, 0 }, { "physdev", 0, 0 }, { "recent", 1, 0 }, { "set", 4, 0 }, { "statistic", 0, 0 },
		{ "MASQUERADE", 0, 1 }, { "DNAT", 2, 1 }, { "SNAT", 1, 1 }, { "REDIRECT", 0, 1 }, { "REJECT", 0, 1 },
		{ "MARK", 2, 1 }, { "TCPMSS", 0, 1 }, { "TPROXY", 1, 1 }, { "CT", 2, 1 }, { "LOG", 0, 1 },
	};
	struct ifreq request = { .ifr_flags = IFF_TUN | IFF_NO_PI };
	int tun = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

	for (size_t i = 0; i < ARRAY_SIZE(sockets); i++) {
		int fd = socket(sockets[i].family, sockets[i].type, 0);

		claim(fd >= 0, "%s socket", sockets[i].name);
		close(fd);
	}
	claim(ioctl(tun, TUNSETIFF, &request) == 0, "a tun interface");
	for (size_t i = 0; i < ARRAY_SIZE(links); i++)
		claim(make_link(links[i]), "a %s interface", links[i]);
	claim(make_nat_chain(), "a nat chain in an nftables inet table");
	for (size_t i = 0; i < ARRAY_SIZE(extensions); i++)
		claim(compat_knows(extensions[i].name, extensions[i].revision, extensions[i].target),
		      "iptables-nft %s %s", extensions[i].target ? "target" : "match", extensions[i].name);
	for (size_t i = 0; i < ARRAY_SIZE(tables); i++) {
		claim(table_exists(AF_INET, IPPROTO_IP, IPT_SO_GET_INFO, tables[i]), "iptables-legacy table %s", tables[i]);
		claim(table_exists(AF_INET6, IPPROTO_IPV6, IP6T_SO_GET_INFO, tables[i]), "ip6tables-legacy table %s", tables[i]);
	}
}

// What the machine has beyond what the kernel started with: it was told to leave a CPU and the memory from 640 MiB on.
static void growth(void)
{
	long before = sysconf(_SC_PHYS_PAGES);

	claim(sysconf(_SC_NPROCESSORS_ONLN) == 1, "a vCPU is held back");
	claim(write_file("/sys/devices/system/cpu/cpu1/online", "1"), "it comes online");
	claim(write_file("/sys/devices/system/memory/probe", "0x28000000"), "memory is added by its address");
	claim(strcmp(contents("/sys/devices/system/memory/memory5/online"), "1\n") == 0, "added memory is online");
	claim((sysconf(_SC_PHYS_PAGES) - before) * sysconf(_SC_PAGESIZE) == 128L << 20, "128 MiB were added");
}

int main(void)
{
	const char *cpus = getenv("cpus");
	struct timespec boot;

	if (getpid() != 1) {
		fprintf(stderr, "this is PID 1 of a test machine; guest-kernel/test starts it\n");
		return 1;
	}
	clock_gettime(CLOCK_BOOTTIME, &boot);
	mkdir("/dev", 0755);
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	freopen("/dev/console", "w", stdout);
	setvbuf(stdout, NULL, _IOLBF, 0);
	// With icount the time stamp counter counts nanoseconds of virtual time since the machine was reset.
	printf("init after %ld ms of clock, %llu ms of tsc at 1 GHz\n", boot.tv_sec * 1000 + boot.tv_nsec / 1000000,
	       __builtin_ia32_rdtsc() / 1000000);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	if (getenv("quick"))
		goto out;

	filesystems();
	namespaces();
	cgroups();
	system_calls();
	network();
	proc_and_sys();
	growth();
	if (cpus)
		claim(sysconf(_SC_NPROCESSORS_ONLN) == atoi(cpus), "%s vCPUs are online", cpus);
	printf("done\n");
out:
	if (getenv("crash"))
		return 0; // PID 1 must not exit: the kernel panics
	reboot(RB_AUTOBOOT);
}
