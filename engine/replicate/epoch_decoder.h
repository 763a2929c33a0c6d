// SPDX-License-Identifier: Apache-2.0
//
// Turns an arrived data frame back into runs: decompresses, proves the hash, parses, and proves references.
//
// Flow: Receiver hands frames in the order of arrival to decode() on a worker, one at a time (the compression history
// depends on it); frames of abandoned epochs too. References are read by the Receiver and checked by resolve().
// Threads: decode() and resolve() on a worker; restart() only while none runs.
#pragma once

#include <optional>
#include <vector>

#include "engine/delta/stream_codec.h"
#include "engine/replicate/staging.h"
#include "netproto/repl/epoch_messages.h"

namespace vmferry {

// One frame on its way from the message to the files.
struct ArrivedFrame {
  Bytes message;            // EpochData
  EpochData header;         // header.coded points into message
  uint32_t connection = 0;  // it came on
  bool staged = false;      // wanted: a record for the staging area
  Id128 session{};

  Status status{};
  Bytes raw;       // decoded body
  FrameBody body;  // points into raw
  std::vector<FrameRun> references;
  Bytes referenced;         // their bytes, read at the copy
  bool unresolved = false;  // they did not match: still references in body
  Bytes image;              // staging record
};

class EpochDecoder {
 public:
  explicit EpochDecoder(const delta::StreamCodecOptions& limits) : limits_(limits) {}

  // Fills status, raw, body, references, and image when there is no reference to resolve.
  void decode(ArrivedFrame& frame);
  // frame.referenced holds the bytes of all references in order: they become literals where they match and stay
  // references (unresolved) where they do not. Fills image.
  static void resolve(ArrivedFrame& frame);
  void restart() { streams_[0].reset(), streams_[1].reset(); }

 private:
  struct Stream {
    uint32_t number;
    delta::StreamDecompressor decompressor;
  };
  Result<Stream*> stream(uint32_t number);

  const delta::StreamCodecOptions limits_;
  std::optional<Stream> streams_[2];  // bulk (even numbers) and urgent (odd)
};

}  // namespace vmferry
