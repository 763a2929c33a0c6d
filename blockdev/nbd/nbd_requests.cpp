// SPDX-License-Identifier: Apache-2.0
//
// The part of NbdConnection that carries out one request: check, admit, submit, answer.
#include <algorithm>
#include <bit>
#include <cerrno>

#include "blockdev/nbd/nbd_connection.h"
#include "engine/base/assert.h"
#include "engine/base/log.h"

namespace vmferry {

namespace {

using nbd::Command;
using nbd::WireError;

// Of one request without its data. More than it takes, because it also bounds how many there are: whether a mutation
// overlaps one under way is found by looking at each of these.
constexpr uint64_t kOperationCost = 8_KiB;
constexpr uint64_t kCacheStepSize = 1_MiB;        // CACHE reads its range in steps of this
constexpr uint64_t kPayloadSkipMax = UINT32_MAX;  // more announced: the stream is not worth reading to its end
constexpr uint64_t kExtentCost = sizeof(Extent) + sizeof(nbd::StatusDescriptor);

// Of the memory that holds `length` bytes: whole pages, and the one for the reply header before them.
constexpr uint64_t buffer_cost(uint64_t length) {
  return TransferBuffers::kHeadroom + round_up(length, TransferBuffers::kSizeMin);
}

constexpr Command command_of(const nbd::Request& request) {
  return static_cast<Command>(request.command);
}

}  // namespace

void NbdOperation::block_done(BlockRequest&, Errno error) noexcept {
  connection->operation_done(*this, error);
}

WireError NbdConnection::verdict(const nbd::Request& request) const {
  if (draining_ || export_->removed || !may_be_served()) return WireError::Shutdown;
  nbd::RequestRules rules = rules_;
  rules.size = export_->config.device->size();  // it may have grown
  return nbd::check_request(request, rules);
}

bool NbdConnection::may_be_served() const {
  return export_->config.clients == nullptr || export_->config.clients->may_serve(client_);
}

uint64_t NbdConnection::cost(const nbd::Request& request) const {
  switch (command_of(request)) {
    case Command::Read:
    case Command::Write:
      return kOperationCost + buffer_cost(request.length);
    case Command::Cache:
      return kOperationCost + buffer_cost(std::min<uint64_t>(request.length, kCacheStepSize));
    case Command::BlockStatus:
      return kOperationCost + server_.limits_.status_extents_max * kExtentCost *
                                  static_cast<uint64_t>(std::popcount(contexts_of(request)));
    default:
      return kOperationCost;
  }
}

void NbdConnection::on_header() {
  ++request_count_;
  ++server_.totals_.requests_total;
  const nbd::Request& request = parser_.request();
  if (command_of(request) == Command::Disconnect) return finish("client disconnected");
  if (request.payload && request.length > kPayloadSkipMax) return close("payload is too large to be skipped");
  // Held where there is no memory to be had: a few bytes of the connection itself.
  if (nbd::is_limited_status(request) && request.length <= status_payload_.size()) {
    return parser_.take_payload(status_payload_.data(), request.length);
  }
  admit_request();
}

void NbdConnection::admit_request() {
  const nbd::Request& request = parser_.request();
  const WireError error = verdict(request);
  const uint64_t charge = error == WireError::None ? cost(request) : 0;
  if (!fits_own_limit(charge)) return hold(Held::OverOwnLimit, charge);
  if (error != WireError::None) {
    if (!request.payload) return send_error(request, error);
    skip_error_ = error;
    return parser_.skip_payload(request.length);
  }
  if (!server_.admit(*this, charge)) return hold(Held::AwaitsGrant, charge);
  start_request(charge);
}

// The memory is charged; every path from here ends in end_operation().
void NbdConnection::start_request(uint64_t charge) {
  const nbd::Request& request = parser_.request();
  NbdOperation& operation = *server_.operations_.take();
  operation.connection = this;
  operation.request = request;
  operation.charge = charge;
  operation.block = BlockRequest{.range = {request.offset, request.length}, .completion = &operation};
  ++operation_count_;
  operation_bytes_ += charge;

  const Command command = command_of(request);
  if (command == Command::Read || command == Command::Write || command == Command::Cache) {
    const uint64_t size =
        command == Command::Cache ? std::min<uint64_t>(request.length, kCacheStepSize) : request.length;
    operation.buffer = server_.buffers_.take(size);
    operation.block.data = operation.buffer.data();
    if (!operation.buffer) {
      end_operation(operation);
      if (command != Command::Write) return send_error(request, WireError::NoMemory);
      skip_error_ = WireError::NoMemory;
      return parser_.skip_payload(request.length);
    }
  }
  const bool fua = (request.flags & nbd::kCommandFua) != 0;
  switch (command) {
    case Command::Read:
      return submit(operation);
    case Command::Write:
      operation.block.op = BlockOp::Write;
      operation.block.fua = fua;
      receiving_ = &operation;
      return parser_.take_payload(operation.block.data, request.length);
    case Command::Flush:
      operation.block.op = BlockOp::Flush;
      return submit(operation);
    case Command::Trim:
    case Command::WriteZeroes:
      // A discard reads back as zeroes (design, end of section 3), so that every block has one defined content.
      operation.block.op = BlockOp::WriteZeroes;
      operation.block.fua = fua;
      operation.block.may_unmap = command == Command::Trim || (request.flags & nbd::kCommandNoHole) == 0;
      operation.block.fast_only = command == Command::WriteZeroes && (request.flags & nbd::kCommandFastZero) != 0;
      return submit(operation);
    case Command::Cache:
      operation.block.range.length = 0;
      return submit_cache_step(operation);
    case Command::BlockStatus:
      return ask_status(operation);
    case Command::Disconnect:
      break;
  }
  VF_ASSERT(false);  // check_request() lets nothing else pass
}

void NbdConnection::on_limited_status() {
  nbd::Request request = parser_.request();
  const WireError error = nbd::resolve_limited_status(request, ByteSpan(status_payload_).first(request.length), rules_);
  if (error != WireError::None) return send_error(request, error);
  parser_.replace_request(request);
  admit_request();
}

void NbdConnection::on_payload_done() {
  if (parser_.skipped()) return send_error(parser_.request(), skip_error_);
  if (nbd::is_limited_status(parser_.request())) return on_limited_status();
  submit(*std::exchange(receiving_, nullptr));
}

void NbdConnection::submit(NbdOperation& operation) {
  export_->config.device->submit(operation.block);
}

// Reads the next part of the range and throws the data away: what stays is what the store keeps in its cache.
void NbdConnection::submit_cache_step(NbdOperation& operation) {
  const uint64_t end = operation.request.offset + operation.request.length;
  const uint64_t next = operation.block.range.end();
  operation.block.range = {next, std::min(kCacheStepSize, end - next)};
  submit(operation);
}

void NbdConnection::operation_done(NbdOperation& operation, Errno error) noexcept {
  // The content may have changed hands on the way.
  if (error == 0 && !may_be_served()) error = ESHUTDOWN;
  const bool left_for_later = draining_ && server_.limits_.drain_unanswered && error == ESHUTDOWN;
  const bool answered = phase_ != Phase::Closed && !left_for_later;
  if (answered && error == 0 && command_of(operation.request) == Command::Cache &&
      operation.block.range.end() < operation.request.offset + operation.request.length) {
    return submit_cache_step(operation);
  }
  if (answered) {
    if (error == 0) {
      send_success(operation);
    } else {
      // One line per connection: a dead disk fails thousands of requests a second.
      if (error_count_ == 0) {
        log::warn("nbd connection={} export={} command={} offset={} bytes={} error=\"{}\"", id_, export_->config.name,
                  operation.request.command, operation.request.offset, operation.request.length, errno_text(error));
      }
      send_error(operation.request, nbd::to_wire(error, operation.block.fast_only));
    }
  }
  end_operation(operation);
  settle();
  retire_if_idle();
}

void NbdConnection::send_error(const nbd::Request& request, WireError error) {
  ++error_count_;
  ++server_.totals_.errors_total;
  out_.clear();
  nbd::append_error(out_, request, error, rules_.style());
  send(out_);
}

void NbdConnection::send_success(const NbdOperation& operation) {
  const nbd::Request& request = operation.request;
  if (command_of(request) == Command::Read) {
    // The header goes into the room before the data, so that both leave as one run.
    const size_t header_size = nbd::read_header_size(rules_.style());
    uint8_t* start = operation.buffer.data() - header_size;
    nbd::encode_read_header(start, rules_.style(), request);
    server_.totals_.read_bytes_total += request.length;
    return send({start, header_size + request.length});
  }
  if (command_of(request) == Command::Write) server_.totals_.written_bytes_total += request.length;
  uint8_t reply[nbd::kExtendedReplySize];
  send({reply, nbd::encode_success(reply, rules_.style(), request)});
}

void NbdConnection::end_operation(NbdOperation& operation) {
  --operation_count_;
  operation_bytes_ -= operation.charge;
  server_.release(operation.charge);
  server_.operations_.give_back(operation);
}

}  // namespace vmferry
