// SPDX-License-Identifier: Apache-2.0
//
// QEMU's memory stream of one group as the handover sees it: engine/memory behind the coordinator's interface. At any
// time at most one of source and sink is there.
// Threads: the group's executor.
#pragma once

#include <memory>

#include "engine/memory/memory_sink.h"
#include "engine/memory/memory_source.h"
#include "engine/migrate/interfaces.h"

namespace vmferry {

class GroupMemory final : public MemoryCarrier {
 public:
  GroupMemory(Executor& executor, GroupChannel& channel, const MemorySourceOptions& options)
      : executor_(executor), channel_(channel), options_(options) {}

  // MemoryCarrier
  void start_source(std::unique_ptr<ByteStream> from_qemu, const Id128& attempt, SourceEvents events) override;
  void hold(bool held) override;
  void start_sink(std::unique_ptr<ByteStream> to_qemu, const Id128& attempt, SinkEvents events) override;
  void stop() override;
  MemoryFigures figures() const override;

  // From the group
  void on_connected();
  void on_disconnected();
  void on_writable();
  void on_message(MessageType type, ByteSpan payload);

 private:
  Executor& executor_;
  GroupChannel& channel_;
  MemorySourceOptions options_;
  std::unique_ptr<MemorySource> source_;
  std::unique_ptr<MemorySink> sink_;
  bool held_ = false;
  bool connected_ = false;
  MemoryFigures last_;  // of the source that was stopped last
};

}  // namespace vmferry
