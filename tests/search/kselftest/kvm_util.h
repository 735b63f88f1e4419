/* What a generated selftest asks of tools/testing/selftests/kvm, as declarations: enough to compile against, not to link. */
#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

enum { KSFT_PASS = 0, KSFT_FAIL = 1, KSFT_SKIP = 4 };
enum { UCALL_NONE, UCALL_SYNC };
enum vm_mem_backing_src_type { VM_MEM_SRC_ANONYMOUS };
struct kvm_vm;
struct kvm_vcpu;
struct ucall { uint64_t cmd; };

struct kvm_vm *vm_create(uint32_t nr_runnable_vcpus);
struct kvm_vm *vm_create_with_one_vcpu(struct kvm_vcpu **vcpu, void *guest_code);
struct kvm_vm *vm_create_with_vcpus(uint32_t nr_vcpus, void *guest_code, struct kvm_vcpu *vcpus[]);
struct kvm_vcpu *vm_vcpu_add(struct kvm_vm *vm, uint32_t vcpu_id, void *guest_code);
void kvm_vm_free(struct kvm_vm *vm);
void vm_userspace_mem_region_add(struct kvm_vm *vm, enum vm_mem_backing_src_type src_type, uint64_t guest_paddr,
				 uint32_t slot, uint64_t npages, uint32_t flags);
void vm_set_user_memory_region(struct kvm_vm *vm, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t size, void *hva);
void vm_mem_region_set_flags(struct kvm_vm *vm, uint32_t slot, uint32_t flags);
void virt_map(struct kvm_vm *vm, uint64_t vaddr, uint64_t paddr, unsigned int npages);
void *addr_gpa2hva(struct kvm_vm *vm, uint64_t gpa);
void *addr_gva2hva(struct kvm_vm *vm, uint64_t gva);
void vcpu_args_set(struct kvm_vcpu *vcpu, unsigned int num, ...);
void vcpu_run(struct kvm_vcpu *vcpu);
uint64_t get_ucall(struct kvm_vcpu *vcpu, struct ucall *uc);
void ucall_sync(uint64_t stage);
bool kvm_has_cap(long cap);
unsigned int kvm_check_cap(long cap);
void vm_enable_cap(struct kvm_vm *vm, uint32_t cap, uint64_t arg0);
void vm_enable_dirty_ring(struct kvm_vm *vm, uint32_t ring_size);
void *vcpu_map_dirty_ring(struct kvm_vcpu *vcpu);
uint32_t kvm_vm_reset_dirty_ring(struct kvm_vm *vm);
void kvm_vm_get_dirty_log(struct kvm_vm *vm, int slot, void *log);
void kvm_vm_clear_dirty_log(struct kvm_vm *vm, int slot, void *log, uint64_t first_page, uint32_t num_pages);
_Noreturn void ksft_exit_skip(const char *why, ...);

#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile __typeof__(x) *)&(x) = (value))
#define GUEST_SYNC(stage) ucall_sync(stage)
#define sync_global_to_guest(vm, g) memcpy(addr_gva2hva(vm, (uintptr_t)&(g)), &(g), sizeof(g))
#define TEST_REQUIRE(holds) ((holds) ? (void)0 : ksft_exit_skip(#holds))
#define TEST_ASSERT(holds, ...) ((holds) ? (void)0 : (void)(printf(__VA_ARGS__), exit(254)))
