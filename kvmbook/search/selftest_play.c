/* ---- user space: a copy of what the guest writes, kept as a migration keeps it --------------------------------- */

static volatile uint64_t *word(int page, int v)
{
	return (volatile uint64_t *)(guest_memory + ((size_t)page << 12)) + v;	/* vCPU v writes the page's v-th word */
}

static uint64_t copies[PAGES][VCPUS];
static int logging;
//[told]
static char told[PAGES];	/* reported as dirty, and not copied yet: KVM has not armed the page again */
//[end]

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
//[told]
	memset(told, 0, sizeof(told));
//[end]
}

//[disables]
static void disable_logging(void)
{
	set_flags(0);
	logging = 0;
}

//[bitmap]
static void get_dirty_log(void)
{
	uint64_t bitmap[(PAGES + 63) / 64] = { 0 };
	int page;

	read_dirty_log(bitmap);
	for (page = 0; page < PAGES; page++) {
		if (bitmap[page / 64] >> page % 64 & 1) {
//[manual bitmap]
			told[page] = 1;
//[armed by GET]
			copy(page);
//[bitmap]
		}
	}
}

//[clear]
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

//[ring]
static unsigned int harvested[VCPUS];

static void harvest_ring(int v)
{
	for (;;) {
		struct kvm_dirty_gfn *entry = &rings[v][harvested[v] % (RING_BYTES / sizeof(struct kvm_dirty_gfn))];

		if (!(__atomic_load_n(&entry->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_DIRTY))
			return;
		if (entry->slot == RUN_SLOT)
			told[entry->offset] = 1;
		__atomic_store_n(&entry->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		harvested[v]++;
	}
}

static void reset_dirty_rings(void)
{
	int page;

	rearm_rings();
	for (page = 0; page < PAGES; page++) {
		if (told[page])
			copy(page);
		told[page] = 0;
	}
}

//[end]
/* The guest stands still: a last report, then a page whose copy differs was written, and nobody was told. */
static int count_lost(int round)
{
	int page, v, lost = 0;

	if (!logging)
		return 0;
//[bitmap]
	get_dirty_log();
//[manual bitmap]
	for (page = 0; page < PAGES; page++)
		if (told[page])
			copy(page);
//[ring]
	for (v = 0; v < VCPUS; v++)
		harvest_ring(v);
	reset_dirty_rings();
//[end]
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

//[ages]
static int page_idle = -1, pagemap = -1;

static uint64_t entry_of(int file, uint64_t number)
{
	uint64_t entry;

	TEST_ASSERT(pread(file, &entry, 8, number * 8) == 8, "pread()");
	return entry;
}

/* Ageing without a flush, as Documentation/admin-guide/mm/idle_page_tracking.rst has it: a bit for each page frame. */
static void age(int page)
{
	uint64_t frame = entry_of(pagemap, (uintptr_t)word(page, 0) >> 12) & ((1ull << 55) - 1), bit = 1ull << frame % 64;

	if (!frame)
		ksft_exit_skip("/proc/self/pagemap shows page frames to root only.\n");
	TEST_ASSERT(pwrite(page_idle, &bit, 8, frame / 64 * 8) == 8, "pwrite(page_idle)");
	if (!(entry_of(page_idle, frame / 64) & bit))
		ksft_exit_skip("the host did not age page %d: its frame is on no LRU list.\n", page);
}

static void open_page_idle(void)
{
	page_idle = open("/sys/kernel/mm/page_idle/bitmap", O_RDWR);
	pagemap = open("/proc/self/pagemap", O_RDONLY);
	if (page_idle < 0 || pagemap < 0)
		ksft_exit_skip("ageing needs root and /sys/kernel/mm/page_idle (CONFIG_IDLE_PAGE_TRACKING): %s.\n",
			       strerror(errno));
}

/* Fresh pages wait in a list of this CPU, where nobody ages them, until some dozens have come together. */
static void fill_lru_list(void)
{
	size_t size = 512 << 12;
	void *others = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	TEST_ASSERT(others != MAP_FAILED, "mmap()");
	madvise(others, size, MADV_NOHUGEPAGE);
	memset(others, 1, size);
	munmap(others, size);
}

//[huge]
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

//[end]
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
//[ages]
	if (what == AGE)
		return age(page);
//[end]
	enter_guest(who, what == WRITE, GUEST_ADDRESS + ((uint64_t)page << 12) + 8 * who, value);
}

static uint64_t last_value;	/* each write has its own */

//[no raced, in turn]
static void does(int who, enum what what, int page)
{
	act(who, what, page, ++last_value);
}

//[raced]
static struct {
	pthread_t thread;
	sem_t todo, done;
	struct { enum what what; int page; uint64_t value; } jobs[JOBS];
	int begun;
} crew[VCPUS + 1];		/* a thread for each vCPU, and one for the host */

/* A moment of chance, so that two who begin at once meet at another place in each round. */
static void dawdle(void)
{
	struct timespec now;
	volatile uint32_t moment;

	clock_gettime(CLOCK_MONOTONIC, &now);
	for (moment = (uint32_t)now.tv_nsec * 2654435761u >> 18; moment; moment--)
		;
}

static void *work(void *its_number)
{
	int next, who = (intptr_t)its_number;

	stay_on_cpu(who);
	for (next = 0;; next++) {
		while (sem_wait(&crew[who].todo))
			;
		if (crew[who].jobs[next].what == STOPS)
			return NULL;
		dawdle();
		act(who, crew[who].jobs[next].what, crew[who].jobs[next].page, crew[who].jobs[next].value);
		sem_post(&crew[who].done);
	}
}

static void begin(int who, enum what what, int page)
{
	int number = crew[who].begun++;

	crew[who].jobs[number].what = what;
	crew[who].jobs[number].page = page;
	crew[who].jobs[number].value = ++last_value;
	sem_post(&crew[who].todo);
}

static void finish(int who)
{
	while (sem_wait(&crew[who].done))
		;
}

//[raced, in turn]
static void does(int who, enum what what, int page)
{
	begin(who, what, page);
	finish(who);
}

//[raced]
static void start_crew(void)
{
	int who;

	for (who = 0; who <= VCPUS; who++) {
		crew[who].begun = 0;
		sem_init(&crew[who].todo, 0, 0);
		sem_init(&crew[who].done, 0, 0);
		TEST_ASSERT(!pthread_create(&crew[who].thread, NULL, work, (void *)(intptr_t)who), "pthread_create()");
	}
}

static void stop_crew(void)
{
	int who;

	for (who = 0; who <= VCPUS; who++)
		begin(who, STOPS, 0);
	for (who = 0; who <= VCPUS; who++)
		pthread_join(crew[who].thread, NULL);
}

//[end]
/* ---- the run --------------------------------------------------------------------------------------------------- */

@PLAY@

static int play_round(int round)
{
	int lost;

	logging = 0;
//[told]
	memset(told, 0, sizeof(told));
//[ring]
	memset(harvested, 0, sizeof(harvested));
//[end]
	setup();
//[ages]
	fill_lru_list();
//[huge]
	see_that_pages_are_huge();
//[raced]
	start_crew();
//[end]
	play();
//[raced]
	stop_crew();
//[end]
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
//[raced]
	stay_on_cpu(HOST);
//[no raced]
	stay_on_cpu(0);
//[end]
//[chance]
	fputs(CHANCE, stdout);
//[end]
	open_kvm();
//[ages]
	open_page_idle();
//[end]
	for (round = 0; round < rounds && time(NULL) < until; round++)
		lost_in += play_round(round) > 0;
	if (lost_in)
		printf("FAIL: a write was lost in %d of %d rounds.\n", lost_in, round);
	else
		printf("PASS: each write reached the copy, in %d rounds.\n", round);
	return lost_in ? KSFT_FAIL : KSFT_PASS;
}
