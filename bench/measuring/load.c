/* The load: bulk bytes, ping-pong messages, or both, over sockets that its parent has connected.
 *
 * Why it is in C, and how it costs little beside what it measures:
 *
 *   - Two threads, one for all clients and one for all servers, since the two ends of a real pair never share a CPU.
 *     Each sleeps in one epoll set.
 *   - Bulk: the sender offers one large buffer over and over, the sink throws bytes away inside the kernel with
 *     MSG_TRUNC, so that receiving costs no copy. Bytes count when they arrive, not when they are sent: bytes
 *     in socket buffers were not carried.
 *   - Ping-pong: each client has one message under way and sends the next when the whole answer is there; the time of
 *     each round trip goes into a histogram of fixed size with an error below 1 %, so an hour costs no more memory
 *     than a second.
 *   - Mixed: ping-pong whose messages have all sizes from 100 bytes to SIZE, each power of two as often as the next.
 *     Both ends draw the same sizes, since all pairs walk through one table.
 *   - Greedy: ping-pong on all pairs but the last, which carries bulk at the same time, with two more threads. The
 *     round trips count: they show what one greedy pair does to the others.
 *
 * The parent reads the CPU time of the subject when the window begins and ends, so stdout says when:
 *
 *   begin\n        the warm-up is over, counting has begun
 *   end\n          counting has ended
 *   {"seconds": .., "count": .., "bytes": .., "cpu": .., "p50": .., "p99": .., "max": ..}\n
 *
 * count is bytes or round trips; bytes are the arrived ones, for greedy on the last pair only; cpu is this process's
 * user and system seconds in the window; p50, p99 and max are microseconds, 0 for bulk. Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong arguments.
 *
 * load bulk|pingpong|mixed|greedy SECONDS WARMUP SIZE CLIENT_FD SERVER_FD [CLIENT_FD SERVER_FD ...]
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define ROUND 256
/* About as much as a TCP send buffer grows to by default. */
#define BULK (1024 * 1024)
/* How long a thread sleeps before it checks whether it should stop. */
#define GLANCE_MS 50

/* Histogram: values below 128 exactly, above that 64 steps to each power of two. */
#define STEPS 64
#define SLOTS (STEPS * 60)

/* The bulk pairs are the last of all. */
static size_t pair_count, bulk_count;
static int *client_fds, *server_fds;
static size_t message_size;
/* The sizes of a pair's messages, used in a circle; a prime number, so not in step with any power of two. */
#define SIZES 1021
#define LEAST 100
static size_t sizes[SIZES];
static atomic_bool is_counting, must_stop;
/* Each has one writer; on lines of their own, so that the two threads do not wait for each other's cache line. */
static _Alignas(128) atomic_uint_fast64_t arrived_bulk;
static _Alignas(128) atomic_uint_fast64_t round_trips;
static _Alignas(128) atomic_uint_fast64_t arrived_messages;
static _Alignas(128) uint64_t histogram[SLOTS];

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    _exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static size_t slot_of(uint64_t value)
{
    int shift = value < 2 * STEPS ? 0 : 63 - __builtin_clzll(value) - 6;
    size_t slot = (size_t)shift * STEPS + (size_t)(value >> shift);
    return slot < SLOTS ? slot : SLOTS - 1;
}

/* The middle of what a slot stands for. */
static double value_of(size_t slot)
{
    if (slot < 2 * STEPS)
        return (double)slot;
    int shift = (int)(slot / STEPS) - 1;
    return ((double)(slot - (size_t)shift * STEPS) + 0.5) * (double)(1ull << shift);
}

static double percentile_us(uint64_t total, double share)
{
    uint64_t wanted = (uint64_t)(share * (double)total), seen = 0;
    for (size_t slot = 0; slot < SLOTS; slot++) {
        seen += histogram[slot];
        if (histogram[slot] && seen > wanted)
            return value_of(slot) / 1e3;
    }
    return 0;
}

static double highest_us(void)
{
    for (size_t slot = SLOTS; slot-- > 0;)
        if (histogram[slot])
            return value_of(slot) / 1e3;
    return 0;
}

static void *allocate(size_t size)
{
    void *memory = calloc(1, size);
    if (memory == NULL)
        die("no memory");
    return memory;
}

static int watch(const int *fds, size_t first, size_t past, uint32_t events)
{
    int set = epoll_create1(EPOLL_CLOEXEC);
    if (set < 0)
        die("epoll_create1: %s", strerror(errno));
    for (size_t i = first; i < past; i++) {
        struct epoll_event event = {.events = events, .data.u64 = i};
        if (epoll_ctl(set, EPOLL_CTL_ADD, fds[i], &event) < 0)
            die("pair %zu: descriptor %d: %s", i + 1, fds[i], strerror(errno));
    }
    return set;
}

static int ready(int set, struct epoll_event *events)
{
    int count = epoll_wait(set, events, ROUND, GLANCE_MS);
    if (count < 0 && errno != EINTR)
        die("epoll_wait: %s", strerror(errno));
    return count < 0 ? 0 : count;
}

static bool would_block(void)
{
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

/* --- bulk ------------------------------------------------------------------------------------------------------ */

static void *send_bulk(void *unused)
{
    (void)unused;
    struct epoll_event events[ROUND];
    char *buffer = allocate(BULK);
    int set = watch(client_fds, pair_count - bulk_count, pair_count, EPOLLOUT);
    memset(buffer, 'x', BULK);
    while (!atomic_load_explicit(&must_stop, memory_order_relaxed))
        for (int i = 0, count = ready(set, events); i < count; i++) {
            size_t pair = events[i].data.u64;
            if (send(client_fds[pair], buffer, BULK, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && !would_block())
                die("pair %zu: sending: %s", pair + 1, strerror(errno));
        }
    return NULL;
}

static void *sink_bulk(void *unused)
{
    (void)unused;
    struct epoll_event events[ROUND];
    int set = watch(server_fds, pair_count - bulk_count, pair_count, EPOLLIN);
    uint64_t total = 0;
    while (!atomic_load_explicit(&must_stop, memory_order_relaxed))
        for (int i = 0, count = ready(set, events); i < count; i++) {
            size_t pair = events[i].data.u64;
            /* With MSG_TRUNC nothing is written to the buffer, so NULL will do. */
            ssize_t dropped = recv(server_fds[pair], NULL, 16 * BULK, MSG_TRUNC | MSG_DONTWAIT);
            if (dropped == 0)
                die("pair %zu: the receiving end was closed", pair + 1);
            if (dropped < 0 && !would_block())
                die("pair %zu: receiving: %s", pair + 1, strerror(errno));
            if (dropped > 0)
                atomic_store_explicit(&arrived_bulk, total += (uint64_t)dropped, memory_order_relaxed);
        }
    return NULL;
}

/* --- ping-pong ------------------------------------------------------------------------------------------------- */

/* All from LEAST to message_size, evenly on a logarithmic scale; the same in every run. */
static void draw_sizes(bool is_mixed)
{
    uint64_t state = 88172645463325252u;
    for (size_t i = 0; i < SIZES; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        size_t low = LEAST;
        double share = (double)(state >> 11) / (double)(1ull << 53);
        /* Halve the scale until less than a factor of two is left; this needs no mathematics library. */
        double doublings = 0;
        for (size_t size = LEAST; size * 2 <= message_size; size *= 2)
            doublings++;
        double at = share * (doublings + 1);
        size_t whole = (size_t)at;
        low <<= whole;
        size_t high = low * 2 < message_size ? low * 2 : message_size;
        if (low > message_size)
            low = message_size;
        sizes[i] = is_mixed ? low + (size_t)((at - (double)whole) * (double)(high - low)) : message_size;
    }
}

static size_t size_of(size_t pair, uint64_t number)
{
    return sizes[(pair * 7 + number) % SIZES];
}

static void send_message(const char *side, const int *fds, size_t pair, const char *message, size_t size)
{
    /* Blocking on purpose: with one message under way there is room, unless it is nearly as large as the buffer. */
    for (size_t sent = 0; sent < size;) {
        ssize_t count = send(fds[pair], message + sent, size - sent, MSG_NOSIGNAL);
        if (count < 0 && !would_block())
            die("pair %zu: %s sending: %s", pair + 1, side, strerror(errno));
        sent += count < 0 ? 0 : (size_t)count;
    }
}

/* What is left of the message after reading what is there; a message may come in parts. */
static size_t receive_message(const char *side, const int *fds, size_t pair, char *message, size_t left)
{
    ssize_t count = recv(fds[pair], message, left, MSG_DONTWAIT);
    if (count == 0)
        die("pair %zu: the %s end was closed", pair + 1, side);
    if (count < 0 && !would_block())
        die("pair %zu: %s receiving: %s", pair + 1, side, strerror(errno));
    return count < 0 ? left : left - (size_t)count;
}

static void *play_client(void *unused)
{
    (void)unused;
    struct epoll_event events[ROUND];
    char *message = allocate(message_size);
    size_t *left = allocate(pair_count * sizeof *left);
    uint64_t *sent_at = allocate(pair_count * sizeof *sent_at), *number = allocate(pair_count * sizeof *number);
    uint64_t total = 0, bytes = 0;
    int set = watch(client_fds, 0, pair_count - bulk_count, EPOLLIN);
    for (size_t pair = 0; pair < pair_count - bulk_count; pair++) {
        left[pair] = size_of(pair, 0);
        sent_at[pair] = now_ns();
        send_message("client", client_fds, pair, message, left[pair]);
    }
    while (!atomic_load_explicit(&must_stop, memory_order_relaxed))
        for (int i = 0, count = ready(set, events); i < count; i++) {
            size_t pair = events[i].data.u64;
            left[pair] = receive_message("client", client_fds, pair, message, left[pair]);
            if (left[pair])
                continue;
            uint64_t now = now_ns();
            if (atomic_load_explicit(&is_counting, memory_order_relaxed))
                histogram[slot_of(now - sent_at[pair])]++;
            atomic_store_explicit(&round_trips, ++total, memory_order_relaxed);
            bytes += 2 * size_of(pair, number[pair]);
            atomic_store_explicit(&arrived_messages, bytes, memory_order_relaxed);
            left[pair] = size_of(pair, ++number[pair]);
            sent_at[pair] = now;
            send_message("client", client_fds, pair, message, left[pair]);
        }
    return NULL;
}

static void *play_server(void *unused)
{
    (void)unused;
    struct epoll_event events[ROUND];
    char *message = allocate(message_size);
    size_t *left = allocate(pair_count * sizeof *left);
    uint64_t *number = allocate(pair_count * sizeof *number);
    int set = watch(server_fds, 0, pair_count - bulk_count, EPOLLIN);
    for (size_t pair = 0; pair < pair_count - bulk_count; pair++)
        left[pair] = size_of(pair, 0);
    while (!atomic_load_explicit(&must_stop, memory_order_relaxed))
        for (int i = 0, count = ready(set, events); i < count; i++) {
            size_t pair = events[i].data.u64;
            left[pair] = receive_message("server", server_fds, pair, message, left[pair]);
            if (left[pair])
                continue;
            size_t size = size_of(pair, number[pair]);
            left[pair] = size_of(pair, ++number[pair]);
            send_message("server", server_fds, pair, message, size);
        }
    return NULL;
}

/* --- the window ------------------------------------------------------------------------------------------------ */

static void sleep_until(uint64_t when_ns)
{
    struct timespec when = {.tv_sec = (time_t)(when_ns / 1000000000u), .tv_nsec = (long)(when_ns % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR)
        ;
}

static void usage(void)
{
    fputs("usage: load bulk|pingpong|mixed|greedy SECONDS WARMUP SIZE CLIENT_FD SERVER_FD [CLIENT_FD SERVER_FD ...]\n", stderr);
    exit(2);
}

int main(int count, char **arguments)
{
    if (count < 7 || count % 2 == 0)
        usage();
    bool is_bulk = strcmp(arguments[1], "bulk") == 0, is_mixed = strcmp(arguments[1], "mixed") == 0;
    bool is_greedy = strcmp(arguments[1], "greedy") == 0;
    double seconds = atof(arguments[2]), warmup = atof(arguments[3]);
    message_size = (size_t)atol(arguments[4]);
    if ((!is_bulk && !is_mixed && !is_greedy && strcmp(arguments[1], "pingpong") != 0) || seconds <= 0 || warmup < 0 ||
        message_size < (is_mixed ? LEAST : 1))
        usage();
    pair_count = (size_t)(count - 5) / 2;
    if (is_greedy && pair_count < 2)
        usage();
    bulk_count = is_bulk ? pair_count : is_greedy ? 1 : 0;
    draw_sizes(is_mixed);
    client_fds = allocate(pair_count * sizeof *client_fds);
    server_fds = allocate(pair_count * sizeof *server_fds);
    for (size_t i = 0; i < pair_count; i++) {
        client_fds[i] = atoi(arguments[5 + 2 * i]);
        server_fds[i] = atoi(arguments[6 + 2 * i]);
    }

    pthread_t threads[4];
    size_t started = 0;
    void *(*works[])(void *) = {sink_bulk, send_bulk, play_server, play_client};
    for (size_t i = 0; i < 4; i++)
        if ((i < 2 ? bulk_count : pair_count - bulk_count) && pthread_create(&threads[started++], NULL, works[i], NULL))
            die("no thread");
    sleep_until(now_ns() + (uint64_t)(warmup * 1e9));

    atomic_uint_fast64_t *counter = is_bulk ? &arrived_bulk : &round_trips;
    atomic_uint_fast64_t *volume = bulk_count ? &arrived_bulk : &arrived_messages;
    uint64_t began = now_ns(), count_before = atomic_load(counter), bytes_before = atomic_load(volume);
    double cpu_before = cpu_seconds();
    atomic_store(&is_counting, true);
    puts("begin");
    fflush(stdout);
    sleep_until(began + (uint64_t)(seconds * 1e9));
    uint64_t ended = now_ns(), counted = atomic_load(counter) - count_before;
    uint64_t bytes = atomic_load(volume) - bytes_before;
    double cpu = cpu_seconds() - cpu_before;
    atomic_store(&is_counting, false);
    puts("end");
    fflush(stdout);

    atomic_store(&must_stop, true);
    for (size_t i = 0; i < started; i++)
        pthread_join(threads[i], NULL);
    uint64_t total = 0;
    for (size_t slot = 0; slot < SLOTS; slot++)
        total += histogram[slot];
    printf("{\"seconds\": %.6f, \"count\": %llu, \"bytes\": %llu, \"cpu\": %.6f, \"p50\": %.2f, \"p99\": %.2f, "
           "\"max\": %.2f}\n",
           (double)(ended - began) / 1e9, (unsigned long long)counted, (unsigned long long)bytes, cpu,
           percentile_us(total, 0.5), percentile_us(total, 0.99), highest_us());
    return fflush(stdout) ? 1 : 0;
}
