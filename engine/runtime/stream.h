// SPDX-License-Identifier: Apache-2.0
//
// Byte streams (unix, TCP, socketpair) as callbacks on an executor. Real: SocketStream on the Reactor; the simulator
// has its own. Bytes in and out only: protocols are the codecs of netproto.
// Threads: the executor's thread only.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "engine/base/bytes.h"
#include "engine/base/result.h"
#include "engine/base/units.h"

namespace vmferry {

class StreamHandler {
 public:
  // New bytes; valid during the call only. Not called while reading is paused.
  virtual void stream_readable(ByteSpan bytes) = 0;
  // Everything queued was handed to the kernel, or the queue fell below the low mark.
  virtual void stream_writable() = 0;
  // End of stream or error (errno; 0 = orderly end by the other side). Called once, last, also after a failed connect,
  // never after close().
  virtual void stream_closed(Errno error) = 0;

 protected:
  ~StreamHandler() = default;
};

class ByteStream {
 public:
  virtual ~ByteStream() = default;  // closes

  virtual void set_handler(StreamHandler* handler) = 0;  // nothing is delivered before this
  // Queues a copy; never blocks, never fails inline (an error arrives as stream_closed). Callers bound the queue
  // by looking at unsent_bytes() and waiting for stream_writable().
  virtual void write(ByteSpan bytes) = 0;
  // Queues without a copy.
  virtual void write(Bytes&& bytes) = 0;
  virtual size_t unsent_bytes() const = 0;
  virtual void pause_reading(bool paused) = 0;  // backpressure: paused, the kernel's buffer fills up
  virtual void close() = 0;                     // drops what is queued; no further callbacks
  virtual void close_after_writing() = 0;       // sends what is queued, then closes; reading stops at once
  // The other side has closed both directions, although bytes of it may still have to be delivered.
  virtual bool peer_gone() const { return false; }
  virtual std::string peer_text() const = 0;  // "unix:/path", "10.0.0.1:4411" for log lines
};

}  // namespace vmferry
