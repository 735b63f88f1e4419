/*
 * KVM_RESET_DIRTY_RINGS, stopped by a signal: does each page that it counts as reset come into the ring again?
 *
 * The guest writes PAGES pages in order; user space harvests them, and resets while a timer sends a signal, and again until
 * the counts add up. Then the guest writes each page again. A page that is in no ring then has lost that write.
 *
 * Rounds without a signal are made in turn with those with one. Exit code: 0 if no write was lost, 1 if one was, 4 (and a
 * sentence) where it cannot be tried, 254 if something else failed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { PAGES = 8192, RING_BYTES = 1 << 18, ROUNDS = 20 };
static const uint64_t DATA = 0x10000000, PRIVATE = 0xf0000000, STOP = 0xf8000000;

#define CHECK(holds)								\
	do {									\
		if (!(holds)) {							\
			fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #holds, strerror(errno));	\
			exit(254);						\
		}								\
	} while (0)

/*
 * The guest, in 64-bit mode at CPL 3, where a KVM without hardware virtualization runs it natively, too.
 * rbx: the first address, rcx: how many pages, r8: STOP, where there is no memory, so that a write leaves the guest.
 */
static const unsigned char CODE[] = {
	0x48, 0xff, 0x03,				/*  0: incq (%rbx)	*/
	0x48, 0x81, 0xc3, 0x00, 0x10, 0x00, 0x00,	/*     add $4096,%rbx	*/
	0x48, 0xff, 0xc9,				/*     dec %rcx		*/
	0x75, 0xf1,					/*     jnz 0b		*/
	0x41, 0x89, 0x00,				/*     mov %eax,(%r8)	*/
	0xeb, 0xfe,					/*     jmp .		*/
};
enum { PRIVATE_PAGES = 7, TABLE = 0x27, LARGE = 0xe7 };

static int kvm, vm, vcpu;
static struct kvm_run *run;
static struct kvm_dirty_gfn *ring;
static unsigned int harvested;
static uint8_t *data, *private_memory;

static void *fresh_memory(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	CHECK(memory != MAP_FAILED);
	return memory;
}

static void set_region(int slot, int flags, uint64_t gpa, uint64_t size, void *memory)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = size,
		.userspace_addr = (uintptr_t)memory,
	};

	CHECK(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

static void create_vcpu(void)
{
	static struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entries[256]; } cpuid;
	struct kvm_segment data_segment = {
		.limit = ~0u, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1,
	};
	struct kvm_segment code_segment = {
		.limit = ~0u, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .l = 1, .s = 1, .g = 1,
	};
	struct kvm_sregs sregs;

	CHECK((vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) >= 0);
	cpuid.head.nent = 256;
	CHECK(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	CHECK(!ioctl(vcpu, KVM_SET_CPUID2, &cpuid));
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	CHECK(run != MAP_FAILED);
	ring = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, KVM_DIRTY_LOG_PAGE_OFFSET * 4096);
	CHECK(ring != MAP_FAILED);
	CHECK(!ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs = code_segment;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data_segment;
	sregs.cr0 = 0x80010033;		/* PG WP NE ET MP PE */
	sregs.cr3 = PRIVATE + 0x1000;
	sregs.cr4 = 0x20;		/* PAE */
	sregs.efer = 0x500;		/* LME LMA */
	CHECK(!ioctl(vcpu, KVM_SET_SREGS, &sregs));
}

static void create_vm(void)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_DIRTY_LOG_RING, .args = { RING_BYTES } };
	uint64_t *tables;

	CHECK((vm = ioctl(kvm, KVM_CREATE_VM, 0)) >= 0);
	if (ioctl(vm, KVM_ENABLE_CAP, &cap)) {
		printf("SKIP: this KVM has no dirty ring of %d entries: %s.\n", RING_BYTES / 16, strerror(errno));
		exit(4);
	}
	private_memory = fresh_memory(PRIVATE_PAGES * 4096);
	memcpy(private_memory, CODE, sizeof(CODE));
	tables = (uint64_t *)(private_memory + 4096);	/* PML4, PDPT, and four that map 4 GiB one to one by 2M pages */
	tables[0] = (PRIVATE + 0x2000) | TABLE;
	for (int entry = 0; entry < 4; entry++)
		tables[512 + entry] = (PRIVATE + 0x3000 + entry * 0x1000) | TABLE;
	for (int entry = 0; entry < 2048; entry++)
		tables[1024 + entry] = (uint64_t)entry << 21 | LARGE;
	data = fresh_memory(PAGES * 4096ul);
	set_region(1, 0, PRIVATE, PRIVATE_PAGES * 4096, private_memory);
	set_region(0, KVM_MEM_LOG_DIRTY_PAGES, DATA, PAGES * 4096ul, data);
	create_vcpu();
	harvested = 0;
}

static void destroy_vm(void)
{
	munmap(ring, RING_BYTES);
	munmap(run, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	close(vcpu);
	close(vm);
	munmap(private_memory, PRIVATE_PAGES * 4096);
	munmap(data, PAGES * 4096ul);
}

static void guest_writes_each_page(void)
{
	struct kvm_regs regs = { .rbx = DATA, .rcx = PAGES, .r8 = STOP, .rip = PRIVATE, .rflags = 2 };

	CHECK(!ioctl(vcpu, KVM_SET_REGS, &regs));
	while (ioctl(vcpu, KVM_RUN, 0))
		CHECK(errno == EINTR);
	CHECK(run->exit_reason == KVM_EXIT_MMIO && run->mmio.phys_addr == STOP);
}

/* Takes all entries, notes which pages of slot 0 they name, and gives them back. How many they were. */
static int harvest(uint8_t named[PAGES])
{
	int taken = 0;

	memset(named, 0, PAGES);
	for (;; harvested++, taken++) {
		struct kvm_dirty_gfn *entry = &ring[harvested % (RING_BYTES / sizeof(*ring))];

		if (!(__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
			return taken;
		if (entry->slot == 0)
			named[entry->offset] = 1;
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	}
}

static volatile int signals;

static void count_signal(int number)
{
	(void)number;
	signals++;
}

static int reset_once(void)
{
	int freed = ioctl(vm, KVM_RESET_DIRTY_RINGS, 0);

	CHECK(freed >= 0 || errno == EINTR);
	return freed < 0 ? 0 : freed;
}

static long microseconds(void)
{
	struct timespec now;

	CHECK(!clock_gettime(CLOCK_MONOTONIC, &now));
	return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* One round, with a signal so many microseconds after the reset has begun (0: none). How long the first reset took. */
static long one_round(int number, long after, int *lost_in)
{
	struct itimerval timer = { .it_value.tv_usec = after };
	uint8_t named[PAGES];
	int entries, freed, first, lost = 0, least = -1, most = -1;
	long took;

	create_vm();
	guest_writes_each_page();
	entries = harvest(named);
	signals = 0;
	took = microseconds();
	CHECK(!setitimer(ITIMER_REAL, &timer, NULL));
	first = freed = reset_once();
	took = microseconds() - took;
	timer.it_value.tv_usec = 0;
	CHECK(!setitimer(ITIMER_REAL, &timer, NULL));
	while (freed < entries)
		freed += reset_once();
	guest_writes_each_page();
	harvest(named);
	for (int page = 0; page < PAGES; page++) {
		if (named[page])
			continue;
		least = lost++ ? least : page;
		most = page;
	}
	*lost_in += lost > 0;
	if (after)
		printf("round %d: signals %d, the first call freed %d of %d; lost: %d pages (%d to %d)\n", number, signals, first,
		       entries, lost, least, most);
	fflush(stdout);
	destroy_vm();
	return took;
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : ROUNDS, with = 0, without = 0;
	struct sigaction action = { .sa_handler = count_signal };

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0) {
		printf("SKIP: /dev/kvm cannot be opened: %s.\n", strerror(errno));
		return 4;
	}
	CHECK(!sigaction(SIGALRM, &action, NULL));
	for (int number = 0; number < rounds; number++) {
		long took = one_round(number, 0, &without);

		/* Somewhere in the middle, each round elsewhere. */
		one_round(number, 1 + took * (number % 8 + 1) / 10, &with);
	}
	printf("%s: a write was lost in %d of %d rounds with a signal, in %d of %d without.\n", with + without ? "FAIL" : "PASS",
	       with, rounds, without, rounds);
	return with + without > 0;
}
