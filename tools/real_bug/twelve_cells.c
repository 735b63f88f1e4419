/*
 * One half of the twelve cells: three flush rules, aged or not, on the CPU that this runs on. Prints one line a round.
 *
 * The guest writes to its pages without leaving, and the host meanwhile ages them, enables dirty logging, and waits until
 * each has been written again. A page that was written after enabling had returned, and that no report names, is lost.
 *
 * The emulator empties a CPU's TLB whenever it enters or leaves the guest, so ageing, enabling and the write must lie within
 * one stay there. It holds interrupts back from a guest that was entered with IF=0, until that guest executes STI. So the
 * guest stays for STAY turns, lets what waits for it come in (a flush's IPI above all), leaves once, and begins again.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGES = 16, PAGE = 4096, ROUNDS = 10 };
enum { DATA = 0x10000, CODE = 0x1000, SHARED = 0x2000 };	/* guest addresses; DATA is the slot that logs */
#define STAY "500000"

#define CHECK(holds) do { if (!(holds)) err(1, "line %d: %s", __LINE__, #holds); } while (0)

/* ---- the guest: real mode; ds holds the data pages, es what it shares with the host ------------------------------ */

struct shared {
	uint32_t stop, stays;
};

asm(".pushsection .rodata\n"
    "guest: .code16\n"
    "	incl %es:4\n"			/* another stay begins */
    "	mov $" STAY ", %ecx\n"
    "1:	.irp page, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
    "	incl \\page * 4096\n"
    "	.endr\n"
    "	cmpl $0, %es:0\n"
    "	jne 2f\n"
    "	decl %ecx\n"
    "	jnz 1b\n"
    "	sti\n"				/* what has waited comes in now */
    "	nop\n"
    "	cli\n"
    "	cpuid\n"			/* leaves the guest, always */
    "	jmp guest\n"
    "2:	out %al, $0x10\n"
    "guest_end: .code64\n"
    ".popsection");
extern const char guest[], guest_end[];

/* ---- one VM ----------------------------------------------------------------------------------------------------- */

static int kvm, vm, vcpu;
static struct kvm_run *run;
static uint8_t *data, *code;
static volatile struct shared *shared;

static void set_region(int slot, int flags, uint64_t gpa, void *memory, int pages)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .flags = flags, .guest_phys_addr = gpa, .memory_size = pages * PAGE,
		.userspace_addr = (uintptr_t)memory,
	};

	CHECK(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

static void *fresh_pages(int pages)
{
	void *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	return memset(memory, 0, pages * PAGE);
}

static void create_vm(void)
{
	struct kvm_regs regs = { .rflags = 2 };		/* IF=0 */
	struct kvm_sregs sregs;

	CHECK((vm = ioctl(kvm, KVM_CREATE_VM, 0)) >= 0);
	CHECK(!ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000));
	data = fresh_pages(PAGES);
	code = fresh_pages(2);
	shared = (void *)(code + PAGE);
	memcpy(code, guest, guest_end - guest);
	set_region(0, 0, DATA, data, PAGES);
	set_region(1, 0, CODE, code, 2);
	CHECK((vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) >= 0);
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	CHECK(run != MAP_FAILED);
	CHECK(!ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs.base = CODE;
	sregs.cs.selector = CODE >> 4;
	sregs.ds.base = DATA;
	sregs.ds.selector = DATA >> 4;
	sregs.es.base = SHARED;
	sregs.es.selector = SHARED >> 4;
	CHECK(!ioctl(vcpu, KVM_SET_SREGS, &sregs));
	CHECK(!ioctl(vcpu, KVM_SET_REGS, &regs));
}

static void destroy_vm(void)
{
	munmap(run, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	close(vcpu);
	close(vm);
	munmap(data, PAGES * PAGE);
	munmap(code, 2 * PAGE);
}

/* How often KVM has asked for a flush of this VM's TLBs, from its statistics. */
static uint64_t flush_requests(void)
{
	int fd = ioctl(vm, KVM_GET_STATS_FD, 0);
	struct kvm_stats_header header;
	uint64_t value = -1;

	CHECK(fd >= 0 && pread(fd, &header, sizeof(header), 0) == sizeof(header));
	for (unsigned int i = 0; i < header.num_desc; i++) {
		size_t size = sizeof(struct kvm_stats_desc) + header.name_size;
		char space[256];
		struct kvm_stats_desc *desc = (void *)space;

		CHECK(pread(fd, desc, size, header.desc_offset + i * size) == (ssize_t)size);
		if (!strcmp(desc->name, "remote_tlb_flush_requests"))
			CHECK(pread(fd, &value, 8, header.data_offset + desc->offset) == 8);
	}
	close(fd);
	return value;
}

/* ---- the host ages pages, as page_idle does ---------------------------------------------------------------------- */

static int page_idle, pagemap;

static uint64_t pfn_of(uint8_t *page)
{
	uint64_t entry;

	CHECK(pread(pagemap, &entry, 8, (uintptr_t)page / PAGE * 8) == 8);
	return entry & ((1ull << 55) - 1);
}

static void age(uint8_t *page)
{
	uint64_t pfn = pfn_of(page), bit = 1ull << pfn % 64;

	CHECK(pwrite(page_idle, &bit, 8, pfn / 64 * 8) == 8);
}

static int is_idle(uint8_t *page)
{
	uint64_t pfn = pfn_of(page), bits;

	CHECK(pread(page_idle, &bits, 8, pfn / 64 * 8) == 8);
	return bits >> pfn % 64 & 1;
}

/* ---- one round --------------------------------------------------------------------------------------------------- */

static volatile uint32_t *counter(int page)
{
	return (volatile uint32_t *)(data + page * PAGE);
}

static void wait_for_turns(uint32_t turns)
{
	uint32_t begin[PAGES];

	for (int page = 0; page < PAGES; page++)
		begin[page] = *counter(page);
	for (int page = 0; page < PAGES; page++)
		while (*counter(page) - begin[page] < turns)
			sched_yield();
}

static void stay_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	CHECK(!sched_setaffinity(0, sizeof(set), &set));
}

static void *run_vcpu(void *nothing)
{
	stay_on(1);
	CHECK(!ioctl(vcpu, KVM_RUN, 0));
	CHECK(run->exit_reason == KVM_EXIT_IO);
	return nothing;
}

static void one_round(int ages, const char *label)
{
	uint32_t before[PAGES], stays, reported = 0, written = 0;
	uint64_t requests, log = 0;
	struct kvm_dirty_log get = { .slot = 0, .dirty_bitmap = &log };
	pthread_t thread;
	int idle = 0;

	create_vm();
	munmap(fresh_pages(64), 64 * PAGE);	/* moves the data pages to the LRU lists, where page_idle looks for pages */
	CHECK(!pthread_create(&thread, NULL, run_vcpu, NULL));
	for (stays = shared->stays; shared->stays < stays + 2;)
		sched_yield();			/* all pages are mapped, and a stay has just begun */
	wait_for_turns(2);			/* the TLB holds them */

	stays = shared->stays;
	for (int page = 0; ages && page < PAGES; page++)
		age(data + page * PAGE);
	for (int page = 0; ages && page < PAGES; page++)
		idle += is_idle(data + page * PAGE);
	requests = flush_requests();
	set_region(0, KVM_MEM_LOG_DIRTY_PAGES, DATA, data, PAGES);
	requests = flush_requests() - requests;
	for (int page = 0; page < PAGES; page++)
		before[page] = *counter(page);
	wait_for_turns(2);
	shared->stop = 1;
	CHECK(!pthread_join(thread, NULL));
	stays = shared->stays - stays;

	for (int page = 0; page < PAGES; page++)
		written += *counter(page) != before[page];
	CHECK(!ioctl(vm, KVM_GET_DIRTY_LOG, &get));
	for (int page = 0; page < PAGES; page++)
		reported += *counter(page) != before[page] && log >> page & 1;
	printf("cell flush=%s aged=%d written=%u reported=%u flushes=%d idle=%d stays=%u\n", label, ages, written, reported,
	       (int)requests, idle, stays);
	fflush(stdout);
	destroy_vm();
}

int main(void)
{
	static const char *const flush[] = { "never", "if changed", "always" };

	stay_on(0);
	CHECK((kvm = open("/dev/kvm", O_RDWR)) >= 0);
	CHECK((page_idle = open("/sys/kernel/mm/page_idle/bitmap", O_RDWR)) >= 0);
	CHECK((pagemap = open("/proc/self/pagemap", O_RDONLY)) >= 0);
	for (int rule = 0; rule < 3; rule++) {
		FILE *parameter = fopen("/sys/module/kvm/parameters/dirty_flush", "w");

		CHECK(parameter && fprintf(parameter, "%d", rule) > 0 && !fclose(parameter));
		for (int ages = 0; ages < 2; ages++)
			for (int round = 0; round < ROUNDS; round++)
				one_round(ages, flush[rule]);
	}
}
