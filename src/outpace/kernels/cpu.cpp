// CPU kernels: linear layers, norms, rotary embedding, paged attention with a tree mask, gated activation, sampling.
//
// Two rules hold everywhere and are what makes answers independent of the batch:
//   1. A row's arithmetic depends on that row alone. It is never split by the number of threads, by the
//      other rows of the batch, or by how many rows share a register tile.
//   2. Sums run in an order fixed by the row's own length: 16 lanes over positions mod 16, tiles in order,
//      chunks of kChunk positions in order; a linear layer's inputs in order, or as AMX adds them.
//
// Portable C++17 with the vector extensions of GCC and Clang: 16 floats are one AVX-512 register, two AVX
// ones or four NEON ones. Intrinsics only for bf16 products where there are fast ones (`dot_group`, AMX), and
// where GCC makes five instructions of a conversion that is one. Plain torch references with the same
// signatures: reference.py.
//
// Matrices are row-major. `Scalar` is the model's dtype: float, or bf16 stored as uint16_t.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifndef __AMX_BF16__
#undef USE_AMX  // the compiler does not know it
#endif
#ifdef __linux__
#include <sched.h>
#include <unistd.h>
#endif

namespace {

constexpr int kLanes = 16;   // also the cache block: one tile of keys is one block
constexpr int kChunk = 256;  // positions whose softmax is taken together
constexpr float kInf = std::numeric_limits<float>::infinity();

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

template <typename To, typename From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit cast between sizes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline vf splat(float x) { return vf{} + x; }

inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
#ifdef __AVX512F__
inline vu lengthen(vh x) { return bits<vu>(_mm512_cvtepu16_epi32(bits<__m256i>(x))); }
inline vh shorten(vu x) { return bits<vh>(_mm512_cvtepi32_epi16(bits<__m512i>(x))); }
#else
inline vu lengthen(vh x) { return __builtin_convertvector(x, vu); }
inline vh shorten(vu x) { return __builtin_convertvector(x, vh); }
#endif
inline vf load(const uint16_t* p) {
  vh half;
  std::memcpy(&half, p, sizeof half);
  return bits<vf>(lengthen(half) << 16);
}
// To bf16, to nearest, ties to even (finite values; with an instruction for it denormal ones become 0).
inline vh narrow(vf x) {
#ifdef __AVX512BF16__
  return bits<vh>(_mm512_cvtneps_pbh(bits<__m512>(x)));
#else
  vu u = bits<vu>(x);
  return shorten((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
#endif
}
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
inline void store(uint16_t* p, vf x) {
  vh half = narrow(x);
  std::memcpy(p, &half, sizeof half);
}
inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return bits<float>(uint32_t(x) << 16); }
inline void put(float* p, float x) { *p = x; }
inline void put(uint16_t* p, float x) {
  uint32_t u = bits<uint32_t>(x);
  *p = uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
// The value a Scalar can hold: what rounding through memory gives.
inline vf round_to(const float*, vf x) { return x; }
inline vf round_to(const uint16_t*, vf x) { return bits<vf>(lengthen(narrow(x)) << 16); }

#ifdef __AVX512F__
inline float sum(vf x) { return _mm512_reduce_add_ps(bits<__m512>(x)); }
inline float max(vf x) { return _mm512_reduce_max_ps(bits<__m512>(x)); }
#else
inline float sum(vf x) {
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}
inline float max(vf x) {
  float m = x[0];
  for (int i = 1; i < kLanes; i++) m = std::max(m, x[i]);
  return m;
}
#endif
inline vf select(vi condition, vf a, vf b) { return condition ? a : b; }
// Where one is no number or they are equal, b.
inline vf max(vf a, vf b) {
#ifdef __AVX512F__
  return bits<vf>(_mm512_max_ps(bits<__m512>(a), bits<__m512>(b)));
#else
  return select(a > b, a, b);
#endif
}
inline bool any(vi condition) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask(bits<__m512i>(condition), bits<__m512i>(condition));
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes; i++) all |= condition[i];
  return all;
#endif
}

// x 2^n for integers n that keep it a normal number.
inline vf times_power_of_2(vf x, vf n) {
#ifdef __AVX512F__
  return bits<vf>(_mm512_scalef_ps(bits<__m512>(x), bits<__m512>(n)));
#else
  return x * bits<vf>((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

// e^x to about 2 ulp; exactly 0 below -87, so that masked scores vanish.
inline vf exp(vf x) {
  vf clamped = max(x, splat(-87.f));
  clamped = select(clamped > 88.f, splat(88.f), clamped);
  vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  vf n = (clamped * 1.44269504f + magic) - magic;
  vf r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return select(x < -87.f, splat(0.f), times_power_of_2(p, n));
}

// Natural logarithm of normal positive floats, to about 1 ulp (Cephes logf).
inline vf log(vf x) {
  vi u = bits<vi>(x);
  vi exponent = ((u >> 23) & 0xFF) - 126;
  vf m = bits<vf>((u & 0x007FFFFF) | 0x3F000000);  // in [0.5, 1)
  vi small = m < 0.70710678f;
  exponent = exponent + small;  // true is -1
  m = select(small, m + m, m) - 1.f;
  vf e = __builtin_convertvector(exponent, vf);
  vf z = m * m;
  vf p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  vf y = m * z * p + e * -2.12194440e-4f - 0.5f * z;
  return m + y + e * 0.693359375f;
}

// Space for `size` items, at a cache line, in what a thread keeps from call to call.
template <typename T>
T* room(std::vector<T>& kept, int64_t size) {
  constexpr uintptr_t kLine = 64;
  size += kLine / sizeof(T);
  if (int64_t(kept.size()) < size) kept.resize(size);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(kept.data()) + kLine - 1) / kLine * kLine);
}

// -------------------------------------------------------------------------------------------- threads

// Runs loops on several threads. Each has a share of its own, of chunks side by side, and then helps with those
// of others: chunks are claimed one by one and nobody waits for a thread that has not come, as a barrier of
// OpenMP would. What can still cost is a thread put off in the middle of a chunk. So accounts are kept of what
// the others save and what waiting for them loses, and where it does not pay the caller works alone for a while.
class Team {
 public:
  static Team& instance() {
    static Team* team = new Team;  // never destroyed: its threads end with the process
    return *team;
  }

  // Threads from now on, the caller included. Those that exist already stay and sleep.
  void resize(int threads) {
    std::lock_guard<std::mutex> busy(busy_);
    threads = std::min(threads, kMostThreads);
    threads_ = threads;
    for (; workers_ + 1 < threads; workers_++) std::thread([this, n = workers_ + 1] { serve(n); }).detach();
  }

  int threads() const { return threads_.load(std::memory_order_relaxed); }

  // Where a thread's share of `count` chunks begins.
  int share_begin(int share, int count) const { return int64_t(count) * share / threads(); }
  bool begins_share(int chunk, int count) const {
    return share_begin((int64_t(chunk) * threads() + count - 1) / count, count) == chunk;
  }

  // body(0) to body(count - 1), each once, in any order.
  template <typename Body>
  void run(int count, const Body& body) {
    run(count, 1, [&](int first, int end) {
      for (int i = first; i < end; i++) body(i);
    });
  }

  // The same in ranges of at most `most`: body(first, end), in each share from the last range to the first.
  template <typename Body>
  void run(int count, int most, const Body& body) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);  // busy: another model's loop
    const auto begin = Clock::now();
    if (count < 2 || !busy || threads_.load(std::memory_order_relaxed) < 2 || begin < alone_until_) {
      if (count) body(0, count);
      return;
    }
    call_.store([](const void* b, int first, int end) { (*static_cast<const Body*>(b))(first, end); },
                std::memory_order_relaxed);
    body_.store(&body, std::memory_order_relaxed);
    most_.store(most, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    caller_core_.store(current_core(), std::memory_order_relaxed);
    epoch_++;
    for (int share = threads() - 1; share >= 0; share--)
      left_[share].store(uint64_t(epoch_) << 32 | uint32_t(share_begin(share + 1, count) - share_begin(share, count)));
    if (sleeping_.load()) {
      std::lock_guard<std::mutex> lock(asleep_);
      wake_.notify_all();
    }
    const int own = take_part(epoch_, 0);
    const auto end = Clock::now();
    wait_for(count);
    settle((end - begin) * (count - own) / std::max(own, 1), Clock::now() - end);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int kMostThreads = 256;
  // The loop's epoch, and how many chunks nobody has claimed; on a line of its own, since threads wait there.
  struct alignas(64) Left : std::atomic<uint64_t> {
    Left() : std::atomic<uint64_t>(0) {}
  };
  static constexpr auto kPatience = std::chrono::milliseconds(5);  // of a thread: longer than the gap between steps
  static constexpr auto kStall = std::chrono::microseconds(500);     // of the caller: a chunk takes less than 200
  static constexpr Clock::duration kCredit = std::chrono::milliseconds(10);  // what is saved counts up to this
  static constexpr Clock::duration kShortest = std::chrono::milliseconds(8), kLongest = std::chrono::seconds(1);

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // Waits for the chunks that others have claimed.
  void wait_for(int count) {
    const auto begin = Clock::now();
    for (int spins = 1; finished_.load(std::memory_order_acquire) != count; spins++) {
      pause();
      if (spins % 64 == 0 && Clock::now() - begin > kStall) std::this_thread::yield();
    }
  }

  // Enters what the others' chunks would have taken and what was waited; the caller goes on alone where that
  // does not pay, longer each time it recurs.
  void settle(Clock::duration saved, Clock::duration waited) {
    balance_ = std::min(balance_ + saved - waited, kCredit);
    if (balance_ > -kStall) return;
    const auto now = Clock::now();
    alone_for_ = now - alone_until_ < alone_for_ ? std::min(2 * alone_for_, kLongest) : kShortest;
    alone_until_ = now + alone_for_;
    balance_ = Clock::duration::zero();
  }

  // Claims chunks of one loop while there are any, from share `own` on, fewer at a time towards a share's end; says
  // how many. The epoch makes a late thread miss, not meddle.
  int take_part(uint32_t epoch, int own) {
    int done = 0;
    for (int n = 0; n < threads(); n++) {
      const int share = (own + n) % threads();
      std::atomic<uint64_t>& all_left = left_[share];
      uint64_t work = all_left.load(std::memory_order_acquire);
      while (work >> 32 == epoch && uint32_t(work)) {
        auto call = call_.load(std::memory_order_relaxed);
        const void* body = body_.load(std::memory_order_relaxed);
        const int begin = share_begin(share, count_.load(std::memory_order_relaxed)), left = int(uint32_t(work));
        const int claimed = std::max(std::min(left / 2, most_.load(std::memory_order_relaxed)), 1);
        if (!all_left.compare_exchange_weak(work, work - claimed, std::memory_order_acq_rel)) continue;
        call(body, begin + left - claimed, begin + left);
        finished_.fetch_add(claimed, std::memory_order_release);
        done += claimed;
        work = all_left.load(std::memory_order_acquire);
      }
    }
    return done;
  }

  void serve(int number) {
    std::atomic<uint64_t>& own = left_[number];
    auto is_open = [&] { return uint32_t(own.load()) && number < threads_.load(); };
    for (;;) {
      const auto begin = Clock::now();
      for (int spins = 1; !is_open(); spins++) {
        pause();
        if (spins % 64 || Clock::now() - begin < kPatience) continue;
        std::unique_lock<std::mutex> lock(asleep_);
        sleeping_++;
        wake_.wait(lock, is_open);
        sleeping_--;
      }
      keep_off_caller();
      take_part(uint32_t(own.load() >> 32), number);
    }
  }

  // A thread that wakes is often put on the core of the one that woke it, where the two share its time until
  // the system notices, which takes longer than a pass. So it keeps off the core its caller was seen on.
  void keep_off_caller() {
#ifdef __linux__
    const int core = caller_core_.load(std::memory_order_relaxed);
    if (core != sched_getcpu()) return;
    cpu_set_t cores;
    if (sched_getaffinity(getpid(), sizeof cores, &cores)) return;
    CPU_CLR(core, &cores);
    if (CPU_COUNT(&cores)) sched_setaffinity(0, sizeof cores, &cores);
#endif
  }
  static int current_core() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
  }

  std::mutex busy_;  // one loop at a time
  int workers_ = 0;
  std::atomic<int> threads_{1};
  Clock::duration balance_{};
  Clock::duration alone_for_ = kShortest;
  Clock::time_point alone_until_{};
  uint32_t epoch_ = 0;
  Left left_[kMostThreads];  // of each share
  std::atomic<void (*)(const void*, int, int)> call_{nullptr};
  std::atomic<const void*> body_{nullptr};
  std::atomic<int> count_{0}, most_{1};  // chunks, and how many are claimed at once
  std::atomic<int> finished_{0};
  std::atomic<int> caller_core_{-1};
  std::atomic<int> sleeping_{0};
  std::mutex asleep_;
  std::condition_variable wake_;
};

// body(row) for every row, in chunks worth a thread's while; `work` is that of one row in scalars.
template <typename Body>
void for_rows(int rows, int work, const Body& body) {
  const int grain = std::max(1, (1 << 13) / work);
  Team::instance().run((rows + grain - 1) / grain, [&](int chunk) {
    for (int r = chunk * grain; r < std::min(rows, (chunk + 1) * grain); r++) body(r);
  });
}

// ----------------------------------------------------------------------------------------- activation

// silu(gate) * up for 16 of each, rounded between as Hugging Face does.
template <typename Scalar>
inline vf silu_mul(const Scalar* gate, const Scalar* up) {
  const vf g = load(gate);
  return round_to(gate, g / (1.f + exp(-g))) * load(up);
}

template <typename Scalar>
void silu_mul(Scalar* out, const Scalar* gate_up, int rows, int width) {
  for_rows(rows, width, [&](int r) {
    const Scalar* gate = gate_up + int64_t(r) * 2 * width;
    for (int i = 0; i < width; i += kLanes) store(out + int64_t(r) * width + i, silu_mul(gate + i, gate + width + i));
  });
}

// --------------------------------------------------------------------------------------------- linear

// Weights lie in panels of kPanel outputs: [panel][group of inputs][output][input of the group], where a group
// is 4 bytes: two inputs in bf16, one in float. A panel is what a thread claims. Rows are laid out alike for a
// tile of them: [group][row][input of the group]. Every output is one chain of sums over the inputs in order,
// whatever the rows of a tile: that is what makes a row's bits independent of the batch.
constexpr int kPanel = 2 * kLanes;
constexpr int kTileRows = 12;   // at most; times two registers of sums: 24 of AVX-512's 32
constexpr int kClaimedRows = 32;  // panels times rows that a thread claims at once
constexpr int kAhead = 8192;    // bytes fetched ahead, by vectors into L2: more can be on its way than into L1

template <typename Scalar>
constexpr int kGroup = sizeof(float) / sizeof(Scalar);

// Whether one instruction takes a group of bf16. Where it has half the rate of a multiplication in float, the
// build says so (cpu_library.py) and weights are widened instead: once for all rows of a tile.
#if defined(__AVX512BF16__) && !defined(SLOW_BF16_DOT)
constexpr bool kDotGroups = true;
inline vf dot_group(vf acc, uint32_t x, vu w) {
  return bits<vf>(_mm512_dpbf16_ps(bits<__m512>(acc), bits<__m512bh>(w), bits<__m512bh>(_mm512_set1_epi32(x))));
}
#else
constexpr bool kDotGroups = false;
inline vf dot_group(vf acc, uint32_t, vu) { return acc; }
#endif

// A row's inputs as they are laid out: groups for the instruction that takes them, else floats.
template <typename Scalar>
using Laid = std::conditional_t<kDotGroups, Scalar, float>;

inline void lay(float* to, float x) { *to = x; }
inline void lay(float* to, uint16_t x) { *to = widen(x); }
inline void lay(uint16_t* to, uint16_t x) { *to = x; }

// The i-th input of a group's weights, for each output.
inline vf weights_of(const float* w, int) { return load(w); }
inline vf weights_of(const uint16_t* w, int i) {
  vu group;
  std::memcpy(&group, w, sizeof group);
  return bits<vf>(i ? group & 0xFFFF0000u : group << 16);
}

// R rows, laid out, times one panel. Towards its end what is fetched ahead is the panel `next`.
template <int R, typename Scalar>
void linear_tile(Scalar* out, const Laid<Scalar>* x, const Scalar* panel, const Scalar* next, const Scalar* bias, int groups,
                 int64_t stride, int columns) {
  constexpr int kInputs = kGroup<Scalar>;
  constexpr int kGroupsAhead = kAhead / (kPanel * sizeof(float));
  const int turn = std::max(groups - kGroupsAhead, 0);
  vf acc[R][2];
  for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = splat(0.f);
  for (int g = 0; g < groups; g++, x += R * kInputs) {
    const Scalar* w[2] = {panel + int64_t(g) * kPanel * kInputs, panel + (int64_t(g) * kPanel + kLanes) * kInputs};
    const Scalar* ahead = g < turn ? w[0] + kAhead / sizeof(Scalar) : next + int64_t(g - turn) * kPanel * kInputs;
    for (int j = 0; j < 2; j++) __builtin_prefetch(ahead + j * kLanes * kInputs, 0, 2);
    if constexpr (kDotGroups && kInputs == 2) {
      for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) {
          uint32_t pair;
          vu weights;
          std::memcpy(&pair, x + r * kInputs, sizeof pair);
          std::memcpy(&weights, w[j], sizeof weights);
          acc[r][j] = dot_group(acc[r][j], pair, weights);
        }
    } else {
      for (int i = 0; i < kInputs; i++) {
        const vf weights[2] = {weights_of(w[0], i), weights_of(w[1], i)};
        for (int r = 0; r < R; r++)
          for (int j = 0; j < 2; j++) acc[r][j] += weights[j] * x[r * kInputs + i];
      }
    }
  }
  for (int r = 0; r < R; r++) {
    Scalar row[kPanel];
    for (int j = 0; j < 2; j++) store(row + j * kLanes, bias ? acc[r][j] + load(bias + j * kLanes) : acc[r][j]);
    std::memcpy(out + r * stride, row, columns * sizeof(Scalar));
  }
}

// body(begin, end, next) for ranges of panels, which it takes from the last to the first; next(panel) is the one that its
// thread takes after that one, or itself at the end of the thread's share. The less a panel takes, in rows or tiles of
// them, the more claiming it would cost: up to `most` are claimed at once.
template <typename Body>
void for_panels(int outputs, int most, const Body& body) {
  const int count = (outputs + kPanel - 1) / kPanel;
  Team::instance().run(count, most, [&](int begin, int end) {
    const int last = Team::instance().begins_share(begin, count) ? begin : begin - 1;
    body(begin, end, [=](int panel) { return panel > begin ? panel - 1 : last; });
  });
}

template <typename Scalar>
void linear(Scalar* out, const Scalar* x, const Scalar* packed, const Scalar* bias, int rows, int inputs, int outputs) {
  using Tile = void (*)(Scalar*, const Laid<Scalar>*, const Scalar*, const Scalar*, const Scalar*, int, int64_t, int);
  static const Tile tiles[kTileRows] = {
      linear_tile<1, Scalar>, linear_tile<2, Scalar>,  linear_tile<3, Scalar>,  linear_tile<4, Scalar>,
      linear_tile<5, Scalar>, linear_tile<6, Scalar>,  linear_tile<7, Scalar>,  linear_tile<8, Scalar>,
      linear_tile<9, Scalar>, linear_tile<10, Scalar>, linear_tile<11, Scalar>, linear_tile<12, Scalar>};
  const int groups = inputs / kGroup<Scalar>;
  static thread_local std::vector<Laid<Scalar>> laid_out;
  Laid<Scalar>* tiled = room(laid_out, int64_t(rows) * inputs);
  // Equal tiles: each widens the weights anew, and a last one of a single row would wait for its own sums.
  const int num_tiles = std::max((rows + kTileRows - 1) / kTileRows, 1), most = (rows + num_tiles - 1) / num_tiles;
  Team::instance().run(num_tiles, [&](int tile) {
    const int first = tile * most, tile_rows = std::min(most, rows - first);
    const Scalar* from = x + int64_t(first) * inputs;
    Laid<Scalar>* to = tiled + int64_t(first) * inputs;
    for (int g = 0; g < groups; g++)
      for (int r = 0; r < tile_rows; r++)
        for (int i = 0; i < kGroup<Scalar>; i++) lay(to++, from[int64_t(r) * inputs + g * kGroup<Scalar> + i]);
  });
  for_panels(outputs, std::max(kClaimedRows / std::max(rows, 1), 1), [&](int begin, int end, const auto& next) {
    const int64_t size = int64_t(inputs) * kPanel;
    for (int panel = end - 1; panel >= begin; panel--) {
      const int first = panel * kPanel;
      for (int r = 0; r < rows; r += most)
        tiles[std::min(most, rows - r) - 1](out + int64_t(r) * outputs + first, tiled + int64_t(r) * inputs,
                                            packed + panel * size, packed + next(panel) * size,
                                            bias ? bias + first : nullptr, groups, outputs,
                                            std::min(kPanel, outputs - first));
    }
  });
}

#ifdef USE_AMX
// With AMX a tile is up to 16 rows of 32 inputs, which one instruction multiplies by 32 inputs of 16 outputs: half a
// panel as it lies. So 16 rows take as long as one, which is as long as memory takes to bring the weights. Sums are the
// processor's (Intel's manual, TDPBF16PS): in 32 inputs a chain over the even ones and one over the odd ones, both from
// 0, which are added, then their sum to that of the inputs before. Denormal numbers count as 0.
constexpr int kAmxRows = 16, kAmxInputs = 32;
constexpr int kAmxDepth = 288;  // inputs whose weights in a panel stay in L1, beside two tiles of rows

struct alignas(64) AmxConfig {
  uint8_t palette = 1, start_row = 0, unused[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Tiles 0 to 3 are sums of R rows, 4 and 5 those rows' inputs, 6 and 7 weights.
  explicit AmxConfig(int num_rows) {
    for (int tile = 0; tile < 8; tile++) row_bytes[tile] = 64, rows[tile] = tile < 6 ? num_rows : kAmxRows;
  }
};

// `Blocks` tiles of rows times the inputs from `begin` to `end` of one panel: sums[block][half of the panel][row][output],
// which go on from where they are unless `begin` is 0. Meanwhile fetches weights. If these rows are all there are, those a
// little ahead and towards the panel's end the panel `next`. Else this one is in the cache or on its way, and each of
// `turns` turns of rows fetches its share of the next one.
template <int Blocks>
void amx_tiles(float* sums, const uint16_t* const* x, const uint16_t* panel, const uint16_t* next, int inputs, int begin,
               int end, int turn, int turns) {
  constexpr int kSums = kAmxRows * kLanes, kStep = kAmxInputs * kPanel;  // weights of one step
  constexpr int kLine = 64 / sizeof(uint16_t);                          // of a line
  const int wrap = std::max(inputs - kAhead / int(kPanel * sizeof(uint16_t)), 0);
  const int share = (kStep / kLine + turns - 1) / turns * kLine;
  const int64_t x_stride = inputs * sizeof(uint16_t), panel_stride = 2 * kPanel * sizeof(uint16_t);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (begin) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + kSums, 64);
    if constexpr (Blocks == 2) {
      _tile_loadd(2, sums + 2 * kSums, 64);
      _tile_loadd(3, sums + 3 * kSums, 64);
    }
  }
  for (int i = begin; i < end; i += kAmxInputs) {
    const uint16_t* w = panel + int64_t(i) * kPanel;
    if (turns > 1) {
      const uint16_t* ahead = next + int64_t(i) * kPanel + turn * share;
      for (int line = 0; line < share; line += kLine) __builtin_prefetch(ahead + line, 0, 2);
    } else {  // apart, since a loop of known length is faster
      const uint16_t* ahead = i < wrap ? w + kAhead / sizeof(uint16_t) : next + int64_t(i - wrap) * kPanel;
      for (int line = 0; line < kStep; line += kLine) __builtin_prefetch(ahead + line);  // L1 has room for it
    }
    _tile_loadd(6, w, panel_stride);
    _tile_loadd(7, w + kPanel, panel_stride);
    _tile_loadd(4, x[0] + i, x_stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Blocks == 2) {
      _tile_loadd(5, x[1] + i, x_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + kSums, 64);
  if constexpr (Blocks == 2) {
    _tile_stored(2, sums + 2 * kSums, 64);
    _tile_stored(3, sums + 3 * kSums, 64);
  }
}

// A linear layer; a gated one's outputs are gates and as many others, and it gives silu(gate) * other.
template <bool Gated>
void amx_linear(uint16_t* out, const uint16_t* x, const uint16_t* packed, const uint16_t* bias, int rows, int inputs,
                int outputs) {
  if (!rows) return;
  const int padded = (inputs + kAmxInputs - 1) / kAmxInputs * kAmxInputs;  // as the weights are
  if (padded > inputs) {
    static thread_local std::vector<uint16_t> with_zeros;
    uint16_t* wide = room(with_zeros, int64_t(rows) * padded);
    for (int64_t r = 0; r < rows; r++) {
      std::memcpy(wide + r * padded, x + r * inputs, inputs * sizeof(uint16_t));
      std::fill(wide + r * padded + inputs, wide + (r + 1) * padded, 0);
    }
    x = wide;
  }
  const int blocks = (rows + kAmxRows - 1) / kAmxRows, block_rows = (rows + blocks - 1) / blocks;
  const AmxConfig config(block_rows);
  // The last block begins early, and has a few rows that the one before it has, with the same bits.
  auto first_row = [&](int block) { return std::min(block * block_rows, rows - block_rows); };
  const int64_t size = int64_t(padded) * kPanel;
  // Where a panel serves more than two blocks it is taken in parts, which those after the first two find in L1.
  const int parts = blocks > 2 ? (padded + kAmxDepth - 1) / kAmxDepth : 1;
  const int depth = (padded / kAmxInputs + parts - 1) / parts * kAmxInputs;
  constexpr int kSums = 2 * kAmxRows * kLanes;  // of a block
  // finish(block) for each block whose sums are there.
  auto multiply_panel = [&](float* all_sums, int panel, int next, const auto& finish) {
    const uint16_t *weights = packed + panel * size, *weights_next = packed + next * size;
    for (int begin = 0; begin < padded; begin += depth)
      for (int block = 0; block < blocks; block += 2) {
        const int count = std::min(2, blocks - block), end = std::min(begin + depth, padded);
        const int rows_of[2] = {first_row(block), first_row(block + count - 1)};
        const uint16_t* from[2] = {x + int64_t(rows_of[0]) * padded, x + int64_t(rows_of[1]) * padded};
        float* sums = all_sums + block * kSums;
        (count == 2 ? amx_tiles<2> : amx_tiles<1>)(sums, from, weights, weights_next, padded, begin, end, block / 2,
                                                   (blocks + 1) / 2);
        for (int b = 0; b < count && end == padded; b++) finish(block + b);
      }
  };
  auto rounded = [&](const float* all_sums, int panel, int block, int row) {
    const float* sums = all_sums + block * kSums + row * kLanes;
    vf halves[2] = {load(sums), load(sums + kAmxRows * kLanes)};
    if (bias)
      for (int j = 0; j < 2; j++) halves[j] += load(bias + panel * kPanel + j * kLanes);
    return _mm512_cvtne2ps_pbh(bits<__m512>(halves[1]), bits<__m512>(halves[0]));
  };
  const int width = Gated ? outputs / 2 : outputs, panels = width / kPanel;
  for_panels(width, std::max(kClaimedRows / blocks, 1), [&](int begin, int end, const auto& next) {
    static thread_local std::vector<float> buffer;
    float *sums = room(buffer, 2 * blocks * kSums), *gates = sums + blocks * kSums;
    _tile_loadconfig(&config);  // as long as some hundredths of a panel
    for (int panel = end - 1; panel >= begin; panel--) {
      const int columns = std::min(kPanel, width - panel * kPanel);
      auto to = [&](int block, int row) { return out + int64_t(first_row(block) + row) * width + panel * kPanel; };
      if constexpr (Gated) {
        multiply_panel(gates, panel, panels + panel, [](int) {});
        multiply_panel(sums, panels + panel, next(panel), [&](int block) {
          for (int r = 0; r < block_rows; r++) {
            uint16_t pair[2][kPanel];
            const __m512bh row[2] = {rounded(gates, panel, block, r), rounded(sums, panels + panel, block, r)};
            std::memcpy(pair, row, sizeof pair);
            for (int j = 0; j < kPanel; j += kLanes) store(to(block, r) + j, silu_mul(pair[0] + j, pair[1] + j));
          }
        });
      } else {
        multiply_panel(sums, panel, next(panel), [&](int block) {
          for (int r = 0; r < block_rows; r++) {
            const __m512bh row = rounded(sums, panel, block, r);
            if (columns == kPanel)
              std::memcpy(to(block, r), &row, sizeof row);
            else
              std::memcpy(to(block, r), &row, columns * sizeof(uint16_t));
          }
        });
      }
    }
    _tile_release();
  });
}

template <>
void linear(uint16_t* out, const uint16_t* x, const uint16_t* packed, const uint16_t* bias, int rows, int inputs,
            int outputs) {
  amx_linear<false>(out, x, packed, bias, rows, inputs, outputs);
}
#endif

// A linear layer, and the low-rank change that it has in some rows.
struct LinearArgs {
  const void *packed, *bias;  // as `linear` takes them
  const void *down, *up;      // of the change, packed
  const int64_t* changed;     // [num_changed], rows with it, each once
  int32_t inputs, outputs, rank, num_changed;
};

template <typename Scalar>
void linear(Scalar* out, const Scalar* x, const LinearArgs& a, int rows) {
  linear(out, x, static_cast<const Scalar*>(a.packed), static_cast<const Scalar*>(a.bias), rows, a.inputs, a.outputs);
  if (!a.num_changed) return;
  static thread_local std::vector<Scalar> buffer;
  const int64_t count = a.num_changed;
  Scalar* picked = room(buffer, count * (a.inputs + a.rank + a.outputs));
  Scalar* low = picked + count * a.inputs;
  Scalar* change = low + count * a.rank;
  for (int n = 0; n < count; n++)
    std::memcpy(picked + int64_t(n) * a.inputs, x + a.changed[n] * a.inputs, a.inputs * sizeof(Scalar));
  linear<Scalar>(low, picked, static_cast<const Scalar*>(a.down), nullptr, count, a.inputs, a.rank);
  linear<Scalar>(change, low, static_cast<const Scalar*>(a.up), nullptr, count, a.rank, a.outputs);
  for (int n = 0; n < count; n++) {
    Scalar* to = out + a.changed[n] * a.outputs;
    for (int i = 0; i < a.outputs; i++) put(to + i, widen(to[i]) + widen(change[int64_t(n) * a.outputs + i]));
  }
}

// out = silu(gate) * up of a linear layer whose outputs are gates and as many others; `gate_up` is room for those.
template <typename Scalar>
void gated_linear(Scalar* out, Scalar* gate_up, const Scalar* x, const LinearArgs& a, int rows) {
#ifdef USE_AMX
  if constexpr (kGroup<Scalar> == 2)
    if (!a.num_changed && a.outputs % (2 * kPanel) == 0)
      return amx_linear<true>(out, x, static_cast<const Scalar*>(a.packed), static_cast<const Scalar*>(a.bias), rows,
                              a.inputs, a.outputs);
#endif
  linear(gate_up, x, a, rows);
  silu_mul(out, gate_up, rows, a.outputs / 2);
}

// ---------------------------------------------------------------------------------------------- norms

// out = weight * x / rms(x), rounded to Scalar before the weight as Hugging Face does.
template <typename Scalar>
inline void normalise(Scalar* out, const Scalar* x, const Scalar* weight, float eps, int width) {
  vf squares = splat(0.f);
  for (int i = 0; i < width; i += kLanes) {
    vf v = load(x + i);
    squares += v * v;
  }
  float scale = 1.f / std::sqrt(sum(squares) / width + eps);
  for (int i = 0; i < width; i += kLanes)
    store(out + i, round_to(x, load(x + i) * scale) * load(weight + i));
}

template <typename Scalar>
void rms_norm(Scalar* out, const Scalar* x, const Scalar* delta, Scalar* residual, const Scalar* weight, float eps,
              int rows, int width) {
  for_rows(rows, width, [&](int r) {
    const Scalar* row = x + int64_t(r) * width;
    if (delta) {
      Scalar* sum = residual + int64_t(r) * width;
      const Scalar* change = delta + int64_t(r) * width;
      for (int i = 0; i < width; i += kLanes) store(sum + i, load(sum + i) + load(change + i));
      row = sum;
    }
    normalise(out + int64_t(r) * width, row, weight, eps, width);
  });
}

// --------------------------------------------------------------------------------- rotation, KV write

struct RopeArgs {
  const int32_t* positions;    // [rows]
  const int32_t* slots;        // [rows]
  const float* cos_sin;        // [max_position, head_dim]: cosines, then sines
  int32_t rows, num_heads, num_kv_heads, head_dim;
  float eps;
};

template <typename Scalar>
inline void rotate(Scalar* head, const float* cos_sin, int dim) {
  const int half = dim / 2;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    vf a = load(head + i), b = load(head + half + i), c = load(cos_sin + i), s = load(cos_sin + half + i);
    store(head + i, a * c - b * s);
    store(head + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    float a = widen(head[i]), b = widen(head[i + half]), c = cos_sin[i], s = cos_sin[i + half];
    put(head + i, a * c - b * s);
    put(head + i + half, b * c + a * s);
  }
}

// Rotates q and k of each row in place (after their norms, if given) and writes k and v to their slots.
// K blocks are [kv_head, group of dims, 16, dim of the group] (a tile's 16 keys are the lanes), V blocks [kv_head, group
// of positions, dim, position of the group]: what is multiplied together lies together, as in a linear layer's weights.
template <typename Scalar>
void rope_and_cache(const RopeArgs& a, Scalar* qkv, Scalar* k_cache, Scalar* v_cache, const Scalar* q_norm,
                    const Scalar* k_norm) {
  constexpr int kOf = kGroup<Scalar>;
  int dim = a.head_dim, width = (a.num_heads + 2 * a.num_kv_heads) * dim;
  for_rows(a.rows, width, [&](int r) {
    Scalar* row = qkv + int64_t(r) * width;
    const float* cos_sin = a.cos_sin + int64_t(a.positions[r]) * dim;
    int64_t block = a.slots[r] / kLanes, offset = a.slots[r] % kLanes;
    for (int h = 0; h < a.num_heads + a.num_kv_heads; h++) {
      const Scalar* norm = h < a.num_heads ? q_norm : k_norm;
      if (norm) normalise(row + h * dim, row + h * dim, norm, a.eps, dim);
      rotate(row + h * dim, cos_sin, dim);
    }
    for (int h = 0; h < a.num_kv_heads; h++) {
      const Scalar* k = row + (a.num_heads + h) * dim;
      const Scalar* v = k + a.num_kv_heads * dim;
      const int64_t tile = (block * a.num_kv_heads + h) * dim * kLanes;
      for (int d = 0; d < dim; d += kOf) std::memcpy(k_cache + tile + d * kLanes + offset * kOf, k + d, kOf * sizeof(Scalar));
      Scalar* to_v = v_cache + tile + offset / kOf * kOf * dim + offset % kOf;
      for (int d = 0; d < dim; d++) to_v[d * kOf] = v[d];
    }
  });
}

// Copies slots, (from, to) each, of a cache [layers, blocks, kv_heads, ...]; all are read before one is written.
template <typename Scalar>
void move_slots(Scalar* keys, Scalar* values, const int64_t* moves, int count, int layers, int64_t blocks, int kv_heads, int dim) {
  constexpr int kOf = kGroup<Scalar>;
  for_rows(layers, 2 * count * kv_heads * dim, [&](int layer) {
    std::vector<Scalar> buffer(2 * int64_t(count) * dim);
    for (int h = 0; h < kv_heads; h++)
      for (int side = 0; side < 2; side++) {
        Scalar* at = buffer.data();
        for (const int64_t* slot = moves + side; slot < moves + 2 * count; slot += 2) {
          const int64_t tile = ((layer * blocks + *slot / kLanes) * kv_heads + h) * dim * kLanes;
          const int place = int(*slot % kLanes);
          Scalar *k = keys + tile + place * kOf, *v = values + tile + place / kOf * kOf * dim + place % kOf;
          for (int d = 0; d < dim; d++, at++) {
            Scalar &key = k[d / kOf * kOf * kLanes + d % kOf], &value = v[d * kOf];
            if (side)
              key = at[0], value = at[int64_t(count) * dim];
            else
              at[0] = key, at[int64_t(count) * dim] = value;
          }
        }
      }
  });
}

// ------------------------------------------------------------------------------------------ attention

struct AttendArgs {
  const int32_t* positions;     // [rows]
  const int32_t* parents;       // [rows]
  const int32_t* row_starts;    // [sequences + 1]
  const int32_t* context_lens;  // [sequences]
  const int32_t* block_tables;  // [sequences, max_blocks]
  const int32_t* branching;     // [sequences]: whether its rows are not simply one after the other
  int32_t sequences, max_blocks, num_heads, num_kv_heads, head_dim;
  float scale;
};

// Whether attention multiplies by AMX. Queries there are bf16 as they come; the weights of values, which are not, are
// sums of two bf16 numbers, or answers that are nearly tied would change.
#ifdef USE_AMX
template <typename Scalar>
constexpr bool kByAmx = std::is_same_v<Scalar, uint16_t>;
#else
template <typename Scalar>
constexpr bool kByAmx = false;
#endif

// Queries that share register tiles at most.
template <typename Scalar>
constexpr int kMaxQueries = kByAmx<Scalar> ? 16 : 12;

// The queries that share register tiles: `rows` rows of one sequence times `heads` heads of one kv head.
struct Unit {
  int sequence, kv_head, first_row, rows, first_head, heads;
};

// Tiles of keys and values as they lie in the cache: a block each.
template <typename Scalar>
struct CachedTiles {
  const AttendArgs& a;
  const Scalar *keys, *values;
  const Unit& u;

  int64_t offset(int tile) const {
    int64_t block = a.block_tables[int64_t(u.sequence) * a.max_blocks + tile];
    return (block * a.num_kv_heads + u.kv_head) * a.head_dim * kLanes;
  }
  const Scalar* k(int tile) const { return keys + offset(tile); }
  const Scalar* v(int tile) const { return values + offset(tile); }
  void fetch(int tile) const {
    for (int i = 0; i < a.head_dim * kLanes; i += 64 / sizeof(Scalar)) {
      __builtin_prefetch(k(tile) + i);
      __builtin_prefetch(v(tile) + i);
    }
  }
  // The value's first dim; the next ones are kGroup apart.
  const Scalar* v_at(int slot) const {
    constexpr int kOf = kGroup<Scalar>;
    const int place = slot % kLanes;
    return v(slot / kLanes) + place / kOf * kOf * a.head_dim + place % kOf;
  }
};

// Where the rows of a sequence have the keys and values of their positions. Up to `fork` all have them where plain
// decoding would, the others have a path of their own through a tree.
struct Paths {
  int fork, width;          // whole tiles; positions behind them of the longest path
  std::vector<int> slots;   // [rows, width], logical ones; -1 behind a path's end
  std::vector<int> tiles;   // those that they are in
  std::vector<int> places;  // [rows, width], where each slot is in these tiles, side by side

  Paths(const AttendArgs& a, int sequence) : fork(std::numeric_limits<int>::max() / kLanes), width(0) {
    if (!a.branching[sequence]) return;
    const int start = a.row_starts[sequence], rows = a.row_starts[sequence + 1] - start, context = a.context_lens[sequence];
    const int *parents = a.parents + start, *positions = a.positions + start;
    int chain = rows;  // the first of them, which no row branches off from
    for (int r = 0; r < rows; r++)
      if (parents[r] != r - 1) chain = std::min(chain, parents[r] + 1);
    fork = (context + chain) / kLanes;
    const int begin = fork * kLanes;
    width = std::max(0, *std::max_element(positions, positions + rows) + 1 - begin);
    slots.assign(int64_t(rows) * width, -1);
    for (int r = 0; r < rows; r++) {
      int p = positions[r], row = r;
      int* own = slots.data() + int64_t(r) * width;
      for (; p >= begin && row >= 0; row = parents[row]) own[p-- - begin] = context + row;
      for (; p >= begin; p--) own[p - begin] = p;
    }
    for (int slot : slots)
      if (slot >= 0) tiles.push_back(slot / kLanes);
    std::sort(tiles.begin(), tiles.end());
    tiles.erase(std::unique(tiles.begin(), tiles.end()), tiles.end());
    for (int slot : slots) {
      const auto tile = std::lower_bound(tiles.begin(), tiles.end(), slot / kLanes);
      places.push_back(slot < 0 ? -1 : int(tile - tiles.begin()) * kLanes + slot % kLanes);
    }
  }
};

// scores[n][lane] = q[n] . k[lane] for T tiles at once; the order of the sum over dims is the same for all N, T.
// Meanwhile fetches what comes next: blocks are scattered, so the hardware does not foresee them.
template <int N, int T, typename Scalar>
inline void dot_tiles(const float* q, const Scalar* const* k, const Scalar* const* next, int dim, float* scores) {
  constexpr int kOf = kGroup<Scalar>;
  vf acc[N][T] = {};
  for (int d = 0; d < dim; d += kOf) {
    for (int t = 0; t < 2 * T; t++) __builtin_prefetch(next[t] + d * kLanes);
    for (int j = 0; j < kOf; j++) {
      vf key[T];
      for (int t = 0; t < T; t++) key[t] = weights_of(k[t] + d * kLanes, j);
      for (int n = 0; n < N; n++)
        for (int t = 0; t < T; t++) acc[n][t] += key[t] * q[n * dim + d + j];
    }
  }
  for (int n = 0; n < N; n++)
    for (int t = 0; t < T; t++) store(scores + n * kChunk + t * kLanes, acc[n][t]);
}

// Scores of N queries against `count` tiles from `first` on: [N, kChunk].
template <int N, typename Scalar>
void score_tiles(const CachedTiles<Scalar>& cached, const float* q, int first, int count, int dim, float* scores) {
  auto later = [&](int t) { return cached.k(first + std::min(t, count - 1)); };
  int t = 0;
  for (; t + 1 < count; t += 2) {
    const Scalar* k[2] = {cached.k(first + t), cached.k(first + t + 1)};
    const Scalar* next[4] = {cached.v(first + t), cached.v(first + t + 1), later(t + 2), later(t + 3)};
    dot_tiles<N, 2>(q, k, next, dim, scores + t * kLanes);
  }
  if (t < count) {
    const Scalar* k[1] = {cached.k(first + t)};
    const Scalar* next[2] = {cached.v(first + t), cached.k(first + t)};
    dot_tiles<N, 1>(q, k, next, dim, scores + t * kLanes);
  }
}

// Values weighted by [N, kChunk]: sums[n], [dim] each, which go on from where they are if there are `more`. The values of
// the i-th 16 positions are at tile(i).
template <int N, typename Tile>
void weigh_tiles(const Tile& tile, int count, const float* weights, int dim, bool more, float* sums) {
  constexpr int kOf = kGroup<std::remove_cv_t<std::remove_pointer_t<decltype(tile(0))>>>;
  for (int d = 0; d < dim; d += 2 * kLanes) {
    const bool wide = d + kLanes < dim;
    vf acc[N][2];
    for (int n = 0; n < N; n++) {
      acc[n][0] = more ? load(sums + n * dim + d) : splat(0.f);
      acc[n][1] = more && wide ? load(sums + n * dim + d + kLanes) : splat(0.f);
    }
    for (int i = 0; i < count; i++)
      for (int j = 0; j < kLanes; j++) {
        const auto* v = tile(i) + j / kOf * kOf * dim + d * kOf;
        vf left = weights_of(v, j % kOf), right = wide ? weights_of(v + kLanes * kOf, j % kOf) : splat(0.f);
        for (int n = 0; n < N; n++) {
          float p = weights[n * kChunk + i * kLanes + j];
          acc[n][0] += left * p;
          acc[n][1] += right * p;
        }
      }
    for (int n = 0; n < N; n++) {
      store(sums + n * dim + d, acc[n][0]);
      if (wide) store(sums + n * dim + d + kLanes, acc[n][1]);
    }
  }
}

// The two for so many queries.
template <typename Scalar>
struct Arithmetic {
  using Query = float;

  static void score(int queries, const CachedTiles<Scalar>& cached, const float* q, int first, int count, int dim,
                    float* scores) {
    with_known(queries, [&](auto n) { score_tiles<n>(cached, q, first, count, dim, scores); });
  }
  template <typename Tile>
  static void weigh(int queries, const Tile& tile, int count, const float* weights, int dim, bool more, float* sums) {
    with_known(queries, [&](auto n) { weigh_tiles<n>(tile, count, weights, dim, more, sums); });
  }
  static void put_weights(float* to, vf weights) { store(to, weights); }
  static void end() {}

 private:
  // body(n) where n is known to the compiler.
  template <int Known = 1, typename Body>
  static void with_known(int n, const Body& body) {
    if (n == Known) return body(std::integral_constant<int, Known>());
    if constexpr (Known < kMaxQueries<Scalar>) with_known<Known + 1>(n, body);
  }
};

#ifdef USE_AMX
// On AMX, which takes groups of keys and values as they lie.
template <>
struct Arithmetic<uint16_t> {
  using Query = uint16_t;

  // Tiles 0 to 3 are sums of 16 positions each, 4 and 5 have 32 and 16 dims of the queries, 6 and 7 of the keys.
  static void score(int queries, const CachedTiles<uint16_t>& cached, const uint16_t* q, int first, int count, int dim,
                    float* scores) {
    static const std::vector<AmxConfig> configs = all_configs([](AmxConfig& config) {
      config.row_bytes[5] = kAmxInputs;
      config.rows[7] = kLanes / 2;
    });
    _tile_loadconfig(&configs[queries]);
    const int stride = dim * sizeof(uint16_t), whole = dim / kAmxInputs * kAmxInputs;
    for (int t = 0; t < count; t += 4) {
      const int some = std::min(4, count - t);
      const uint16_t* k[4];
      for (int i = 0; i < some; i++) {
        const int later = std::min(t + i + 4, count - 1);
        const uint16_t *v = cached.v(first + t + i), *next = cached.k(first + later);
        k[i] = cached.k(first + t + i);
        for (int d = 0; d < dim; d += 2) {
          __builtin_prefetch(v + d * kLanes);
          __builtin_prefetch(next + d * kLanes);
        }
      }
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int d = 0; d < whole; d += kAmxInputs) {
        _tile_loadd(4, q + d, stride);
        _tile_loadd(6, k[0] + d * kLanes, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (some > 1) {
          _tile_loadd(6, k[1] + d * kLanes, 64);
          _tile_dpbf16ps(1, 4, 6);
        }
        if (some > 2) {
          _tile_loadd(6, k[2] + d * kLanes, 64);
          _tile_dpbf16ps(2, 4, 6);
        }
        if (some > 3) {
          _tile_loadd(6, k[3] + d * kLanes, 64);
          _tile_dpbf16ps(3, 4, 6);
        }
      }
      if (whole < dim) {
        _tile_loadd(5, q + whole, stride);
        _tile_loadd(7, k[0] + whole * kLanes, 64);
        _tile_dpbf16ps(0, 5, 7);
        if (some > 1) {
          _tile_loadd(7, k[1] + whole * kLanes, 64);
          _tile_dpbf16ps(1, 5, 7);
        }
        if (some > 2) {
          _tile_loadd(7, k[2] + whole * kLanes, 64);
          _tile_dpbf16ps(2, 5, 7);
        }
        if (some > 3) {
          _tile_loadd(7, k[3] + whole * kLanes, 64);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
      float* to = scores + t * kLanes;
      constexpr int kStride = kChunk * sizeof(float);
      _tile_stored(0, to, kStride);
      if (some > 1) _tile_stored(1, to + kLanes, kStride);
      if (some > 2) _tile_stored(2, to + 2 * kLanes, kStride);
      if (some > 3) _tile_stored(3, to + 3 * kLanes, kStride);
    }
  }

  // Tiles 0 to 3 are sums of 16 dims each, 4 and 5 the two parts of the weights of 16 positions, 6 and 7 values.
  template <typename Tile>
  static void weigh(int queries, const Tile& tile, int count, const float* weights, int dim, bool more, float* sums) {
    static const std::vector<AmxConfig> configs = all_configs([](AmxConfig& config) {
      config.row_bytes[4] = config.row_bytes[5] = kAmxInputs;
      config.rows[6] = config.rows[7] = kLanes / 2;
    });
    _tile_loadconfig(&configs[queries]);
    const int stride = dim * sizeof(float);
    for (int d = 0; d < dim; d += 4 * kLanes) {
      const int some = std::min(4, (dim - d) / kLanes);
      float* to = sums + d;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (more) {
        _tile_loadd(0, to, stride);
        if (some > 1) _tile_loadd(1, to + kLanes, stride);
        if (some > 2) _tile_loadd(2, to + 2 * kLanes, stride);
        if (some > 3) _tile_loadd(3, to + 3 * kLanes, stride);
      }
      for (int i = 0; i < count; i++) {
        const uint16_t *v = tile(i) + 2 * d, *p = reinterpret_cast<const uint16_t*>(weights + i * kLanes);
        _tile_loadd(4, p, kChunk * sizeof(float));
        _tile_loadd(5, p + kLanes, kChunk * sizeof(float));
        _tile_loadd(6, v, stride);
        _tile_dpbf16ps(0, 4, 6);
        if (some > 1) {
          _tile_loadd(7, v + 2 * kLanes, stride);
          _tile_dpbf16ps(1, 4, 7);
        }
        _tile_dpbf16ps(0, 5, 6);
        if (some > 1) _tile_dpbf16ps(1, 5, 7);
        if (some > 2) {
          _tile_loadd(6, v + 4 * kLanes, stride);
          _tile_dpbf16ps(2, 4, 6);
          if (some > 3) {
            _tile_loadd(7, v + 6 * kLanes, stride);
            _tile_dpbf16ps(3, 4, 7);
          }
          _tile_dpbf16ps(2, 5, 6);
          if (some > 3) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, to, stride);
      if (some > 1) _tile_stored(1, to + kLanes, stride);
      if (some > 2) _tile_stored(2, to + 2 * kLanes, stride);
      if (some > 3) _tile_stored(3, to + 3 * kLanes, stride);
    }
  }
  // Once per unit: it takes as long as ten products.
  static void end() { _tile_release(); }
  // In the place of 16 floats what they are rounded to, then what that leaves.
  static void put_weights(float* to, vf weights) {
    auto* parts = reinterpret_cast<uint16_t*>(to);
    weights = select(weights < 1e-30f, splat(0.f), weights);  // or what is left would be denormal, which takes long
    store(parts, weights);
    store(parts + kLanes, weights - round_to(parts, weights));
  }

 private:
  template <typename Change>
  static std::vector<AmxConfig> all_configs(const Change& change) {
    std::vector<AmxConfig> all;
    for (int queries = 0; queries <= kMaxQueries<uint16_t>; queries++) change(all.emplace_back(queries));
    return all;
  }
};
#endif

// Softmax state of a query: the largest score, and the sum of exponentials.
struct Softmax {
  float max = -kInf, sum = 0.f;
};

// A query's scores of `count` tiles, the first at position `begin`, become weights of values: exponentials, and 0 outside
// [lowest, highest].
template <typename Scalar>
Softmax exponentials(float* scores, int begin, int count, int lowest, int highest, float scale) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vf top = splat(-kInf);
  for (int i = 0; i < count; i++) {
    const int first = begin + i * kLanes;
    vf score = load(scores + i * kLanes);
    if (first < lowest || first + kLanes - 1 > highest) {
      score = select((lane + first >= lowest) & (lane + first <= highest), score, splat(-kInf));
      store(scores + i * kLanes, score);
    }
    top = max(top, score);
  }
  Softmax result;
  result.max = max(top) * scale;
  vf total = splat(0.f), shift = splat(result.max == -kInf ? 0.f : result.max);
  for (int i = 0; i < count; i++) {
    vf p = exp(load(scores + i * kLanes) * scale - shift);
    Arithmetic<Scalar>::put_weights(scores + i * kLanes, p);
    total += p;
  }
  result.sum = sum(total);
  return result;
}

// Folds the next chunk into a query's running softmax; chunks come in order of position.
inline void fold(Softmax& state, float* values, const Softmax& chunk, const float* chunk_values, int dim) {
  if (chunk.max == -kInf) return;
  float top = std::max(state.max, chunk.max);
  auto factor = [&](float max) { return max == top ? 1.f : max == -kInf ? 0.f : std::exp(max - top); };
  const float keep = factor(state.max), add = factor(chunk.max);
  state.sum = state.sum * keep + chunk.sum * add;
  for (int d = 0; d < dim; d += kLanes) store(values + d, load(values + d) * keep + load(chunk_values + d) * add);
  state.max = top;
}

// The values of a row's path, tiles of them as the cache has them: zeros behind its end.
template <typename Scalar>
void lay_out_path(Scalar* to, const CachedTiles<Scalar>& cached, const int* slots, int width, int tiles) {
  constexpr int kOf = kGroup<Scalar>;
  const int dim = cached.a.head_dim;
  std::fill_n(to, int64_t(tiles) * dim * kLanes, 0);
  for (int p = 0; p < width && slots[p] >= 0;) {
    const Scalar* from = cached.v_at(slots[p]);
    Scalar* own = to + p / kOf * kOf * dim + p % kOf;
    if (p % kOf == 0 && slots[p] % kOf == 0 && p + kOf <= width && slots[p + kOf - 1] == slots[p] + kOf - 1) {  // as they lie
      std::memcpy(own, from, kOf * dim * sizeof(Scalar));
      p += kOf;
    } else {
      for (int d = 0; d < dim; d++) own[d * kOf] = from[d * kOf];
      p++;
    }
  }
}

template <typename Scalar>
void attend_unit(const AttendArgs& a, const Unit& u, const Paths& paths, const Scalar* qkv, const Scalar* k_cache, const Scalar* v_cache,
                 Scalar* out, int window) {
  using Math = Arithmetic<Scalar>;
  static thread_local std::vector<float> buffer;
  static thread_local std::vector<Scalar> path_buffer;
  static thread_local std::vector<typename Math::Query> query_buffer;
  const int dim = a.head_dim, queries = u.rows * u.heads;
  const int width = (a.num_heads + 2 * a.num_kv_heads) * dim;
  const CachedTiles<Scalar> cached{a, k_cache, v_cache, u};
  for (int tile : paths.tiles) cached.fetch(tile);
  float* values = room(buffer, queries * (2 * dim + 2 * kChunk + paths.width));
  float* chunk_values = values + queries * dim;
  float* scores = chunk_values + queries * dim;
  float* path_scores = scores + queries * kChunk;
  Softmax states[kMaxQueries<Scalar>], chunks[kMaxQueries<Scalar>];
  int lowest[kMaxQueries<Scalar>], highest[kMaxQueries<Scalar>];
  std::fill_n(values, queries * dim, 0.f);
  auto* q = room(query_buffer, queries * dim);
  for (int n = 0; n < queries; n++) {
    int row = u.first_row + n / u.heads;
    const Scalar* from = qkv + int64_t(row) * width + (u.first_head + n % u.heads) * dim;
    for (int d = 0; d < dim; d++) lay(q + n * dim + d, from[d]);
    highest[n] = a.positions[row];
    lowest[n] = window > 0 ? std::max(0, highest[n] - window + 1) : 0;
  }
  const int path_tiles = (paths.width + kLanes - 1) / kLanes, path_size = path_tiles * dim * kLanes;
  Scalar* path_values = room(path_buffer, int64_t(u.rows) * path_size);
  bool is_laid_out = false;  // only when scores of the cache are there: meanwhile what it takes comes
  auto lay_out_paths = [&] {
    is_laid_out = true;
    float* of_tiles = path_scores + queries * paths.width;  // as many as fit
    const int64_t first_row = int64_t(u.first_row - a.row_starts[u.sequence]) * paths.width;
    const int *places = paths.places.data() + first_row, *slots = paths.slots.data() + first_row;
    constexpr int kMost = kChunk / kLanes;
    for (int first = 0; first < int(paths.tiles.size()); first += kMost) {
      const int some = std::min(kMost, int(paths.tiles.size()) - first), least = first * kLanes;
      for (int t = 0; t < some; t++) Math::score(queries, cached, q, paths.tiles[first + t], 1, dim, of_tiles + t * kLanes);
      for (int n = 0; n < queries; n++)
        for (int i = 0; i < paths.width; i++)
          if (const int place = places[n / u.heads * paths.width + i]; place >= least && place < least + kChunk)
            path_scores[n * paths.width + i] = of_tiles[n * kChunk + place - least];
    }
    for (int row = 0; row < u.rows; row++)
      lay_out_path(path_values + int64_t(row) * path_size, cached, slots + row * paths.width, paths.width, path_tiles);
  };
  const int least = *std::min_element(lowest, lowest + queries) / kLanes * kLanes;
  const int end = *std::max_element(highest, highest + queries) + 1;
  for (int chunk = least / kChunk * kChunk; chunk < end; chunk += kChunk) {
    const int begin = std::max(chunk, least), first = begin / kLanes;
    const int count = (std::min(chunk + kChunk, end) - begin + kLanes - 1) / kLanes;
    const int shared = std::min(std::max(paths.fork - first, 0), count);
    if (shared) Math::score(queries, cached, q, first, shared, dim, scores);
    const int behind = first + shared - paths.fork;  // tiles of paths in earlier chunks
    if (shared < count && !is_laid_out) lay_out_paths();
    for (int n = 0; n < queries && shared < count; n++)
      std::copy_n(path_scores + n * paths.width + behind * kLanes,
                  std::min((count - shared) * kLanes, paths.width - behind * kLanes), scores + n * kChunk + shared * kLanes);
    for (int n = 0; n < queries; n++)
      chunks[n] = exponentials<Scalar>(scores + n * kChunk, begin, count, lowest[n], highest[n], a.scale);
    if (shared)
      Math::weigh(queries, [&](int i) { return cached.v(first + i); }, shared, scores, dim, false, chunk_values);
    for (int row = 0; row < u.rows && shared < count; row++) {
      const Scalar* own = path_values + int64_t(row) * path_size + behind * dim * kLanes;
      Math::weigh(u.heads, [&](int i) { return own + i * dim * kLanes; }, count - shared,
                  scores + row * u.heads * kChunk + shared * kLanes, dim, shared > 0, chunk_values + row * u.heads * dim);
    }
    for (int n = 0; n < queries; n++) fold(states[n], values + n * dim, chunks[n], chunk_values + n * dim, dim);
  }
  Math::end();
  for (int n = 0; n < queries; n++) {
    Scalar* to = out + (int64_t(u.first_row + n / u.heads) * a.num_heads + u.first_head + n % u.heads) * dim;
    float inverse = 1.f / states[n].sum;
    for (int d = 0; d < dim; d += kLanes) store(to + d, load(values + n * dim + d) * inverse);
  }
}

// What the rows of a pass need in every layer.
struct Plan {
  std::vector<Unit> units;
  std::vector<Paths> paths;  // of each sequence

  Plan(const AttendArgs& a, int max_queries) {
    const int group = a.num_heads / a.num_kv_heads;
    for (int s = 0; s < a.sequences; s++) {
      paths.emplace_back(a, s);
      const int rows = a.row_starts[s + 1] - a.row_starts[s], most = std::max(1, max_queries / group);
      const int tiles = (rows + most - 1) / most, tile_rows = tiles ? (rows + tiles - 1) / tiles : 1;
      for (int h = 0; h < a.num_kv_heads; h++)  // one after the other, so that one thread fetches its keys
        for (int row = a.row_starts[s]; row < a.row_starts[s + 1]; row += tile_rows)
          for (int g = 0; g < group; g += max_queries)
            units.push_back({s, h, row, std::min(tile_rows, a.row_starts[s + 1] - row), h * group + g,
                             std::min(group - g, max_queries)});
    }
  }
};

template <typename Scalar>
void attend(const AttendArgs& a, const Plan& plan, const Scalar* qkv, const Scalar* k_cache, const Scalar* v_cache,
            Scalar* out, int window) {
  Team::instance().run(int(plan.units.size()), [&](int i) {
    const Unit& u = plan.units[i];
    attend_unit(a, u, plan.paths[u.sequence], qkv, k_cache, v_cache, out, window);
  });
}

// --------------------------------------------------------------------------------------------- layers

struct LayerArgs {
  const void *input_norm, *q_norm, *k_norm, *post_norm;  // weights; those of q and k may be null
  const LinearArgs *qkv, *out, *gate_up, *down;
  void *k_cache, *v_cache;
  int32_t window;
};

// Decoder layers one after the other, of the operations above: `residual` is then behind the last, and x its norm.
template <typename Scalar>
void decoder_layers(Scalar* x, Scalar* residual, const RopeArgs& rope, const AttendArgs& attention,
                    const LayerArgs* layers, int count, const Scalar* last_norm, float eps) {
  static thread_local std::vector<Scalar> buffer;
  const Plan plan(attention, kMaxQueries<Scalar>);
  const int64_t rows = rope.rows;
  const int width = layers->out->outputs;
  auto norm = [](const void* weight) { return static_cast<const Scalar*>(weight); };
  rms_norm<Scalar>(x, residual, nullptr, nullptr, norm(layers->input_norm), eps, rows, width);
  for (const LayerArgs* a = layers; a < layers + count; a++) {
    Scalar* heads = room(buffer, rows * (a->qkv->outputs + a->out->inputs + width + a->gate_up->outputs + a->down->inputs));
    Scalar* mixed = heads + rows * a->qkv->outputs;
    Scalar* change = mixed + rows * a->out->inputs;
    Scalar* gates = change + rows * width;
    Scalar* gated = gates + rows * a->gate_up->outputs;
    Scalar *keys = static_cast<Scalar*>(a->k_cache), *values = static_cast<Scalar*>(a->v_cache);
    linear(heads, x, *a->qkv, rows);
    rope_and_cache(rope, heads, keys, values, norm(a->q_norm), norm(a->k_norm));
    attend<Scalar>(attention, plan, heads, keys, values, mixed, a->window);
    linear(change, mixed, *a->out, rows);
    rms_norm<Scalar>(x, residual, change, residual, norm(a->post_norm), eps, rows, width);
    gated_linear(gated, gates, x, *a->gate_up, rows);
    linear(change, gated, *a->down, rows);
    const Scalar* next_norm = a + 1 < layers + count ? norm(a[1].input_norm) : last_norm;
    rms_norm<Scalar>(x, residual, change, residual, next_norm, eps, rows, width);
  }
}

// ------------------------------------------------------------------------------------------- sampling

// A token's place in its row: by logit, equal ones by id.
struct Ranked {
  float logit;
  int32_t id;
  bool operator<(const Ranked& other) const { return logit > other.logit || (logit == other.logit && id < other.id); }
};

// The worst token that top-k, top-p and min-p leave; everything ranked after it is to go.
Ranked last_kept(const float* logits, int vocab, int64_t top_k, float top_p, float min_p) {
  std::vector<Ranked> kept;
  float top = *std::max_element(logits, logits + vocab);
  for (int i = 0; i < vocab; i++)
    if (logits[i] > -kInf) kept.push_back({logits[i], i});
  if (top_k > 0 && size_t(top_k) < kept.size()) {
    std::nth_element(kept.begin(), kept.begin() + top_k, kept.end());
    kept.resize(top_k);
  }
  if (top_p < 1.f) {
    double total = 0;
    for (const Ranked& t : kept) total += std::exp(double(t.logit) - top);
    // Tokens below (1 - top_p) / n of the mass have less than 1 - top_p together: none is in the nucleus.
    float floor = top + float(std::log((1. - top_p) * total / kept.size()));
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const Ranked& t) { return t.logit < floor && t.logit < top; }),
               kept.end());
    std::sort(kept.begin(), kept.end());
    double mass = 0;
    size_t n = 0;
    while (n < kept.size() && mass < top_p * total) mass += std::exp(double(kept[n++].logit) - top);
    kept.resize(std::max<size_t>(n, 1));
  }
  Ranked last = *std::max_element(kept.begin(), kept.end());
  if (min_p > 0.f) {
    float floor = top + std::log(min_p);
    Ranked best = *std::min_element(kept.begin(), kept.end());
    last = best;
    for (const Ranked& t : kept)
      if (t.logit >= floor && last < t) last = t;
  }
  return last;
}

// Finalises a 64-bit state into well mixed bits (splitmix64).
inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// Gumbel noise of 16 tokens from the row's key; reference_sampling.py states the function.
inline vf gumbel(vu token, uint32_t lo, uint32_t hi) {
  vu x = (token * 0x9E3779B9u) ^ lo;
  x ^= x >> 16;
  x *= 0x21F0AAADu;
  x ^= x >> 15;
  x += hi;
  x *= 0x735A2D97u;
  x ^= x >> 15;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  vf v = (__builtin_convertvector(x >> 8, vf) + __builtin_convertvector(x & 0xFF, vf) * 0x1p-8f + 0x1p-9f) * 0x1p-24f;
  // -log1p(-v): where 1 - v rounds, the lost part is made up for by v / (1 - w) (Kahan).
  vf w = 1.f - v;
  vf exponential = select(w == 1.f, v, log(w) * v / (w - 1.f));
  return -log(exponential);
}

// body(logits, first token) for a row by vectors, filled up with -inf.
template <typename Scalar, typename Body>
void for_vectors(const Scalar* logits, int vocab, const Body& body) {
  int i = 0;
  for (; i + kLanes <= vocab; i += kLanes) body(load(logits + i), i);
  if (i == vocab) return;
  vf rest = splat(-kInf);
  for (int j = 0; i + j < vocab; j++) rest[j] = widen(logits[i + j]);
  body(rest, i);
}

template <typename Scalar>
int64_t noisy_argmax_row(const Scalar* logits, int vocab, uint64_t key, bool noisy) {
  const uint32_t lo = uint32_t(key), hi = uint32_t(key >> 32);
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vf best = splat(-kInf);
  vi where = lane;
  for_vectors(logits, vocab, [&](vf value, int first) {
    vi id = lane + first;
    if (noisy) value += gumbel(bits<vu>(id), lo, hi);
    vi better = value > best;
    best = select(better, value, best);
    where = (better & id) | (~better & where);
  });
  int winner = 0;
  for (int j = 1; j < kLanes; j++)
    if (best[j] > best[winner] || (best[j] == best[winner] && where[j] < where[winner])) winner = j;
  return where[winner];
}

inline uint64_t noise_key(int64_t seed, int64_t position) {
  return mix(uint64_t(seed) + 0x9E3779B97F4A7C15ull * (uint64_t(position) + 1));
}

template <typename Scalar>
void noisy_argmax(int64_t* out, const Scalar* logits, const int64_t* seeds, const int64_t* positions, const uint8_t* noisy,
                  int rows, int vocab) {
  for_rows(rows, vocab, [&](int r) {
    out[r] = noisy_argmax_row(logits + int64_t(r) * vocab, vocab, noise_key(seeds[r], positions[r]), noisy[r]);
  });
}

// The `number` best tokens of a row, and their probabilities without noise. Where fewer are possible, token 0 with
// probability 0 stands for the rest.
template <typename Scalar>
void noisy_topk_row(int64_t* ids, float* probs, const Scalar* logits, int vocab, uint64_t key, bool noisy, int number) {
  const uint32_t lo = uint32_t(key), hi = uint32_t(key >> 32);
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  std::vector<Ranked> best(number, Ranked{-kInf, 0});
  vf highest = splat(-kInf);
  for_vectors(logits, vocab, [&](vf logit, int first) {
    highest = max(highest, logit);
    vf value = noisy ? logit + gumbel(bits<vu>(lane + first), lo, hi) : logit;
    if (!any(value > best.back().logit)) return;
    for (int j = 0; j < kLanes; j++) {
      if (!(value[j] > best.back().logit)) continue;
      const Ranked token{value[j], first + j};
      const auto place = std::upper_bound(best.begin(), best.end(), token);
      std::move_backward(place, best.end() - 1, best.end());
      *place = token;
    }
  });
  const float top = max(highest);
  vf total = splat(0.f);
  for_vectors(logits, vocab, [&](vf logit, int) { total += exp(logit - top); });
  const float scale = 1.f / sum(total);
  for (int n = 0; n < number; n++) {
    ids[n] = best[n].id;
    probs[n] = best[n].logit == -kInf ? 0.f : std::exp(widen(logits[best[n].id]) - top) * scale;
  }
}

template <typename Scalar>
void noisy_topk(int64_t* ids, float* probs, const Scalar* logits, const int64_t* seeds, const int64_t* positions,
                const uint8_t* noisy, int rows, int vocab, int number) {
  for_rows(rows, vocab, [&](int r) {
    noisy_topk_row(ids + int64_t(r) * number, probs + int64_t(r) * number, logits + int64_t(r) * vocab, vocab,
                   noise_key(seeds[r], positions[r]), noisy[r], number);
  });
}

// -------------------------------------------------------------------------------------------- streams

// `Kernels` in base.py says what these compute. Rows are short and few, so all of them take less than a call of torch.

constexpr float kLeastQ = 1e-6f;

template <typename A, typename B>
float dot(const A* a, const B* b, int n) {
  vf acc = splat(0.f);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) acc += load(a + i) * load(b + i);
  float total = sum(acc);
  for (; i < n; i++) total += widen(a[i]) * widen(b[i]);
  return total;
}

// to += factor * x
template <typename Scalar>
void add_times(float* to, float factor, const Scalar* x, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + factor * load(x + i));
  for (; i < n; i++) to[i] += factor * widen(x[i]);
}

// out = silu(a + b)
void silu_sum(float* out, const float* a, const float* b, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf x = load(a + i) + load(b + i);
    store(out + i, x / (1.f + exp(-x)));
  }
  for (; i < n; i++) out[i] = (a[i] + b[i]) / (1.f + std::exp(-a[i] - b[i]));
}

// out[r] = weight[r] . x / rms(x)
template <typename Scalar>
void of_unit(float* out, const Scalar* weight, const Scalar* x, float eps, int hidden, int rank) {
  const float scale = 1.f / std::sqrt(dot(x, x, hidden) / hidden + eps);
  for (int r = 0; r < rank; r++) out[r] = scale * dot(x, weight + int64_t(r) * hidden, hidden);
}

template <typename Scalar>
void start_streams(Scalar* out, const Scalar* residual, const int64_t* sources, const int64_t* rows,
                   const Scalar* embeddings, int count, int num_streams, int streams, int hidden) {
  for (int n = 0; n < count; n++)
    std::memcpy(out + int64_t(n) * hidden, residual + sources[n] * hidden, hidden * sizeof(Scalar));
  for (int n = 0; n < num_streams; n++) {
    Scalar* to = out + rows[n] * hidden;
    const Scalar* added = embeddings + int64_t(n % streams) * hidden;
    for (int i = 0; i < hidden; i++) put(to + i, widen(to[i]) + widen(added[i]));
  }
}

template <typename Scalar>
void change_first(float* units, Scalar* said, const Scalar* embeddings, const Scalar* of_said, const Scalar* of_before,
                  const Scalar* up, float eps, int anchors, int streams, int hidden, int rank) {
  for_rows(anchors * streams, 4 * rank * hidden / kLanes, [&](int row) {
    Scalar* own = said + int64_t(row) * hidden;
    float* own_unit = units + int64_t(row) * rank;
    of_unit(own_unit, of_said, own, eps, hidden, rank);
    if (row % streams) return;
    std::vector<float> unit(rank), added(hidden);
    of_unit(unit.data(), of_before, embeddings + int64_t(row / streams) * hidden, eps, hidden, rank);
    silu_sum(unit.data(), unit.data(), own_unit, rank);
    for (int r = 0; r < rank; r++) add_times(added.data(), unit[r], up + int64_t(r) * hidden, hidden);
    for (int i = 0; i < hidden; i++) put(own + i, widen(own[i]) + added[i]);
  });
}

// The `number` largest of `chances`, the first of equal ones first.
void take_best(int64_t* index, float* best, const float* chances, int tokens, int number) {
  int found = 0;
  for (int t = 0; t < tokens; t++) {
    int place = found;
    while (place > 0 && chances[t] > best[place - 1]) place--;
    if (place == number) continue;
    found = std::min(found + 1, number);
    for (int n = found - 1; n > place; n--) best[n] = best[n - 1], index[n] = index[n - 1];
    best[place] = chances[t], index[place] = t;
  }
}

void likeliest_behind_row(int64_t* index, float* best, const float* unit, const int64_t* before, const int64_t* places,
                          const float* probs, float temperature, const float* befores, const float* afters, int rank,
                          int tokens, int number) {
  float given = 0.f;
  for (int t = 0; t < tokens; t++) given += probs[t];
  const float rest = std::log(std::max(1.f - given, 0.f));  // of tokens that are not considered
  std::vector<float> likely(tokens), chances(tokens), units(rank);
  for (int t = 0; t < tokens; t++) likely[t] = std::log(probs[t]);
  for (int b = 0; b < tokens; b++) {
    silu_sum(units.data(), unit, befores + std::max<int64_t>(before[b], 0) * rank, rank);
    float top = rest, total = 0.f;
    for (int t = 0; t < tokens; t++) {
      chances[t] = likely[t] + dot(units.data(), afters + std::max<int64_t>(places[t], 0) * rank, rank) / temperature;
      top = std::max(top, chances[t]);
    }
    for (int t = 0; t < tokens; t++) total += chances[t] = std::exp(chances[t] - top);
    const float scale = 1.f / (total + std::exp(rest - top));
    for (int t = 0; t < tokens; t++) chances[t] *= scale;
    take_best(index + b * number, best + b * number, chances.data(), tokens, number);
  }
}

template <typename Scalar>
void exit_probs(float* out, const Scalar* x, const Scalar* head, const int64_t* rows, const int64_t* token_ids,
                const float* q, const float* down, const float* up, const float* bias, const float* scalars, int count,
                int hidden, int rank) {
  for_rows(count, (2 * rank + 3) * hidden / kLanes, [&](int n) {
    const Scalar* row = x + rows[n] * hidden;
    std::vector<float> h(hidden), weight(bias, bias + hidden);
    for (int i = 0; i < hidden; i++) h[i] = widen(row[i]);
    for (int64_t r = 0; r < rank * hidden; r += hidden) add_times(h.data(), dot(row, down + r, hidden), up + r, hidden);
    add_times(weight.data(), scalars[1], head + token_ids[n] * hidden, hidden);
    const float logit = scalars[0] * std::log(std::max(q[n], kLeastQ)) + dot(h.data(), weight.data(), hidden) + scalars[2];
    out[n] = 1.f / (1.f + std::exp(-logit));
  });
}

void likeliest_behind(int64_t* index, float* chances, const float* units, const int64_t* places, const float* probs,
                      const float* temperature, const float* befores, const float* afters, int anchors, int streams,
                      int rank, int tokens, int number) {
  for_rows(anchors * streams, tokens * (tokens + 2) * rank, [&](int row) {
    const int64_t from = int64_t(row) * tokens, to = from * number;
    if (row % streams)
      return likeliest_behind_row(index + to, chances + to, units + int64_t(row) * rank, places + from - tokens, places + from,
                                  probs + from, temperature[row / streams], befores, afters, rank, tokens, number);
    for (int64_t place = to; place < to + tokens * number; place += number)
      take_best(index + place, chances + place, probs + from, tokens, number);
  });
}

// What a token before changes in what streams say, as `TokenChange` of base.py has it.
struct ChangeArgs {
  const void *said, *before, *up;
  const float *befores, *afters;
  int32_t hidden, rank;
  float eps;
};

template <typename Scalar>
void change_first(float* units, Scalar* said, const Scalar* embeddings, const ChangeArgs& a, int anchors, int streams) {
  change_first(units, said, embeddings, static_cast<const Scalar*>(a.said), static_cast<const Scalar*>(a.before),
               static_cast<const Scalar*>(a.up), a.eps, anchors, streams, a.hidden, a.rank);
}

// All between what streams said and the candidates: `number` of each stream, the `most` likeliest behind each of them.
template <typename Scalar>
void stream_candidates(int64_t* places, int64_t* index, float* chances, const Scalar* hidden, const int64_t* anchors,
                       const Scalar* embedding, const int64_t* before, const ChangeArgs& a, const LinearArgs& head, int count,
                       int streams, int number, int most) {
  static thread_local std::vector<Scalar> buffer;
  const int rows = count * streams, vocab = head.outputs;
  const int64_t row = a.hidden;
  Scalar* said = room(buffer, (rows + count) * row + int64_t(rows) * vocab);
  Scalar *embeddings = said + rows * row, *logits = embeddings + count * row;
  for (int n = 0; n < count; n++) {
    std::memcpy(said + n * streams * row, hidden + anchors[n] * streams * row, streams * row * sizeof(Scalar));
    std::memcpy(embeddings + n * row, embedding + before[n] * row, row * sizeof(Scalar));
  }
  std::vector<float> units(rows * a.rank), probs(rows * number), temperature(count, 1.f);
  change_first(units.data(), said, embeddings, a, count, streams);
  linear<Scalar>(logits, said, head, rows);
  const std::vector<int64_t> nothing(rows);
  const std::vector<uint8_t> noisy(rows);
  noisy_topk(places, probs.data(), logits, nothing.data(), nothing.data(), noisy.data(), rows, vocab, number);
  likeliest_behind(index, chances, units.data(), places, probs.data(), temperature.data(), a.befores, a.afters, count, streams,
                   a.rank, number, most);
}

}  // namespace

extern "C" void likeliest_behind(int64_t* index, float* chances, const float* units, const int64_t* places,
                                 const float* probs, const float* temperature, const ChangeArgs* args, int anchors,
                                 int streams, int tokens, int number) {
  likeliest_behind(index, chances, units, places, probs, temperature, args->befores, args->afters, anchors, streams, args->rank,
                   tokens, number);
}

extern "C" void filter_logits(float* logits, const int64_t* top_k, const float* top_p, const float* min_p, int rows,
                              int vocab) {
  for_rows(rows, vocab, [&](int r) {
    if (top_k[r] <= 0 && top_p[r] >= 1.f && min_p[r] <= 0.f) return;
    float* row = logits + int64_t(r) * vocab;
    Ranked last = last_kept(row, vocab, top_k[r], top_p[r], min_p[r]);
    for (int i = 0; i < vocab; i++)
      if (last < Ranked{row[i], i}) row[i] = -kInf;
  });
}

extern "C" void set_num_threads(int threads) { Team::instance().resize(threads); }

// Rows that share a tile of a linear layer at most, and what its inputs are padded to a multiple of.
extern "C" int tile_rows_f32() { return kTileRows; }
extern "C" int tile_inputs_f32() { return 1; }
#ifdef USE_AMX
extern "C" int tile_rows_bf16() { return kAmxRows; }
extern "C" int tile_inputs_bf16() { return kAmxInputs; }
#else
extern "C" int tile_rows_bf16() { return kTileRows; }
extern "C" int tile_inputs_bf16() { return 1; }
#endif

// Has malloc keep what is freed. The tensors of a pass take megabytes, and other sizes whenever the number of rows
// changes: given back each time, their pages would be zeroed anew in every step.
extern "C" void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest it takes
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
  mallopt(M_TOP_PAD, 64 << 20);  // so that a thread's heap is not unmapped when it is empty
#endif
}

// Every entry point comes twice: _f32 and _bf16.
#define EXPORT(suffix, Scalar)                                                                                          \
  extern "C" void linear_##suffix(Scalar* out, const Scalar* x, const LinearArgs* args, int rows) {                     \
    linear<Scalar>(out, x, *args, rows);                                                                                \
  }                                                                                                                     \
  extern "C" void rms_norm_##suffix(Scalar* out, const Scalar* x, const Scalar* weight, float eps, int rows,             \
                                    int width) {                                                                         \
    rms_norm<Scalar>(out, x, nullptr, nullptr, weight, eps, rows, width);                                                \
  }                                                                                                                     \
  extern "C" void add_rms_norm_##suffix(Scalar* out, const Scalar* delta, Scalar* residual, const Scalar* weight,        \
                                        float eps, int rows, int width) {                                                \
    rms_norm<Scalar>(out, residual, delta, residual, weight, eps, rows, width);                                          \
  }                                                                                                                     \
  extern "C" void rope_and_cache_##suffix(const RopeArgs* args, Scalar* qkv, Scalar* k_cache, Scalar* v_cache,           \
                                          const Scalar* q_norm, const Scalar* k_norm) {                                  \
    rope_and_cache<Scalar>(*args, qkv, k_cache, v_cache, q_norm, k_norm);                                                \
  }                                                                                                                     \
  extern "C" void move_slots_##suffix(Scalar* keys, Scalar* values, const int64_t* moves, int count, int layers,        \
                                        int64_t blocks, int kv_heads, int dim) {                                        \
    move_slots<Scalar>(keys, values, moves, count, layers, blocks, kv_heads, dim);                                      \
  }                                                                                                                     \
  extern "C" void attend_##suffix(const AttendArgs* args, const Scalar* qkv, const Scalar* k_cache,                      \
                                  const Scalar* v_cache, Scalar* out, int window) {                                      \
    attend<Scalar>(*args, Plan(*args, kMaxQueries<Scalar>), qkv, k_cache, v_cache, out, window);                                                           \
  }                                                                                                                     \
  extern "C" void silu_mul_##suffix(Scalar* out, const Scalar* gate_up, int rows, int width) {                           \
    silu_mul<Scalar>(out, gate_up, rows, width);                                                                         \
  }                                                                                                                     \
  extern "C" void decoder_layers_##suffix(Scalar* x, Scalar* residual, const RopeArgs* rope, const AttendArgs* attention, \
                                          const LayerArgs* layers, int count, const Scalar* last_norm, float eps) {      \
    decoder_layers<Scalar>(x, residual, *rope, *attention, layers, count, last_norm, eps);                              \
  }                                                                                                                     \
  extern "C" void noisy_argmax_##suffix(int64_t* out, const Scalar* logits, const int64_t* seeds,                        \
                                        const int64_t* positions, const uint8_t* noisy, int rows, int vocab) {           \
    noisy_argmax<Scalar>(out, logits, seeds, positions, noisy, rows, vocab);                                             \
  }                                                                                                                     \
  extern "C" void noisy_topk_##suffix(int64_t* ids, float* probs, const Scalar* logits, const int64_t* seeds,           \
                                      const int64_t* positions, const uint8_t* noisy, int rows, int vocab,              \
                                      int number) {                                                                     \
    noisy_topk<Scalar>(ids, probs, logits, seeds, positions, noisy, rows, vocab, number);                               \
  }                                                                                                                     \
  extern "C" void start_streams_##suffix(Scalar* out, const Scalar* residual, const int64_t* sources,                    \
                                         const int64_t* rows, const Scalar* embeddings, int count, int num_streams,     \
                                         int streams, int hidden) {                                                     \
    start_streams<Scalar>(out, residual, sources, rows, embeddings, count, num_streams, streams, hidden);               \
  }                                                                                                                     \
  extern "C" void change_first_##suffix(float* units, Scalar* said, const Scalar* embeddings, const ChangeArgs* args,   \
                                          int anchors, int streams) {                                                   \
    change_first<Scalar>(units, said, embeddings, *args, anchors, streams);                                             \
  }                                                                                                                     \
  extern "C" void stream_candidates_##suffix(int64_t* places, int64_t* index, float* chances, const Scalar* hidden,     \
                                               const int64_t* anchors, const Scalar* embedding, const int64_t* before,  \
                                               const ChangeArgs* args, const LinearArgs* head, int count, int streams,  \
                                               int number, int most) {                                                  \
    stream_candidates<Scalar>(places, index, chances, hidden, anchors, embedding, before, *args, *head, count, streams, \
                              number, most);                                                                            \
  }                                                                                                                     \
  extern "C" void exit_probs_##suffix(float* out, const Scalar* x, const Scalar* head, const int64_t* rows,             \
                                      const int64_t* token_ids, const float* q, const float* down, const float* up,     \
                                      const float* bias, const float* scalars, int count, int hidden, int rank) {       \
    exit_probs<Scalar>(out, x, head, rows, token_ids, q, down, up, bias, scalars, count, hidden, rank);                 \
  }

EXPORT(f32, float)
EXPORT(bf16, uint16_t)
