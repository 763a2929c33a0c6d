// SPDX-License-Identifier: Apache-2.0
#include "blockdev/vhost/vhost_request.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "blockdev/vhost/vhost_queue.h"
#include "blockdev/vhost/vhost_server.h"
#include "engine/base/assert.h"

namespace vmferry {

using virtio::BlkStatus;

bool VhostRequest::start(VhostServer& server, VhostQueue& queue, VhostMemory::Ptr memory) {
  server_ = &server;
  queue_ = &queue;
  memory_ = std::move(memory);
  status_ = BlkStatus::Ok;
  postponed_ = false;
  data_.clear();
  ranges_.clear();
  total_ = written_ = 0;
  fills_ = false;
  step_ = 0;
  piece_at_ = 0;
  const bool too_long = chain.readable.size() + chain.writable.size() > server.limits_.segments_max + size_t{2};
  if (!find_status()) return false;
  const BlkStatus status = too_long ? BlkStatus::IoError : prepare();
  if (status != BlkStatus::Ok) {
    finish(status);
  } else {
    next_step();
  }
  return true;
}

void VhostRequest::release() {
  memory_.reset();
  if (buffer_) server_->buffered_bytes_ -= total_;
  buffer_.reset();
}

// The last byte that the device may write.
bool VhostRequest::find_status() {
  if (chain.writable.empty() || chain.writable.back().length == 0) return false;
  virtio::Buffer& last = chain.writable.back();
  if (last.length - 1 > UINT64_MAX - last.address) return false;
  status_address_ = last.address + last.length - 1;
  status_at_ = memory_->table().at_guest(status_address_, 1);
  if (status_at_ == nullptr) return false;
  if (--last.length == 0) chain.writable.pop_back();
  return true;
}

bool VhostRequest::collect(const std::vector<virtio::Buffer>& buffers) {
  data_.clear();
  total_ = 0;
  for (const virtio::Buffer& buffer : buffers) {
    const size_t before = data_.size();
    if (!memory_->table().translate(buffer.address, buffer.length, data_)) return false;
    total_ += buffer.length;
    // Buffers that lie behind each other are one piece, for us and for the guest's addresses.
    if (before == 0 || before >= data_.size()) continue;
    virtio::HostSpan& last = data_[before - 1];
    const virtio::HostSpan& first = data_[before];
    if (last.data + last.length != first.data || last.guest_address + last.length != first.guest_address ||
        first.length > UINT32_MAX - last.length)
      continue;
    last.length += first.length;
    data_.erase(data_.begin() + static_cast<ptrdiff_t>(before));
  }
  return true;
}

// The first bytes of the readable part, however the driver cut it into buffers.
bool VhostRequest::split_off_header(virtio::BlkHeader& header) {
  uint8_t bytes[virtio::kBlkHeaderSize];
  size_t filled = 0;
  if (total_ < sizeof bytes) return false;
  size_t used = 0;
  while (filled < sizeof bytes) {
    virtio::HostSpan& span = data_[used];
    const auto piece = static_cast<uint32_t>(std::min<size_t>(span.length, sizeof bytes - filled));
    std::memcpy(bytes + filled, span.data, piece);
    filled += piece;
    span.data += piece;
    span.guest_address += piece;
    span.length -= piece;
    if (span.length == 0) ++used;
  }
  data_.erase(data_.begin(), data_.begin() + static_cast<ptrdiff_t>(used));
  total_ -= sizeof bytes;
  header = virtio::decode_blk_header(bytes);
  return true;
}

BlkStatus VhostRequest::prepare() {
  virtio::BlkHeader header;
  if (!collect(chain.readable) || !split_off_header(header)) return BlkStatus::IoError;
  type_ = header.type;
  block_ = {};
  block_.completion = this;
  block_.fua = queue_->write_through();
  block_.range.offset = header.sector;  // in sectors until it is checked
  switch (type_) {
    case virtio::kBlkIn:
      return collect(chain.writable) ? prepare_transfer(false) : BlkStatus::IoError;
    case virtio::kBlkOut:
      return prepare_transfer(true);
    case virtio::kBlkFlushRequest:
      block_.op = BlockOp::Flush;
      block_.range = {};
      return BlkStatus::Ok;
    case virtio::kBlkGetId:
      return collect(chain.writable) ? answer_id() : BlkStatus::IoError;
    case virtio::kBlkDiscardRequest:
    case virtio::kBlkWriteZeroesRequest:
      return prepare_ranges();
    default:
      return BlkStatus::Unsupported;
  }
}

BlkStatus VhostRequest::prepare_transfer(bool write) {
  if (write && server_->config_.read_only) return BlkStatus::IoError;
  const uint64_t sector = block_.range.offset;
  const uint64_t size = server_->config_.device->size();
  if (total_ % virtio::kSectorSize != 0 || total_ > server_->limits_.request_bytes_max ||
      sector > size / virtio::kSectorSize || !fits_in(sector * virtio::kSectorSize, total_, size))
    return BlkStatus::IoError;
  block_.op = write ? BlockOp::Write : BlockOp::Read;
  fills_ = !write;
  block_.range = {sector * virtio::kSectorSize, 0};
  const VhostLimits& limits = server_->limits_;
  if (data_.size() > 1 && total_ <= limits.copy_bytes_max &&
      total_ <= server_->config_.device->limits().transfer_size_max &&
      server_->buffered_bytes_ + total_ <= limits.buffered_bytes_max) {
    buffer_ = server_->buffers_.take(total_);  // without memory: piece by piece, as if over the limit
    if (buffer_) {
      server_->buffered_bytes_ += total_;
      server_->totals_.copied_bytes_total += total_;
    }
  }
  return BlkStatus::Ok;
}

BlkStatus VhostRequest::prepare_ranges() {
  const VhostLimits& limits = server_->limits_;
  if (server_->config_.read_only) return BlkStatus::IoError;
  if (total_ == 0 || total_ % virtio::kBlkRangeSize != 0 || total_ / virtio::kBlkRangeSize > limits.discard_ranges_max)
    return BlkStatus::IoError;
  // Copied first: the guest could change it between check and use.
  uint8_t bytes[virtio::kBlkRangeSize];
  size_t filled = 0;
  const uint64_t sectors = server_->config_.device->size() / virtio::kSectorSize;
  const uint32_t flags_known = type_ == virtio::kBlkWriteZeroesRequest ? virtio::kBlkRangeUnmap : 0;
  for (const virtio::HostSpan& span : data_) {
    for (uint32_t at = 0; at < span.length;) {
      const auto piece = static_cast<uint32_t>(std::min<size_t>(span.length - at, sizeof bytes - filled));
      std::memcpy(bytes + filled, span.data + at, piece);
      filled += piece;
      at += piece;
      if (filled < sizeof bytes) continue;
      filled = 0;
      const virtio::BlkRange range = virtio::decode_blk_range(bytes);
      if ((range.flags & ~flags_known) != 0) return BlkStatus::Unsupported;
      if (range.sectors > limits.discard_sectors_max || !fits_in(range.sector, range.sectors, sectors))
        return BlkStatus::IoError;
      if (range.sectors > 0) ranges_.push_back(range);
    }
  }
  block_.op = BlockOp::WriteZeroes;
  return BlkStatus::Ok;
}

BlkStatus VhostRequest::answer_id() {
  fills_ = true;
  uint8_t id[virtio::kBlkIdSize] = {};
  const std::string& name = server_->config_.name;
  std::memcpy(id, name.data(), std::min(name.size(), sizeof id));
  for (const virtio::HostSpan& span : data_) {
    const size_t piece = std::min<size_t>(span.length, sizeof id - written_);
    std::memcpy(span.data, id + written_, piece);
    written_ += piece;
  }
  block_.op = BlockOp::Read;
  return BlkStatus::Ok;  // without a step: nothing is left to do
}

// Submits what comes next, or finishes.
void VhostRequest::next_step() {
  switch (block_.op) {
    case BlockOp::Flush:
      if (step_++ == 0) return submit();
      return finish(BlkStatus::Ok);
    case BlockOp::WriteZeroes: {
      if (step_ == ranges_.size()) return finish(BlkStatus::Ok);
      const virtio::BlkRange& range = ranges_[step_++];
      block_.range = {range.sector * virtio::kSectorSize, range.sectors * virtio::kSectorSize};
      block_.may_unmap = type_ == virtio::kBlkDiscardRequest || (range.flags & virtio::kBlkRangeUnmap) != 0;
      return submit();
    }
    case BlockOp::Read:
    case BlockOp::Write:
      break;
  }
  block_.range.offset += block_.range.length;
  if (type_ == virtio::kBlkGetId || step_ == data_.size()) return finish(BlkStatus::Ok);
  if (buffer_) {
    if (block_.op == BlockOp::Write) {
      uint8_t* target = buffer_.data();
      for (const virtio::HostSpan& span : data_) target = std::copy_n(span.data, span.length, target);
    }
    block_.data = buffer_.data();
    block_.range.length = total_;
    step_ = data_.size();
    return submit();
  }
  const virtio::HostSpan& span = data_[step_];
  const uint32_t length = std::min(span.length - piece_at_, server_->config_.device->limits().transfer_size_max);
  block_.data = span.data + piece_at_;
  block_.range.length = length;
  piece_at_ += length;
  if (piece_at_ == span.length) {
    ++step_;
    piece_at_ = 0;
  }
  submit();
}

void VhostRequest::submit() {
  if (!server_->may_serve()) return finish(BlkStatus::IoError);
  server_->config_.device->submit(block_);
}

void VhostRequest::block_done(BlockRequest&, Errno error) noexcept {
  if (error == 0 && !server_->may_serve()) error = EIO;  // the content may have changed hands on the way
  if (error == ESHUTDOWN && queue_->keeps_inflight()) {
    postponed_ = true;
    return queue_->request_done(*this);
  }
  if (error != 0) return finish(error == ENOTSUP ? BlkStatus::Unsupported : BlkStatus::IoError);
  if (block_.op == BlockOp::Read) {
    if (buffer_) {
      const uint8_t* source = buffer_.data();
      for (const virtio::HostSpan& span : data_) {
        std::memcpy(span.data, source, span.length);
        source += span.length;
      }
    }
    written_ += block_.range.length;
  }
  next_step();
}

void VhostRequest::finish(BlkStatus status) {
  status_ = status;
  *status_at_ = static_cast<uint8_t>(status);
  queue_->request_done(*this);
}

}  // namespace vmferry
