// SPDX-License-Identifier: Apache-2.0
//
// One request of a guest, from its chain of buffers to its status byte.
//
// Flow: VhostQueue fills `chain`; start() checks everything in it, then goes through the device in one or several
// steps; the status byte is written, and the queue puts the chain back. Owned by the server's pool. Zero copy: data in
// one piece of the guest's memory is read and written in place. Where replication needs content that stands still,
// that is TrackedDevice's business (I4). Threads: the reactor's.
#pragma once

#include <vector>

#include "blockdev/block_device.h"
#include "blockdev/transfer_buffers.h"
#include "blockdev/vhost/vhost_memory.h"
#include "netproto/virtio/blk.h"
#include "netproto/virtio/virtqueue.h"

namespace vmferry {

class VhostQueue;
class VhostServer;

class VhostRequest final : public BlockCompletion {
 public:
  // False: the chain has no status byte that could be written, so that it cannot be answered. Otherwise the queue's
  // request_done() follows, never inline unless `error` is certain at once.
  [[nodiscard]] bool start(VhostServer& server, VhostQueue& queue, VhostMemory::Ptr memory);
  void block_done(BlockRequest& request, Errno error) noexcept override;

  // What the device wrote into the guest's memory, for the dirty log.
  template <typename Mark>
  void for_each_written(Mark mark) const {
    mark(status_address_, 1);
    if (!fills_) return;
    // All of it, also after an error: nobody knows how much of a failed read has arrived.
    for (const virtio::HostSpan& span : data_) mark(span.guest_address, uint64_t{span.length});
  }
  uint64_t read_bytes() const { return type_ == virtio::kBlkIn ? written_ : 0; }
  uint64_t written_bytes() const { return type_ == virtio::kBlkOut && status_ == virtio::BlkStatus::Ok ? total_ : 0; }
  uint32_t used_length() const { return static_cast<uint32_t>(written_) + 1; }
  virtio::BlkStatus status() const { return status_; }
  // Must not be answered: the device was shut down before it was carried out.
  bool postponed() const { return postponed_; }
  bool memory_damaged() const { return memory_->damaged(); }
  const VhostMemory& memory() const { return *memory_; }
  void release();  // memory and buffers; before it goes back to the pool

  virtio::Chain chain;

 private:
  virtio::BlkStatus prepare();
  virtio::BlkStatus prepare_transfer(bool write);
  virtio::BlkStatus prepare_ranges();
  virtio::BlkStatus answer_id();
  bool find_status();
  bool collect(const std::vector<virtio::Buffer>& buffers);
  bool split_off_header(virtio::BlkHeader& header);
  void next_step();
  void submit();
  void finish(virtio::BlkStatus status);

  VhostServer* server_ = nullptr;
  VhostQueue* queue_ = nullptr;
  VhostMemory::Ptr memory_;
  uint8_t* status_at_ = nullptr;
  uint64_t status_address_ = 0;
  virtio::BlkStatus status_ = virtio::BlkStatus::Ok;
  bool postponed_ = false;
  uint32_t type_ = 0;
  std::vector<virtio::HostSpan> data_;  // pieces of the guest's memory, in order
  uint64_t total_ = 0;                  // bytes of data_
  uint64_t written_ = 0;                // bytes of data_ that the device filled
  bool fills_ = false;                  // data_ is the device's to write
  std::vector<virtio::BlkRange> ranges_;
  size_t step_ = 0;        // next entry of data_ or ranges_
  uint32_t piece_at_ = 0;  // within data_[step_]
  BlockRequest block_;
  TransferBuffer buffer_;  // when the data is gathered
};

}  // namespace vmferry
