// The headers of csrc/ that hosts and GPUs share, for Python; arrays in, arrays out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <tuple>

#include "adamw.cuh"
#include "chunks.cuh"
#include "launch.cuh"
#include "masks.cuh"
#include "normals.cuh"
#include "vectors.cuh"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using UInts = Array<uint32_t>;
using Floats = Array<float>;

// counter [count, 4], key [count, 2] -> [count, 4].
UInts philox_words(const UInts& counter, const UInts& key) {
  UInts out({counter.shape(0), py::ssize_t{4}});
  for (py::ssize_t i = 0; i < counter.shape(0); ++i) {
    const uint32_t *c = counter.data(i, 0), *k = key.data(i, 0);
    const d2v::Words words = d2v::philox(c[0], c[1], c[2], c[3], k[0], k[1]);
    std::copy(words.w, words.w + 4, out.mutable_data(i, 0));
  }
  return out;
}

template <class Out, class In, class Function>
Array<Out> map(const Array<In>& x, Function function) {
  Array<Out> out(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  std::transform(x.data(), x.data() + x.size(), out.mutable_data(), function);
  return out;
}

// words [count, 4] -> [count, 4].
Floats philox_normal(const UInts& words) {
  Floats out({words.shape(0), py::ssize_t{4}});
  for (py::ssize_t i = 0; i < 2 * words.shape(0); ++i) {
    const d2v::Normals pair = d2v::normal_pair(words.data()[2 * i], words.data()[2 * i + 1]);
    out.mutable_data()[2 * i] = pair.first;
    out.mutable_data()[2 * i + 1] = pair.second;
  }
  return out;
}

// All 2^24 radii, cosines and sines of which normals are products.
std::tuple<Floats, Floats, Floats> polar() {
  const py::ssize_t count = 1 << 24;
  Floats radius(count), cosine(count), sine(count);
  for (py::ssize_t i = 0; i < count; ++i) {
    radius.mutable_data()[i] = d2v::radius_of(static_cast<uint32_t>(i) + 1);
    const d2v::Normals turn = d2v::cos_sin(static_cast<float>(i) * 3.7450704e-07f);
    cosine.mutable_data()[i] = turn.first;
    sine.mutable_data()[i] = turn.second;
  }
  return {radius, cosine, sine};
}

// rows, tokens [count] -> [count, 4 * fours]: normals of the first columns.
Floats element_normals(const UInts& rows, const UInts& tokens, py::ssize_t fours, uint32_t k0, uint32_t k1) {
  Floats out({rows.size(), 4 * fours});
  for (py::ssize_t i = 0; i < rows.size(); ++i) {
    for (py::ssize_t d4 = 0; d4 < fours; ++d4) {
      const auto normals =
          d2v::element_normals(static_cast<uint32_t>(d4), tokens.data()[i], rows.data()[i], k0, k1);
      std::copy(normals.v, normals.v + 4, out.mutable_data(i, 4 * d4));
    }
  }
  return out;
}

// Threads of a host that sample one row together.
class Meeting {
 public:
  explicit Meeting(int32_t size) : values_(static_cast<size_t>(size)), size_(size) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t turn = turn_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++turn_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return turn_ != turn; });
    }
  }
  uint32_t sum_before(int32_t rank, uint32_t value, uint32_t& total) {
    values_[static_cast<size_t>(rank)] = value;
    wait();
    uint32_t before = 0;
    total = 0;
    for (int32_t i = 0; i < size_; ++i) {
      before += i < rank ? values_[static_cast<size_t>(i)] : 0;
      total += values_[static_cast<size_t>(i)];
    }
    wait();
    return before;
  }
  int32_t size() const { return size_; }

 private:
  std::vector<uint32_t> values_;
  const int32_t size_;
  int32_t arrived_ = 0;
  int64_t turn_ = 0;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

struct ThreadTeam {
  Meeting* meeting;
  int32_t own_rank;

  int32_t rank() const { return own_rank; }
  int32_t size() const { return meeting->size(); }
  void sync() { meeting->wait(); }
  int32_t sum(int32_t value) {
    uint32_t total;
    meeting->sum_before(own_rank, static_cast<uint32_t>(value), total);
    return static_cast<int32_t>(total);
  }
  uint32_t sum_before(uint32_t value, uint32_t& total) { return meeting->sum_before(own_rank, value, total); }
};

// A stream of few different words, so that priorities tie.
struct CoarseStream {
  d2v::RowStream stream;
  uint32_t kept_bits;
};

d2v::Words draws(const CoarseStream& s, uint32_t purpose, uint32_t q) {
  d2v::Words words = d2v::draws(s.stream, purpose, q);
  for (uint32_t& word : words.w) word &= s.kept_bits;
  return words;
}

// members: threads per row that share storage of its own; 0: one thread, storage in the row's own outputs.
std::tuple<Array<bool>, Array<int32_t>, Array<int32_t>> sample_rows(const Array<int64_t>& ids, int32_t clones,
                                                                    const std::vector<int32_t>& settings,
                                                                    bool keep_chosen, int64_t seed, uint32_t epoch,
                                                                    int32_t members, uint32_t kept_bits) {
  const d2v::MaskShape shape = {settings[0], settings[1], settings[2], settings[3],
                                settings[4], settings[5], keep_chosen};
  const py::ssize_t rows = ids.size() * clones, tokens = shape.height * shape.width;
  const py::ssize_t kept = keep_chosen ? shape.target : tokens - shape.target;
  Array<bool> mask({rows, tokens});
  Array<int32_t> ids_keep({rows, kept}), slot({rows, tokens});
  for (py::ssize_t n = 0; n < rows; ++n) {
    const CoarseStream stream = {
        d2v::row_stream(ids.data()[n / clones], static_cast<uint32_t>(n % clones), seed, epoch), kept_bits};
    uint8_t* row_mask = reinterpret_cast<uint8_t*>(mask.mutable_data(n, 0));
    int32_t *row_slot = slot.mutable_data(n, 0), *row_ids = ids_keep.mutable_data() + n * kept;
    if (members == 0) {
      d2v::SoloTeam team;
      uint32_t* storage = reinterpret_cast<uint32_t*>(row_slot);
      d2v::sample_row(team, shape, stream, storage, row_mask, row_mask, row_slot, row_ids);
      continue;
    }
    Meeting meeting(members);
    std::vector<uint32_t> priority(static_cast<size_t>(tokens), 0xA5A5A5A5u);
    std::vector<uint8_t> marked(static_cast<size_t>(tokens), 1);
    std::vector<std::thread> threads;
    for (int32_t rank = 0; rank < members; ++rank) {
      threads.emplace_back([&, rank] {
        ThreadTeam team = {&meeting, rank};
        d2v::sample_row(team, shape, stream, priority.data(), marked.data(), row_mask, row_slot, row_ids);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  return {mask, ids_keep, slot};
}

std::vector<int32_t> block_run(int32_t cell, int32_t down, int32_t height, int32_t width, int32_t block_height,
                               int32_t block_width) {
  const d2v::Run run = d2v::block_run(cell, down, height, width, block_height, block_width);
  return {run.start, run.end};
}

// Of every program: index of its record in the table, first, in_fours, count, kind, addresses.
std::vector<std::vector<int64_t>> find_chunks(const Array<int64_t>& table, int64_t programs, int32_t chunk,
                                              int32_t columns) {
  std::vector<std::vector<int64_t>> out;
  for (int64_t program = 0; program < programs; ++program) {
    const d2v::Chunk found = d2v::find_chunk(table.data(), program, chunk);
    std::vector<int64_t> row = {found.record - table.data(), found.first, found.in_fours, found.count, found.kind};
    for (int32_t column = 0; column < columns; ++column) {
      row.push_back(static_cast<int64_t>(d2v::address_of(found, column)));
    }
    out.push_back(std::move(row));
  }
  return out;
}

d2v::AdamWScalars adamw_scalars(double clip, double decay, double step, double lr, double beta1, double beta2,
                                double eps, double weight_decay, bool fairseq) {
  return d2v::adamw_scalars(clip, decay, step, lr, beta1, beta2, eps, weight_decay, fairseq);
}

// p, m and v, updated.
std::tuple<Floats, Floats, Floats> adamw_elements(const Floats& p_in, const Floats& g, const Floats& m_in,
                                                  const Floats& v_in, const d2v::AdamWScalars& scalars) {
  const auto same = [](float x) { return x; };
  Floats p = map<float>(p_in, same), m = map<float>(m_in, same), v = map<float>(v_in, same);
  for (py::ssize_t i = 0; i < p.size(); ++i) {
    d2v::adamw_element(p.mutable_data()[i], g.data()[i], m.mutable_data()[i], v.mutable_data()[i], scalars);
  }
  return {p, m, v};
}

Floats lerp(const Floats& start, const Floats& end, float weight) {
  Floats out(start.size());
  for (py::ssize_t i = 0; i < start.size(); ++i) {
    out.mutable_data()[i] = d2v::lerp(start.data()[i], end.data()[i], weight);
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(maths_host, m) {
  m.def("philox_words", philox_words);
  m.def("philox_below", [](const UInts& words, uint32_t bound) {
    return map<uint32_t>(words, [&](uint32_t word) { return d2v::below(word, bound); });
  });
  m.def("philox_normal", philox_normal);
  m.def("polar", polar);
  m.def("element_normals", element_normals);

  m.def("sample_rows", sample_rows);
  m.def("block_run", block_run);
  m.def("draw", [](int64_t id, uint32_t clone, int64_t seed, uint32_t epoch, uint32_t purpose, uint32_t j) {
    return d2v::draw(d2v::row_stream(id, clone, seed, epoch), purpose, j);
  });

  m.def("find_chunks", find_chunks);
  m.def("code_of", d2v::code_of);
  m.def("widest_access", d2v::widest_access);
  m.def("takes_fours", d2v::takes_fours);
  m.def("float_of_fp16", [](const Array<uint16_t>& x) { return map<float>(x, d2v::float_of_fp16); });
  m.def("float_of_bf16", [](const Array<uint16_t>& x) { return map<float>(x, d2v::float_of_bf16); });
  m.def("fp16_of", [](const Floats& x) { return map<uint16_t>(x, d2v::fp16_of); });
  m.def("bf16_of", [](const Floats& x) { return map<uint16_t>(x, d2v::bf16_of); });

  py::class_<d2v::AdamWScalars>(m, "AdamWScalars")
      .def_readonly("clip", &d2v::AdamWScalars::clip)
      .def_readonly("weight", &d2v::AdamWScalars::weight)
      .def_readonly("weight1", &d2v::AdamWScalars::weight1)
      .def_readonly("weight2", &d2v::AdamWScalars::weight2)
      .def_readonly("beta2", &d2v::AdamWScalars::beta2)
      .def_readonly("beta2_rest", &d2v::AdamWScalars::beta2_rest)
      .def_readonly("eps", &d2v::AdamWScalars::eps)
      .def_readonly("rate", &d2v::AdamWScalars::rate)
      .def_readonly("shrink", &d2v::AdamWScalars::shrink)
      .def_readonly("root_scale", &d2v::AdamWScalars::root_scale);
  m.def("adamw_scalars", adamw_scalars);
  m.def("adamw_elements", adamw_elements);
  m.def("lerp", lerp);
  m.def("weight_of", d2v::weight_of);

  py::class_<d2v::Grid>(m, "Grid")
      .def_readonly("x", &d2v::Grid::x)
      .def_readonly("y", &d2v::Grid::y)
      .def_readonly("z", &d2v::Grid::z)
      .def_readonly("threads", &d2v::Grid::threads)
      .def_readonly("shared", &d2v::Grid::shared)
      .def("empty", &d2v::Grid::empty)
      .def("possible", &d2v::Grid::possible);
  m.def("table_grid", d2v::table_grid);
  m.def("masks_grid", d2v::masks_grid);
  m.def("rows_grid", d2v::rows_grid);
  m.def("sums_grid", d2v::sums_grid);
  m.def("row_of", d2v::row_of);
  py::class_<d2v::BackwardRows>(m, "BackwardRows")
      .def_readonly("first", &d2v::BackwardRows::first)
      .def_readonly("summed", &d2v::BackwardRows::summed)
      .def_readonly("visited", &d2v::BackwardRows::visited)
      .def_readonly("group", &d2v::BackwardRows::group)
      .def_readonly("groups", &d2v::BackwardRows::groups);
  m.def("backward_rows", d2v::backward_rows);
}
