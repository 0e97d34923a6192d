// Threads that share one job at a time. A job is cut into parts, more of them than threads where that pays, and whoever
// is free takes the next: on a busy machine the caller does the parts that a sleeping worker has not come to take.
#include <pthread.h>

#include <atomic>
#include <new>

#include "sbedge.h"

namespace {

constexpr uint32_t NONE_LEFT = 0x7fffffff;
constexpr int SPINS = 1500;     // some 20 microseconds, longer than the gaps between the jobs of a token; then sleep

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");        // a yield hint returns too soon to save power
#endif
}

}  // namespace

struct sbedge_pool {
    // The number of the job in the high half, its next part in the low one: taking a part is one compare-and-swap, which
    // fails for a worker that wakes up late and holds an earlier job's number.
    alignas(64) std::atomic<uint64_t> next{0};
    alignas(64) std::atomic<int> done{0};
    alignas(64) std::atomic<void (*)(void*, int, int)> work{nullptr};
    std::atomic<void*> argument{nullptr};
    std::atomic<int> parts{0}, sleeping{0};
    std::atomic<bool> caller_sleeps{false}, stopping{false};
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t started = PTHREAD_COND_INITIALIZER, finished = PTHREAD_COND_INITIALIZER;
    pthread_t* workers = nullptr;
    int threads = 1;

    static uint32_t job_of(uint64_t value) { return static_cast<uint32_t>(value >> 32); }

    // Parts of job `job` until none is left.
    void help(uint32_t job) {
        uint64_t seen = next.load(std::memory_order_acquire);
        while (job_of(seen) == job) {
            const int part = static_cast<int>(seen & 0xffffffff), count = parts.load(std::memory_order_relaxed);
            const auto function = work.load(std::memory_order_relaxed);
            void* const given = argument.load(std::memory_order_relaxed);
            if (part >= count) return;
            if (!next.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            function(given, part, count);
            if (done.fetch_add(1, std::memory_order_seq_cst) + 1 == count && caller_sleeps.load()) {
                pthread_mutex_lock(&mutex);
                pthread_cond_signal(&finished);
                pthread_mutex_unlock(&mutex);
            }
            seen = next.load(std::memory_order_acquire);
        }
    }

    void run(void (*function)(void*, int, int), void* given, int count) {
        const uint32_t last = job_of(next.load(std::memory_order_relaxed)), job = last + 1;
        // From here on whoever still looks at the last job finds no part of it, whatever count it reads below.
        next.store(uint64_t(last) << 32 | NONE_LEFT, std::memory_order_seq_cst);
        done.store(0, std::memory_order_relaxed);
        work.store(function, std::memory_order_relaxed);
        argument.store(given, std::memory_order_relaxed);
        parts.store(count, std::memory_order_relaxed);
        next.store(uint64_t(job) << 32, std::memory_order_seq_cst);
        if (sleeping.load(std::memory_order_seq_cst)) {
            pthread_mutex_lock(&mutex);
            pthread_cond_broadcast(&started);
            pthread_mutex_unlock(&mutex);
        }
        help(job);
        for (int i = 0; i < SPINS; ++i) {
            if (done.load(std::memory_order_acquire) == count) return;
            pause();
        }
        pthread_mutex_lock(&mutex);
        caller_sleeps.store(true, std::memory_order_seq_cst);
        while (done.load(std::memory_order_seq_cst) != count) pthread_cond_wait(&finished, &mutex);
        caller_sleeps.store(false, std::memory_order_relaxed);
        pthread_mutex_unlock(&mutex);
    }

    // The next job after `last`, waited for; its number, or `last` when the pool stops.
    uint32_t wait(uint32_t last) {
        for (int i = 0; i < SPINS; ++i) {
            const uint32_t job = job_of(next.load(std::memory_order_acquire));
            if (job != last || stopping.load(std::memory_order_relaxed)) return job;
            pause();
        }
        pthread_mutex_lock(&mutex);
        sleeping.fetch_add(1, std::memory_order_seq_cst);
        uint32_t job;
        while ((job = job_of(next.load(std::memory_order_seq_cst))) == last && !stopping.load())
            pthread_cond_wait(&started, &mutex);
        sleeping.fetch_sub(1, std::memory_order_relaxed);
        pthread_mutex_unlock(&mutex);
        return job;
    }

    static void* worker(void* self) {
        auto* pool = static_cast<sbedge_pool*>(self);
        uint32_t job = 0;
        while (!pool->stopping.load(std::memory_order_relaxed)) {
            const uint32_t upcoming = pool->wait(job);
            if (upcoming == job) break;
            job = upcoming;
            pool->help(job);
        }
        return nullptr;
    }
};

extern "C" {

sbedge_pool* sbedge_pool_new(int threads) {
    auto* pool = new (std::nothrow) sbedge_pool;
    if (!pool) return nullptr;
    pool->workers = new (std::nothrow) pthread_t[threads > 1 ? threads - 1 : 1];
    while (pool->workers && pool->threads < threads &&
           !pthread_create(&pool->workers[pool->threads - 1], nullptr, sbedge_pool::worker, pool))
        ++pool->threads;
    return pool;    // with as many threads as there could be
}

void sbedge_pool_free(sbedge_pool* pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    pool->stopping.store(true);
    pthread_cond_broadcast(&pool->started);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i + 1 < pool->threads; ++i) pthread_join(pool->workers[i], nullptr);
    delete[] pool->workers;
    delete pool;
}

int sbedge_pool_threads(const sbedge_pool* pool) { return pool->threads; }

void sbedge_pool_run(sbedge_pool* pool, void (*work)(void*, int, int), void* argument, int parts) {
    if (parts < 1) return;
    if (parts == 1 || pool->threads == 1)
        for (int part = 0; part < parts; ++part) work(argument, part, parts);
    else
        pool->run(work, argument, parts);
}

}  // extern "C"
