// SPDX-License-Identifier: MIT
/*
 * A run on shadow paging
 *
 *   1  vCPU0 writes page 1
 *   2  user space enables logging
 *   3  user space clears 0, 1 of the dirty log
 *   4  vCPU0 writes page 1
 *
 * kvmbook's model loses what is written to page 1.
 * This program plays what user space can play of it, and says whether a write was lost here.
 *
 * cc -O2 -Wall -pthread run.c -o run && ./run [rounds]
 * Exit code: 0 nothing lost, 1 lost, 4 cannot be played here, 254 something else failed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* ---- the run's own numbers -------------------------------------------------------------------------------------- */

enum { VCPU0, VCPUS, HOST = VCPUS };
enum { BASE_GFN = 0x3ff, PAGES = 513, HUGE = 1, MANUAL_PROTECT = 3, ROUNDS = 100, SECONDS = 60 };

/* ---- how it ends: with a sentence ------------------------------------------------------------------------------ */

enum { KSFT_PASS = 0, KSFT_FAIL = 1, KSFT_SKIP = 4, BROKEN = 254 };

static void ksft_exit_skip(const char *why, ...)
{
	va_list arguments;

	va_start(arguments, why);
	fputs("SKIP: ", stdout);
	vprintf(why, arguments);
	exit(KSFT_SKIP);
}

#define TEST_ASSERT(holds, ...)							\
	do {									\
		if (!(holds)) {							\
			fprintf(stderr, "%s:%d: ", __func__, __LINE__);		\
			fprintf(stderr, __VA_ARGS__);				\
			fprintf(stderr, " (%s)\n", strerror(errno));		\
			exit(BROKEN);						\
		}								\
	} while (0)

/* ---- the guest: one access, then out --------------------------------------------------------------------------- */

/*
 * It runs in 64-bit mode at CPL 3: there a KVM without hardware virtualization too runs it natively, through SPTEs.
 * rbx: the address; rcx: the value; r8: STOP, where there is no memory, so that a write there leaves with KVM_EXIT_MMIO.
 */
static const unsigned char CODE[] = {
	0x48, 0x89, 0x0b,	/*  0 write:	mov %rcx,(%rbx)	*/
	0xeb, 0x03,		/*  3		jmp stop	*/
	0x48, 0x8b, 0x0b,	/*  5 read:	mov (%rbx),%rcx	*/
	0x41, 0x89, 0x00,	/*  8 stop:	mov %eax,(%r8)	*/
	0xeb, 0xfe,		/* 11		jmp .		*/
};
enum { WRITE_AT = 0, READ_AT = 5 };

/* Its private slot, in pages: code, PML4, PDPT, four page directories that map 4 GiB one to one by 2M pages. */
enum { PRIVATE_SLOT = 1, PRIVATE_PAGES = 7, TABLE = 0x27, LARGE = 0xe7 };
static const uint64_t PRIVATE = 0xf0000000, STOP = 0xf8000000;

static int kvm, vm, run_size;
static int vcpus[VCPUS];
static struct kvm_run *runs[VCPUS];
static unsigned char *private_memory, *guest_memory;

static void set_region(int slot, int flags, uint64_t gpa, uint64_t size, void *memory)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = size,
		.userspace_addr = (uintptr_t)memory,
	};

	TEST_ASSERT(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION(slot %d)", slot);
}

static void set_flags(int flags)
{
	set_region(0, flags, (uint64_t)BASE_GFN << 12, (uint64_t)PAGES << 12, guest_memory);
}

static void enable_cap(int cap, uint64_t argument)
{
	struct kvm_enable_cap enable = { .cap = cap, .args = { argument } };

	if (ioctl(vm, KVM_ENABLE_CAP, &enable))
		ksft_exit_skip("this KVM does not take capability %d with %d: %s.\n", cap, (int)argument, strerror(errno));
}

static void *fresh_memory(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	TEST_ASSERT(memory != MAP_FAILED, "mmap(%zu bytes)", size);
	return memory;
}

static void build_guest(void)
{
	uint64_t *tables;
	int entry;

	private_memory = fresh_memory(PRIVATE_PAGES << 12);
	memcpy(private_memory, CODE, sizeof(CODE));
	tables = (uint64_t *)(private_memory + 4096);
	tables[0] = (PRIVATE + 0x2000) | TABLE;
	for (entry = 0; entry < 4; entry++)
		tables[512 + entry] = (PRIVATE + 0x3000 + entry * 0x1000) | TABLE;
	for (entry = 0; entry < 2048; entry++)
		tables[1024 + entry] = (uint64_t)entry << 21 | LARGE;
}

static void add_vcpu(int v)
{
	static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid;
	struct kvm_segment data = {
		.limit = ~0u, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1,
	};
	struct kvm_segment code = {
		.limit = ~0u, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .l = 1, .s = 1, .g = 1,
	};
	struct kvm_sregs sregs;

	vcpus[v] = ioctl(vm, KVM_CREATE_VCPU, v);
	TEST_ASSERT(vcpus[v] >= 0, "KVM_CREATE_VCPU(%d)", v);
	cpuid.head.nent = 256;
	TEST_ASSERT(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
	TEST_ASSERT(!ioctl(vcpus[v], KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
	runs[v] = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpus[v], 0);
	TEST_ASSERT(runs[v] != MAP_FAILED, "mmap(struct kvm_run)");
	TEST_ASSERT(!ioctl(vcpus[v], KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cr0 = 0x80010033;		/* PG WP NE ET MP PE */
	sregs.cr3 = PRIVATE + 0x1000;
	sregs.cr4 = 0x20;		/* PAE */
	sregs.efer = 0x500;		/* LME LMA */
	TEST_ASSERT(!ioctl(vcpus[v], KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
}

/* vCPU v does one access, to the end. */
static void enter_guest(int v, int writes, uint64_t address, uint64_t value)
{
	struct kvm_regs regs = {
		.rbx = address, .rcx = value, .r8 = STOP, .rip = PRIVATE + (writes ? WRITE_AT : READ_AT), .rflags = 2,
	};

	TEST_ASSERT(!ioctl(vcpus[v], KVM_SET_REGS, &regs), "KVM_SET_REGS");
	while (ioctl(vcpus[v], KVM_RUN, 0))
		TEST_ASSERT(errno == EINTR, "KVM_RUN of vCPU%d", v);
	TEST_ASSERT(runs[v]->exit_reason == KVM_EXIT_MMIO && runs[v]->mmio.phys_addr == STOP,
		    "vCPU%d left the guest with exit reason %u", v, runs[v]->exit_reason);
}

/* ---- the VM, and the slot that the run is about ---------------------------------------------------------------- */

static const uint64_t GUEST_ADDRESS = (uint64_t)BASE_GFN << 12;
static void *mapped;
static const size_t MAPPED = ((size_t)PAGES << 12) + (4 << 20);

static void setup(void)
{
	int v;

	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	TEST_ASSERT(vm >= 0, "KVM_CREATE_VM");
	enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT);
	build_guest();
	set_region(PRIVATE_SLOT, 0, PRIVATE, PRIVATE_PAGES << 12, private_memory);
	mapped = fresh_memory(MAPPED);
	/* Host and guest address lie alike in their 2M pages, without which KVM maps no large page. */
	guest_memory = (void *)((((uintptr_t)mapped + (2 << 20) - 1) & -(2ul << 20)) + (GUEST_ADDRESS & ((2 << 20) - 1)));
	madvise(mapped, MAPPED, HUGE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	memset(guest_memory, 0, (size_t)PAGES << 12);	/* now the host has each page, and may write to it */
	set_flags(0);
	for (v = 0; v < VCPUS; v++)
		add_vcpu(v);
}

static void teardown(void)
{
	int v;

	for (v = 0; v < VCPUS; v++) {
		munmap(runs[v], run_size);
		close(vcpus[v]);
	}
	close(vm);
	munmap(private_memory, PRIVATE_PAGES << 12);
	munmap(mapped, MAPPED);
}

static void open_kvm(void)
{
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		ksft_exit_skip("/dev/kvm cannot be opened: %s.\n", strerror(errno));
	TEST_ASSERT(ioctl(kvm, KVM_GET_API_VERSION, 0) == KVM_API_VERSION, "KVM_GET_API_VERSION");
	run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
}

static void read_dirty_log(uint64_t *bitmap)
{
	struct kvm_dirty_log log = { .slot = 0, .dirty_bitmap = bitmap };

	TEST_ASSERT(!ioctl(vm, KVM_GET_DIRTY_LOG, &log), "KVM_GET_DIRTY_LOG");
}

static void rearm_dirty_log(uint64_t *bitmap, int first, int number)
{
	struct kvm_clear_dirty_log log = { .slot = 0, .first_page = first, .num_pages = number, .dirty_bitmap = bitmap };

	TEST_ASSERT(!ioctl(vm, KVM_CLEAR_DIRTY_LOG, &log), "KVM_CLEAR_DIRTY_LOG(%d, %d)", first, number);
}

/* ---- user space: a copy of what the guest writes, kept as a migration keeps it --------------------------------- */

static volatile uint64_t *word(int page, int v)
{
	return (volatile uint64_t *)(guest_memory + ((size_t)page << 12)) + v;	/* vCPU v writes the page's v-th word */
}

static uint64_t copies[PAGES][VCPUS];
static int logging;
static char told[PAGES];	/* reported as dirty, and not copied yet: KVM has not armed the page again */

static void copy(int page)
{
	int v;

	for (v = 0; v < VCPUS; v++)
		copies[page][v] = *word(page, v);
}

static void enable_logging(void)
{
	int page;

	set_flags(KVM_MEM_LOG_DIRTY_PAGES);
	logging = 1;
	for (page = 0; page < PAGES; page++)
		copy(page);
	memset(told, 0, sizeof(told));
}

static void get_dirty_log(void)
{
	uint64_t bitmap[(PAGES + 63) / 64] = { 0 };
	int page;

	read_dirty_log(bitmap);
	for (page = 0; page < PAGES; page++) {
		if (bitmap[page / 64] >> page % 64 & 1) {
			told[page] = 1;
		}
	}
}

static void clear_dirty_log(int first, int number, uint64_t *bitmap)
{
	int page;

	rearm_dirty_log(bitmap, first, number);
	for (page = first; page < first + number && page < PAGES; page++) {
		if (told[page] && bitmap[(page - first) / 64] >> (page - first) % 64 & 1) {
			copy(page);
			told[page] = 0;
		}
	}
}

/* The guest stands still: a last report, then a page whose copy differs was written, and nobody was told. */
static int count_lost(int round)
{
	int page, v, lost = 0;

	if (!logging)
		return 0;
	get_dirty_log();
	for (page = 0; page < PAGES; page++)
		if (told[page])
			copy(page);
	for (page = 0; page < PAGES; page++) {
		for (v = 0; v < VCPUS; v++) {
			if (*word(page, v) == copies[page][v])
				continue;
			if (!lost++ && round < 3)
				printf("round %d: LOST: vCPU%d wrote page %d, and no report names it\n", round, v, page);
		}
	}
	return lost;
}

/* ---- what the host does, and who does what when ---------------------------------------------------------------- */

static void see_that_pages_are_huge(void)
{
	uintptr_t start, end, last = (uintptr_t)word(PAGES - 1, 0);
	FILE *smaps = fopen("/proc/self/smaps", "r");
	int here = 0, huge = 0, kib;
	char line[512];

	TEST_ASSERT(smaps, "/proc/self/smaps");
	while (fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			here = start <= last && last < end;
		else if (here && sscanf(line, "AnonHugePages: %d", &kib) == 1)
			huge = kib > 0;
	}
	fclose(smaps);
	if (!huge)
		ksft_exit_skip("the host gave no huge page: see /sys/kernel/mm/transparent_hugepage/enabled.\n");
}

/* What a vCPU's TLB remembers is kept if the vCPU stays on one CPU. */
static void stay_on_cpu(int number)
{
	static cpu_set_t allowed;	/* asked once: a thread inherits the one CPU of the thread that makes it */
	cpu_set_t one = { 0 };
	int cpu;

	if (!CPU_COUNT(&allowed))
		sched_getaffinity(0, sizeof(allowed), &allowed);
	number %= CPU_COUNT(&allowed);
	for (cpu = 0; number || !CPU_ISSET(cpu, &allowed); cpu++)
		number -= !!CPU_ISSET(cpu, &allowed);
	CPU_SET(cpu, &one);
	sched_setaffinity(0, sizeof(one), &one);
}

enum what { STOPS, READ, WRITE, AGE };

static void act(int who, enum what what, int page, uint64_t value)
{
	enter_guest(who, what == WRITE, GUEST_ADDRESS + ((uint64_t)page << 12) + 8 * who, value);
}

static uint64_t last_value;	/* each write has its own */

static void does(int who, enum what what, int page)
{
	act(who, what, page, ++last_value);
}

/* ---- the run --------------------------------------------------------------------------------------------------- */

static void play(void)
{
	/* Step 1: vCPU0 writes page 1. */
	does(VCPU0, WRITE, 1);
	/* Step 2: user space enables logging. */
	enable_logging();
	/* Step 3: user space clears 0, 1 of the dirty log. */
	clear_dirty_log(0, 64, (uint64_t[]){ 0x3 });
	/* Step 4: vCPU0 writes page 1. */
	does(VCPU0, WRITE, 1);
}

static int play_round(int round)
{
	int lost;

	logging = 0;
	memset(told, 0, sizeof(told));
	setup();
	see_that_pages_are_huge();
	play();
	lost = count_lost(round);
	teardown();
	return lost;
}

int main(int argc, char **argv)
{
	int round, lost_in = 0, rounds = argc > 1 ? atoi(argv[1]) : ROUNDS;
	time_t until = time(NULL) + SECONDS / 2;

	setbuf(stdout, NULL);
	alarm(SECONDS);		/* nothing hangs: SIGALRM ends the program */
	stay_on_cpu(0);
	open_kvm();
	for (round = 0; round < rounds && time(NULL) < until; round++)
		lost_in += play_round(round) > 0;
	if (lost_in)
		printf("FAIL: a write was lost in %d of %d rounds.\n", lost_in, round);
	else
		printf("PASS: each write reached the copy, in %d rounds.\n", round);
	return lost_in ? KSFT_FAIL : KSFT_PASS;
}
