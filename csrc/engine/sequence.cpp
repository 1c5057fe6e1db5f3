#include <algorithm>
#include <cstring>

#include "model.h"

namespace bimos {

Sequence::Sequence(const Shape& shape, int64_t blocks, int64_t bits)
    : heads_(blocks * shape.key_heads), key_heads_(shape.key_heads), head_size_(shape.head), width_(bits == 8 ? 1 : 2) {}

void Sequence::keep(int64_t length) { length_ = std::min(length_, std::max<int64_t>(0, length)); }

Sequence::Store Sequence::empty(int64_t room) const {
  const auto positions = static_cast<size_t>(heads_ * room);
  return {std::vector<uint8_t>(positions * static_cast<size_t>(head_size_ * width_)), std::vector<float>(width_ == 1 ? positions : 0)};
}

void Sequence::copy(const Store& from, int64_t from_room, Store& to, int64_t to_room, int64_t length) const {
  const int64_t bytes = head_size_ * width_;
  for (int64_t i = 0; i < heads_ && length > 0; ++i) {
    std::memcpy(to.data.data() + i * to_room * bytes, from.data.data() + i * from_room * bytes, static_cast<size_t>(length * bytes));
    if (width_ == 1) std::copy_n(from.scale.data() + i * from_room, length, to.scale.data() + i * to_room);
  }
}

maths::Cache Sequence::cache(Store& store, int64_t head) const {
  uint8_t* data = store.data.data() + head * room_ * head_size_ * width_;
  if (width_ == 1) return {nullptr, reinterpret_cast<int8_t*>(data), store.scale.data() + head * room_};
  return {reinterpret_cast<uint16_t*>(data), nullptr, nullptr};
}

void Sequence::reserve(int64_t length) {
  if (length <= room_) return;
  const int64_t room = std::max<int64_t>(length, std::max<int64_t>(128, room_ + room_ / 2));
  Store keys = empty(room), values = empty(room);  // both, before anything changes
  copy(keys_, room_, keys, room, length_);
  copy(values_, room_, values, room, length_);
  std::swap(keys_, keys);
  std::swap(values_, values);
  room_ = room;
}

void Sequence::copy_from(const Sequence& other, int64_t length) {
  length = std::min(length, other.length_);
  length_ = 0;
  reserve(length);
  copy(other.keys_, other.room_, keys_, room_, length);
  copy(other.values_, other.room_, values_, room_, length);
  length_ = length;
}

}  // namespace bimos
