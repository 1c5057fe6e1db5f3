#include <algorithm>
#include <cstring>

#include "model.h"

namespace bimos {

Sequence::Sequence(const Shape& shape, int64_t blocks) : blocks_(blocks), key_heads_(shape.key_heads), head_size_(shape.head) {}

void Sequence::keep(int64_t length) { length_ = std::min(length_, std::max<int64_t>(0, length)); }

void Sequence::reserve(int64_t length) {
  if (length <= room_) return;
  const int64_t room = std::max<int64_t>(length, std::max<int64_t>(128, room_ + room_ / 2));
  const auto size = static_cast<size_t>(blocks_ * key_heads_ * room * head_size_);
  std::vector<uint16_t> keys(size), values(size);  // both, before anything changes
  for (int64_t i = 0; i < blocks_ * key_heads_ && length_ > 0; ++i) {
    const auto bytes = static_cast<size_t>(length_ * head_size_) * 2;
    std::memcpy(keys.data() + i * room * head_size_, keys_.data() + i * room_ * head_size_, bytes);
    std::memcpy(values.data() + i * room * head_size_, values_.data() + i * room_ * head_size_, bytes);
  }
  keys_.swap(keys);
  values_.swap(values);
  room_ = room;
}

void Sequence::copy_from(const Sequence& other, int64_t length) {
  length = std::min(length, other.length_);
  length_ = 0;
  reserve(length);
  for (int64_t i = 0; i < blocks_ * key_heads_; ++i) {
    const auto bytes = static_cast<size_t>(length * head_size_) * 2;
    std::memcpy(keys_.data() + i * room_ * head_size_, other.keys_.data() + i * other.room_ * head_size_, bytes);
    std::memcpy(values_.data() + i * room_ * head_size_, other.values_.data() + i * other.room_ * head_size_, bytes);
  }
  length_ = length;
}

}  // namespace bimos
