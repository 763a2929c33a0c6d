// SPDX-License-Identifier: Apache-2.0
//
// The real ByteStream: a connected, non-blocking stream socket on the Reactor.
//
// Writes are queued and sent with one writev per round of the loop; the queue has no limit of its own (callers look at
// unsent_bytes()). The stream may be closed or destroyed inside any of its callbacks. Threads: the reactor's.
#pragma once

#include <deque>

#include "engine/runtime/endpoint.h"
#include "engine/runtime/reactor.h"
#include "engine/runtime/stream.h"

namespace vmferry {

// 0 and "" leave the kernel's default. Applied as far as the kernel allows: these are for speed, not for correctness.
struct SocketOptions {
  uint32_t notsent_lowat = 0;  // bytes; TCP_NOTSENT_LOWAT: keeps our queue the only deep one
  uint32_t send_buffer = 0;    // bytes; SO_SNDBUF
  uint32_t receive_buffer = 0;
  std::string congestion{};  // "bbr"
};

class SocketStream final : public ByteStream {
 public:
  // Takes a connected socket, makes it non-blocking, sets TCP_NODELAY where it applies.
  SocketStream(Reactor& reactor, UniqueFd fd, std::string peer_text, const SocketOptions& options = {});
  ~SocketStream() override;

  void set_handler(StreamHandler* handler) override;
  void write(ByteSpan bytes) override;
  void write(Bytes&& bytes) override;
  // After stream_closed: what was queued and never left.
  size_t unsent_bytes() const override { return unsent_; }
  void pause_reading(bool paused) override;
  void close() override;
  void close_after_writing() override;  // stream_closed(0) tells when everything was handed to the kernel
  bool peer_gone() const override;
  std::string peer_text() const override { return peer_text_; }

  // stream_writable() comes when the queue falls to this many bytes, and when it is empty. Default 256 KiB.
  void set_low_mark(size_t bytes) { low_mark_ = bytes; }
  // Sends a copy of `fd` (SCM_RIGHTS) with the first byte of `bytes`, after everything queued before. Unix sockets.
  void write_with_fd(ByteSpan bytes, UniqueFd fd);
  Result<PeerCredentials> credentials() const { return peer_credentials(fd_.get()); }
  int fd() const { return fd_.get(); }
  // Gives up the socket, for a protocol that this stream cannot carry (descriptors that come in). Closed afterwards.
  UniqueFd release();

 private:
  struct Chunk {
    Bytes bytes;
    UniqueFd attached;
  };
  void queue(Chunk&& chunk);
  void ready(uint32_t events);
  void read_some();
  void flush();
  ssize_t send_front(size_t& attempted);
  void finish(Errno error);
  void update_interest();

  Reactor& reactor_;
  UniqueFd fd_;
  std::string peer_text_;
  StreamHandler* handler_ = nullptr;
  std::deque<Chunk> queue_;
  size_t front_sent_ = 0;  // bytes of queue_.front() that have left
  size_t unsent_ = 0;
  size_t low_mark_ = 256_KiB;
  bool paused_ = false;
  bool blocked_ = false;   // the kernel's buffer is full: waiting for EPOLLOUT
  bool draining_ = false;  // close_after_writing()
  WatchId watch_ = 0;
  DeferredCall flush_later_;
  Alive alive_;
};

}  // namespace vmferry
