/*
 * For tools/testing/selftests/kvm: lay it beside the other tests of x86, add its name to the Makefile there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
//[raced]
#include <pthread.h>
//[end]
#include <sched.h>
//[raced]
#include <semaphore.h>
//[end]
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

@SHAPE@

/* ---- the guest: one access, then out --------------------------------------------------------------------------- */

static struct { uint64_t writes, address, value; } access_of[VCPUS];

static void guest_code(int v)
{
	for (;;) {
		uint64_t *address = (uint64_t *)READ_ONCE(access_of[v].address);

		if (READ_ONCE(access_of[v].writes))
			WRITE_ONCE(*address, READ_ONCE(access_of[v].value));
		else
			READ_ONCE(*address);
		GUEST_SYNC(v);
	}
}

/* ---- the VM, and the slot that the run is about ---------------------------------------------------------------- */

/* The library keeps slot 0 and low addresses for itself. BASE_GFN's place within its 2M page is kept. */
enum { RUN_SLOT = 1 };
static const uint64_t GUEST_ADDRESS = (1ul << 30) + ((uint64_t)BASE_GFN << 12);

static struct kvm_vm *vm;
static struct kvm_vcpu *vcpus[VCPUS];
static unsigned char *guest_memory;
//[ring]
static struct kvm_dirty_gfn *rings[VCPUS];
//[huge]
static void *mapped;
static const size_t MAPPED = ((size_t)PAGES << 12) + (4 << 20);
//[end]

/* vCPU v does one access, to the end. */
static void enter_guest(int v, int writes, uint64_t address, uint64_t value)
{
	struct ucall uc;

	access_of[v].writes = writes;
	access_of[v].address = address;
	access_of[v].value = value;
	sync_global_to_guest(vm, access_of[v]);
	vcpu_run(vcpus[v]);
	TEST_ASSERT(get_ucall(vcpus[v], &uc) == UCALL_SYNC, "vCPU%d left the guest with ucall %lu", v,
		    (unsigned long)uc.cmd);
}

static void set_flags(int flags)
{
//[huge]
	vm_set_user_memory_region(vm, RUN_SLOT, flags, GUEST_ADDRESS, (uint64_t)PAGES << 12, guest_memory);
//[no huge]
	vm_mem_region_set_flags(vm, RUN_SLOT, flags);
//[end]
}

static void setup(void)
{
	int v;

//[ring]
	vm = vm_create(VCPUS);
	vm_enable_dirty_ring(vm, RING_BYTES);
	for (v = 0; v < VCPUS; v++)
		vcpus[v] = vm_vcpu_add(vm, v, guest_code);
//[one vCPU, no ring]
	vm = vm_create_with_one_vcpu(&vcpus[0], guest_code);
//[vCPUs, no ring]
	vm = vm_create_with_vcpus(VCPUS, guest_code, vcpus);
//[manual]
	vm_enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL_PROTECT);
//[end]
//[no huge]
	vm_userspace_mem_region_add(vm, VM_MEM_SRC_ANONYMOUS, GUEST_ADDRESS, RUN_SLOT, PAGES, 0);
	guest_memory = addr_gpa2hva(vm, GUEST_ADDRESS);
//[huge]
	/* The library cannot lay a region across a 2M page's beginning so that host and guest address lie alike in it. */
	mapped = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(mapped != MAP_FAILED, "mmap()");
	madvise(mapped, MAPPED, MADV_HUGEPAGE);
	guest_memory = (void *)((((uintptr_t)mapped + (2 << 20) - 1) & -(2ul << 20)) + (GUEST_ADDRESS & ((2 << 20) - 1)));
	set_flags(0);
//[end]
	memset(guest_memory, 0, (size_t)PAGES << 12);	/* now the host has each page, and may write to it */
	virt_map(vm, GUEST_ADDRESS, GUEST_ADDRESS, PAGES);
	for (v = 0; v < VCPUS; v++) {
		vcpu_args_set(vcpus[v], 1, v);
//[ring]
		rings[v] = vcpu_map_dirty_ring(vcpus[v]);
//[end]
	}
}

static void teardown(void)
{
	kvm_vm_free(vm);
//[huge]
	munmap(mapped, MAPPED);
//[end]
}

static void open_kvm(void)
{
//[ring]
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_DIRTY_LOG_RING));
//[manual]
	TEST_REQUIRE((kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & MANUAL_PROTECT) == MANUAL_PROTECT);
//[end]
}

//[bitmap]
static void read_dirty_log(uint64_t *bitmap)
{
	kvm_vm_get_dirty_log(vm, RUN_SLOT, bitmap);
}

//[clear]
static void rearm_dirty_log(uint64_t *bitmap, int first, int number)
{
	kvm_vm_clear_dirty_log(vm, RUN_SLOT, bitmap, first, number);
}

//[ring]
static void rearm_rings(void)
{
	kvm_vm_reset_dirty_ring(vm);
}

//[end]
