// CPU norm kernels: two passes over a row that is then in cache, so memory is read about once. Parameter gradients are
// summed over stretches of rows of fixed number, without atomics: the bits do not depend on the number of threads.
#include "norm.h"

#include <algorithm>
#include <vector>

#include "level.h"
#include "parallel.h"

namespace {

// A sum in one register could not be vectorised, since float additions may not change their order; 16 sums also round
// less than one.
constexpr int LANES = 16;
constexpr int64_t STRETCHES = 64;
constexpr int64_t SMALL = 16384;  // numbers below which waking the other threads costs more than it saves

// Calls body(first, count, channel): with one channel for each number (inner = 1) once for the whole row, with channel
// the first one; otherwise once for each channel's run.
template <class Arguments, class Body>
void runs(const Arguments& s, int64_t row, Body body) {
  const int64_t per = s.D / s.inner, base = (row % s.groups) * per;
  if (s.inner == 1) return body(int64_t(0), s.D, base);
  for (int64_t c = 0; c < per; ++c) body(c * s.inner, s.inner, base + c);
}

template <class T>
struct Lanes {
  T lane[LANES] = {};
  T rest = 0;
  T sum() const {
    T total = rest;
    for (int j = 0; j < LANES; ++j) total += lane[j];
    return total;
  }
};

// Adds term(d) for count numbers, in lanes that the compiler keeps in registers.
template <class T, class... Terms>
void accumulate(int64_t count, Lanes<T>* sums, Terms... terms) {
  int64_t d = 0;
  for (; d + LANES <= count; d += LANES) {
    Lanes<T>* sum = sums;
    (([&](auto& term, Lanes<T>& into) {
       for (int j = 0; j < LANES; ++j) into.lane[j] += term(d + j);
     }(terms, *sum++)),
     ...);
  }
  for (; d < count; ++d) {
    Lanes<T>* sum = sums;
    ((sum->rest += terms(d), ++sum), ...);
  }
}

template <class T, bool VECTOR>
T at(const T* w, int64_t d) {
  return VECTOR ? w[d] : w[0];
}

template <class T, bool VECTOR>
void tangent_row(const NormTangent<T>& s, int64_t row, const T* __restrict__ x, T r, const T* w, const T* dx,
                 const T* dw, const T* db, T* __restrict__ y, T* __restrict__ dxhat, T* along) {
  T mean = 0, a = 0;
  if (dx && s.mode != FIXED) {
    Lanes<T> sums[2];
    accumulate(s.D, sums, [=](int64_t d) { return dx[d]; }, [=](int64_t d) { return x[d] * dx[d]; });
    if (s.mode == CENTRED) mean = sums[0].sum() / T(s.D);
    a = sums[1].sum() / T(s.D);
  }
  if (dx) *along = a;
  runs(s, row, [&](int64_t first, int64_t count, int64_t channel) {
    const T* wc = w ? w + channel : nullptr;
    const T* dwc = dw ? dw + channel : nullptr;
    const T* dbc = db ? db + channel : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t d = first + i;
      T value = 0;
      if (dx) {
        const T moved = r * (dx[d] - mean - x[d] * a);
        dxhat[d] = moved;
        value = wc ? moved * at<T, VECTOR>(wc, i) : moved;
      }
      if (dwc) value += x[d] * at<T, VECTOR>(dwc, i);
      if (dbc) value += at<T, VECTOR>(dbc, i);
      y[d] = value;
    }
  });
}

template <class T>
void norm_tangent(const NormTangent<T>& s, int threads) {
  const int64_t channels = s.groups * (s.D / s.inner), total = s.k * s.rows;
  each(total, total * s.D > SMALL ? threads : 1, [&](int64_t i) {
    const int64_t row = i % s.rows, vector = i / s.rows, here = i * s.D;
    const T* dw = s.dw ? s.dw + vector * channels : nullptr;
    const T* db = s.db ? s.db + vector * channels : nullptr;
    auto kernel = s.inner == 1 ? tangent_row<T, true> : tangent_row<T, false>;
    kernel(s, row, s.xhat + row * s.D, s.r[row], s.w, s.dx ? s.dx + here : nullptr, dw, db, s.y + here,
           s.dx ? s.dxhat + here : nullptr, s.dx ? s.along + i : nullptr);
  });
}

template <class T, bool VECTOR>
void backward_row(const NormBackwardTangent<T>& s, int64_t row, const T* __restrict__ x, T r, const T* w, const T* dw,
                  const T* dxhat, T along, const T* g, const T* __restrict__ dg, T* out, T* dgw, T* dgb) {
  // u = g w and du = dg w + g dw; sums of du, xhat du, u, xhat u, dxhat u.
  const T count_all = T(s.D);
  T m_du = 0, m_xdu = 0, m_u = 0, m_xu = 0, m_mu = 0;
  runs(s, row, [&](int64_t first, int64_t count, int64_t channel) {
    const T* wc = w ? w + channel : nullptr;
    const T* dwc = dw ? dw + channel : nullptr;
    const T* xs = x + first;
    const T* dgs = dg + first;
    const T* gs = g ? g + first : nullptr;
    const T* ms = dxhat ? dxhat + first : nullptr;
    auto weight = [=](int64_t i) { return wc ? at<T, VECTOR>(wc, i) : T(1); };
    if (out && s.mode != FIXED) {
      if (gs) {
        Lanes<T> sums[5];
        auto du = [=](int64_t i) { return dgs[i] * weight(i) + (dwc ? gs[i] * at<T, VECTOR>(dwc, i) : T(0)); };
        auto u = [=](int64_t i) { return gs[i] * weight(i); };
        accumulate(
            count, sums, du, [=](int64_t i) { return xs[i] * du(i); }, u, [=](int64_t i) { return xs[i] * u(i); },
            [=](int64_t i) { return ms ? ms[i] * u(i) : T(0); });
        m_du += sums[0].sum(), m_xdu += sums[1].sum(), m_u += sums[2].sum(), m_xu += sums[3].sum();
        m_mu += sums[4].sum();
      } else {
        Lanes<T> sums[2];
        accumulate(
            count, sums, [=](int64_t i) { return dgs[i] * weight(i); },
            [=](int64_t i) { return xs[i] * dgs[i] * weight(i); });
        m_du += sums[0].sum(), m_xdu += sums[1].sum();
      }
    }
    if (VECTOR) {
      if (dgw)
        for (int64_t i = 0; i < count; ++i) dgw[channel + i] += dgs[i] * xs[i] + (gs && ms ? gs[i] * ms[i] : T(0));
      if (dgb)
        for (int64_t i = 0; i < count; ++i) dgb[channel + i] += dgs[i];
    } else if (dgw || dgb) {
      Lanes<T> sums[2];
      accumulate(
          count, sums, [=](int64_t i) { return dgs[i] * xs[i] + (gs && ms ? gs[i] * ms[i] : T(0)); },
          [=](int64_t i) { return dgs[i]; });
      if (dgw) dgw[channel] += sums[0].sum();
      if (dgb) dgb[channel] += sums[1].sum();
    }
  });
  if (!out) return;
  // With m(.) for the mean, a = m(xhat dx) and rho = r a, J du + dJ u of kernels/norm.py is, for centred statistics,
  //   r [du - rho u - (m(du) - rho m(u)) - xhat (m(xhat du) - rho m(xhat u) + m(dxhat u)) - dxhat m(xhat u)]:
  // five sums in one pass over the row, and the result in a second one.
  const T rho = r * along;
  const T shift = s.mode == CENTRED ? (m_du - rho * m_u) / count_all : T(0);
  const T by_x = s.mode == FIXED ? T(0) : (m_xdu - rho * m_xu + m_mu) / count_all;
  const T by_moved = s.mode == FIXED ? T(0) : m_xu / count_all;
  runs(s, row, [&](int64_t first, int64_t count, int64_t channel) {
    const T* wc = w ? w + channel : nullptr;
    const T* dwc = dw ? dw + channel : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t d = first + i;
      const T weight = wc ? at<T, VECTOR>(wc, i) : T(1);
      T value = dg[d] * weight - shift - x[d] * by_x;
      if (g) {
        if (dwc) value += g[d] * at<T, VECTOR>(dwc, i);
        if (dxhat) value -= rho * g[d] * weight + dxhat[d] * by_moved;
      }
      out[d] = r * value;
    }
  });
}

template <class T>
void norm_backward_tangent(const NormBackwardTangent<T>& s, int threads) {
  const int64_t channels = s.groups * (s.D / s.inner);
  // At least 1: without rows there are no stretches, and the sums over them are zero.
  const int64_t length = std::max<int64_t>(1, (s.rows + STRETCHES - 1) / STRETCHES);
  const int64_t stretches = (s.rows + length - 1) / length;
  std::vector<T> sums(s.dgw || s.dgb ? 2 * s.k * stretches * channels : 0);
  each(s.k * stretches, s.k * s.rows * s.D > SMALL ? threads : 1, [&](int64_t job) {
    const int64_t vector = job / stretches, from = job % stretches * length, to = std::min(s.rows, from + length);
    T* dgw = s.dgw ? sums.data() + 2 * job * channels : nullptr;
    T* dgb = s.dgb ? sums.data() + (2 * job + 1) * channels : nullptr;
    const T* dw = s.dw ? s.dw + vector * channels : nullptr;
    auto kernel = s.inner == 1 ? backward_row<T, true> : backward_row<T, false>;
    for (int64_t row = from; row < to; ++row) {
      const int64_t at_row = row * s.D, here = (vector * s.rows + row) * s.D;
      kernel(s, row, s.xhat + at_row, s.r[row], s.w, dw, s.dxhat ? s.dxhat + here : nullptr,
             s.dxhat ? s.along[vector * s.rows + row] : T(0), s.g ? s.g + at_row : nullptr, s.dg + here,
             s.out ? s.out + here : nullptr, dgw, dgb);
    }
  });
  for (int64_t vector = 0; vector < s.k; ++vector)
    for (int64_t c = 0; c < channels; ++c) {
      double gw = 0, gb = 0;
      for (int64_t stretch = 0; stretch < stretches && (s.dgw || s.dgb); ++stretch) {
        const T* part = sums.data() + 2 * (vector * stretches + stretch) * channels;
        gw += part[c], gb += part[channels + c];
      }
      if (s.dgw) s.dgw[vector * channels + c] = T(gw);
      if (s.dgb) s.dgb[vector * channels + c] = T(gb);
    }
}

template <class T>
constexpr NormKernels<T> table() {
  return {NORM_KERNELS(VALUE_OF)};
}

}  // namespace

EXPORT_TABLE(norm_, NormKernels)
