// Sixteen numbers side by side, of which narrower registers take several: a compiler keeps vectors that are wider than its
// registers in memory. The order of additions is the same everywhere. Included by operations-inl.h, inside its namespaces.

#if defined(__AVX512F__)

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Whole __attribute__((vector_size(64)));

QUERN_INLINE Lanes load(const float* p) {
  Lanes v;
  memcpy(&v, p, sizeof v);
  return v;
}
QUERN_INLINE void store(float* p, Lanes v) { memcpy(p, &v, sizeof v); }
QUERN_INLINE Whole load_whole(const int32_t* p) {
  Whole v;
  memcpy(&v, p, sizeof v);
  return v;
}
QUERN_INLINE Lanes spread(float x) { return x - Lanes{}; }  // unlike 0 + x this is x to the compiler too
template <typename Mask, typename T>
QUERN_INLINE T choose(Mask mask, T a, T b) {
  return mask ? a : b;
}
QUERN_INLINE Whole bits_of(Lanes v) { return reinterpret_cast<Whole>(v); }
QUERN_INLINE Lanes lanes_of(Whole v) { return reinterpret_cast<Lanes>(v); }

#else

template <typename T>
struct Pair {
  T low, high;
};

#if defined(__AVX2__)
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
typedef Pair<Floats> Lanes;
typedef Pair<Integers> Whole;
#else
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
typedef Pair<Pair<Floats>> Lanes;
typedef Pair<Pair<Integers>> Whole;
#endif

#define QUERN_BINARY(SIGN)                                                          \
  template <typename T>                                                             \
  QUERN_INLINE auto operator SIGN(const Pair<T>& a, const Pair<T>& b) {             \
    return Pair<decltype(a.low SIGN b.low)>{a.low SIGN b.low, a.high SIGN b.high};  \
  }                                                                                 \
  template <typename T>                                                             \
  QUERN_INLINE auto operator SIGN(const Pair<T>& a, float b) {                      \
    return Pair<decltype(a.low SIGN b)>{a.low SIGN b, a.high SIGN b};               \
  }                                                                                 \
  template <typename T>                                                             \
  QUERN_INLINE auto operator SIGN(float a, const Pair<T>& b) {                      \
    return Pair<decltype(a SIGN b.low)>{a SIGN b.low, a SIGN b.high};               \
  }
QUERN_BINARY(+)
QUERN_BINARY(-)
QUERN_BINARY(*)
QUERN_BINARY(/)
QUERN_BINARY(<)
QUERN_BINARY(>)
#undef QUERN_BINARY

#define QUERN_WHOLE(SIGN)                                                \
  template <typename T>                                                  \
  QUERN_INLINE Pair<T> operator SIGN(const Pair<T>& a, int32_t b) {      \
    return {a.low SIGN b, a.high SIGN b};                                \
  }
QUERN_WHOLE(<<)
QUERN_WHOLE(<)
QUERN_WHOLE(<=)
QUERN_WHOLE(>=)
#undef QUERN_WHOLE

template <typename T>
QUERN_INLINE Pair<T> operator&(const Pair<T>& a, const Pair<T>& b) {
  return {a.low & b.low, a.high & b.high};
}
template <typename T>
QUERN_INLINE Pair<T> operator-(const Pair<T>& a) {
  return {-a.low, -a.high};
}
template <typename T>
QUERN_INLINE void operator+=(Pair<T>& a, const Pair<T>& b) {
  a = a + b;
}

template <typename T>
QUERN_INLINE void get(T& v, const void* p) {
  memcpy(&v, p, sizeof v);
}
template <typename T>
QUERN_INLINE void get(Pair<T>& v, const void* p) {
  get(v.low, p);
  get(v.high, static_cast<const char*>(p) + sizeof v.low);
}
template <typename T>
QUERN_INLINE void put(void* p, const T& v) {
  memcpy(p, &v, sizeof v);
}
template <typename T>
QUERN_INLINE void put(void* p, const Pair<T>& v) {
  put(p, v.low);
  put(static_cast<char*>(p) + sizeof v.low, v.high);
}
template <typename T>
QUERN_INLINE void fill(T& v, float x) {
  v = x - T{};
}
template <typename T>
QUERN_INLINE void fill(Pair<T>& v, float x) {
  fill(v.low, x);
  v.high = v.low;
}

QUERN_INLINE Lanes load(const float* p) {
  Lanes v;
  get(v, p);
  return v;
}
QUERN_INLINE void store(float* p, const Lanes& v) { put(p, v); }
QUERN_INLINE Whole load_whole(const int32_t* p) {
  Whole v;
  get(v, p);
  return v;
}
QUERN_INLINE Lanes spread(float x) {
  Lanes v;
  fill(v, x);
  return v;
}

QUERN_INLINE Floats choose(Integers mask, Floats a, Floats b) { return mask ? a : b; }
template <typename Mask, typename T>
QUERN_INLINE Pair<T> choose(const Pair<Mask>& mask, const Pair<T>& a, const Pair<T>& b) {
  return {choose(mask.low, a.low, b.low), choose(mask.high, a.high, b.high)};
}

QUERN_INLINE Integers bits_of(Floats v) { return reinterpret_cast<Integers>(v); }
QUERN_INLINE Floats lanes_of(Integers v) { return reinterpret_cast<Floats>(v); }
template <typename T>
QUERN_INLINE auto bits_of(const Pair<T>& v) {
  return Pair<decltype(bits_of(v.low))>{bits_of(v.low), bits_of(v.high)};
}
template <typename T>
QUERN_INLINE auto lanes_of(const Pair<T>& v) {
  return Pair<decltype(lanes_of(v.low))>{lanes_of(v.low), lanes_of(v.high)};
}

#endif

constexpr int32_t LANES = 16;
static_assert(LANES == BLOCK, "a block of keys is one vector");

QUERN_INLINE Lanes load_some(const float* p, int32_t count) {
  float lane[LANES] = {};
  memcpy(lane, p, sizeof(float) * count);
  return load(lane);
}
QUERN_INLINE void store_some(float* p, const Lanes& v, int32_t count) {
  float lane[LANES];
  store(lane, v);
  memcpy(p, lane, sizeof(float) * count);
}

// a * b + c, rounded once on every instruction set.
QUERN_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#if defined(__AVX512F__)
constexpr int32_t ABREAST = 2, SIDE = 8;  // their product: sums of 16 lanes that registers have room for
QUERN_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
#else
constexpr int32_t ABREAST = 1, SIDE = 4;
#if defined(__FMA__)
QUERN_INLINE Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__ARM_FEATURE_DOTPROD)
QUERN_INLINE Floats fused(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
#else
QUERN_INLINE Floats fused(Floats a, Floats b, Floats c) {
  for (int32_t i = 0; i < 4; ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
}
#endif
template <typename T>
QUERN_INLINE Pair<T> fused(const Pair<T>& a, const Pair<T>& b, const Pair<T>& c) {
  return {fused(a.low, b.low, c.low), fused(a.high, b.high, c.high)};
}
#endif

QUERN_INLINE float sum(const Lanes& v) {
  float lane[LANES];
  store(lane, v);
  for (int32_t width = LANES / 2; width > 0; width /= 2)
    for (int32_t i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

QUERN_INLINE float largest(const Lanes& v) {
  float lane[LANES];
  store(lane, v);
  for (int32_t width = LANES / 2; width > 0; width /= 2)
    for (int32_t i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

QUERN_INLINE float first_of(const Lanes& v) {
  float lane[LANES];
  store(lane, v);
  return lane[0];
}
