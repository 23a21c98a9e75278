// Many tensors in one pass on a CPU: tensors that go together element by element (a parameter, its gradient, its
// moments, ...) are a row, at most one in each column. Threads share the elements of all rows evenly.
//
// The tensors of a row may share any dense layout and are then walked in memory order; those that do not follow
// the others are copied to a contiguous one and, if written, back.
#pragma once

#include "cpu.hpp"

#include <array>
#include <utility>

namespace d2v {

constexpr int64_t kGrain = 16384;  // elements from which on a second thread helps

// Whether the elements fill a block of memory, in whatever order.
inline bool is_dense(const Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (x.size(i) == 0) return true;
    if (x.size(i) > 1) dims.emplace_back(x.stride(i), x.size(i));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

struct Column {
  const char* name;
  const std::vector<Tensor>& tensors;
  const std::vector<int64_t>* rows;  // the row of each tensor; null: one for every row
  bool written;
  bool only_float32;
};

template <int kColumns>
class Rows {
 public:
  struct Row {
    std::array<char*, kColumns> address{};  // null: no tensor
    std::array<Dtype, kColumns> dtype{};
  };

  // The first column has a tensor in every row, whose shape all tensors of the row have.
  Rows(const char* op, const std::array<Column, kColumns>& columns) : op_(op) {
    const std::vector<Tensor>& first = columns[0].tensors;
    const int64_t count = static_cast<int64_t>(first.size());
    rows_.resize(count);
    starts_.assign(count + 1, 0);
    std::vector<std::array<const Tensor*, kColumns>> tensors(count);
    for (int c = 0; c < kColumns; ++c) place(columns[c], c, tensors);
    for (int64_t i = 0; i < count; ++i) {
      starts_[i + 1] = starts_[i] + first[i].numel();
      layout(columns, tensors[i], rows_[i]);
    }
    for (int c = 0; c < kColumns; ++c) {
      if (columns[c].written) check_distinct(columns[c].name, c);
    }
  }

  // Whether 16-bit copies of all rows are larger than the caches.
  bool past_caches() const { return 2 * starts_.back() >= kPastCaches; }

  // body(row, offset, count) for spans that cover every element once; writes what was staged back.
  template <class Function>
  void run(const Function& body) {
    in_threads(starts_.back(), kGrain, [&](int64_t begin, int64_t end) {
      int64_t i = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
      for (; begin < end; ++i) {
        const int64_t stop = std::min(end, starts_[i + 1]);
        if (stop > begin) body(rows_[i], begin - starts_[i], stop - begin);
        begin = std::max(begin, stop);
      }
    });
    for (auto& [target, staged] : staged_) {
      if (target.has_value()) torch::stable::copy_(*target, staged);
    }
  }

 private:
  void place(const Column& column, int c, std::vector<std::array<const Tensor*, kColumns>>& tensors) const {
    const int64_t count = static_cast<int64_t>(column.tensors.size()), all = static_cast<int64_t>(tensors.size());
    const int64_t expected = column.rows ? static_cast<int64_t>(column.rows->size()) : all;
    D2V_CHECK(count == expected, op_, ": ", column.name, " must have ", expected, " tensors, got ", count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = column.rows ? (*column.rows)[i] : i;
      D2V_CHECK(row >= 0 && row < all && (c == 0 || tensors[row][c] == nullptr), op_, ": ", column.name,
                " must have at most one tensor in each of ", all, " rows, got row ", row);
      const Tensor& x = column.tensors[i];
      const auto fault = [&](const char* must, const std::string& got) {
        throw std::invalid_argument(words(op_, ": ", column.name, "[", row, "] must ", must, ", got ", got));
      };
      if (!x.is_cpu()) fault("be on the CPU like the others", "a device");
      const Dtype dtype = dtype_of(x);
      if (dtype == kNone || (column.only_float32 && dtype != kFloat32)) {
        fault(column.only_float32 ? "be fp32 on backend 'native' (eager takes more)"
                                  : "be fp32, fp16 or bf16 on backend 'native' (eager takes more)",
              torch::headeronly::toString(x.scalar_type()));
      }
      if (c > 0 && !same_sizes(x, *tensors[row][0])) {
        fault(words("have shape ", shape_of(*tensors[row][0]), " like the others of its row").c_str(), shape_of(x));
      }
      tensors[row][c] = &x;
    }
  }

  static bool same_sizes(const Tensor& a, const Tensor& b) {
    const auto x = a.sizes(), y = b.sizes();
    return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
  }

  static bool same_strides(const Tensor& a, const Tensor& b) {
    const auto x = a.strides(), y = b.strides(), sizes = a.sizes();
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] > 1 && x[i] != y[i]) return false;
    }
    return true;
  }

  void layout(const std::array<Column, kColumns>& columns, const std::array<const Tensor*, kColumns>& tensors,
              Row& row) {
    bool contiguous = true, alike = true;
    for (const Tensor* x : tensors) {
      if (x == nullptr) continue;
      contiguous = contiguous && x->is_contiguous();
      alike = alike && (x == tensors[0] || same_strides(*x, *tensors[0]));
    }
    const bool staged = !contiguous && !(alike && is_dense(*tensors[0]));
    for (int c = 0; c < kColumns; ++c) {
      const Tensor* x = tensors[c];
      if (x == nullptr) continue;
      row.dtype[c] = dtype_of(*x);
      if (staged && !x->is_contiguous()) {
        staged_.emplace_back(columns[c].written ? Optional(*x) : std::nullopt, torch::stable::contiguous(*x));
        x = &staged_.back().second;
      }
      row.address[c] = static_cast<char*>(x->data_ptr());
    }
  }

  // Two threads, or a later span of the same one, would change the same memory.
  void check_distinct(const char* name, int c) const {
    std::vector<char*> addresses;
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (rows_[i].address[c] != nullptr && starts_[i + 1] > starts_[i]) addresses.push_back(rows_[i].address[c]);
    }
    std::sort(addresses.begin(), addresses.end());
    D2V_CHECK(std::adjacent_find(addresses.begin(), addresses.end()) == addresses.end(), op_, ": ", name,
              " must not hold the same memory twice");
  }

  const char* op_;
  std::vector<Row> rows_;
  std::vector<int64_t> starts_;  // of each row in the count of all elements; the last is the count
  std::vector<std::pair<Optional, Tensor>> staged_;  // (where to write it back, the copy)
};

}  // namespace d2v
