// SPDX-License-Identifier: Apache-2.0
//
// The part of NbdConnection that answers BLOCK_STATUS: base:allocation from the device, other contexts from the
// export's NbdStatusSource, each as one chunk of the reply.
#include <algorithm>
#include <bit>

#include "blockdev/nbd/nbd_connection.h"
#include "engine/base/log.h"

namespace vmferry {

namespace {

constexpr uint32_t kBaseAllocationBit = 1U << (nbd::kBaseAllocationId - 1);

}  // namespace

uint32_t NbdConnection::contexts_of(const nbd::Request& request) const {
  return request.contexts != 0 ? request.contexts : rules_.contexts();
}

size_t NbdConnection::extents_max(const nbd::Request& request) const {
  return (request.flags & nbd::kCommandReqOne) != 0 ? 1 : server_.limits_.status_extents_max;
}

void NbdConnection::ask_status(NbdOperation& operation) {
  if ((contexts_of(operation.request) & kBaseAllocationBit) != 0) {
    return export_->config.device->query_extents(operation.block.range, extents_max(operation.request),
                                                 [&operation](const Result<std::vector<Extent>>& extents) {
                                                   operation.connection->status_done(operation, extents);
                                                 });
  }
  server_.executor_.post([&operation] { operation.connection->status_done(operation, std::vector<Extent>{}); });
}

void NbdConnection::status_done(NbdOperation& operation, const Result<std::vector<Extent>>& extents) {
  if (phase_ != Phase::Closed) {
    out_.clear();
    Status appended = extents ? append_status(operation, *extents) : Status(tl::unexpected(extents.error()));
    if (!may_be_served()) appended = fail(ErrorKind::Fenced, "the content is another side's now");
    if (appended) {
      send(out_);
    } else {
      log::warn("nbd connection={} export={} block_status offset={} error=\"{}\"", id_, export_->config.name,
                operation.request.offset, appended.error().text);
      send_error(operation.request, nbd::WireError::Io);
    }
  }
  end_operation(operation);
  settle();
  retire_if_idle();
}

// Nothing leaves before all contexts have answered: an error is then the whole reply.
Status NbdConnection::append_status(const NbdOperation& operation, const std::vector<Extent>& extents) {
  const nbd::Request& request = operation.request;
  const NbdStatusSource* const source = export_->config.status;
  for (uint32_t left = contexts_of(request); left != 0; left &= left - 1) {
    const uint32_t index = static_cast<uint32_t>(std::countr_zero(left));
    std::vector<nbd::StatusDescriptor> descriptors;
    if (index == 0) {
      descriptors = allocation_of(request, extents);
    } else {
      const std::string& context = extra_contexts_.at(index - 1);
      if (source == nullptr ||
          !source->status(context, {request.offset, request.length}, extents_max(request), descriptors)) {
        return fail(ErrorKind::NotFound, "meta context '{}' is not there any more", context);
      }
      if (request.flags & nbd::kCommandReqOne && !descriptors.empty()) {
        descriptors.resize(1);
        descriptors.front().length = std::min(descriptors.front().length, request.length);
      }
    }
    if (descriptors.empty()) return fail(ErrorKind::Internal, "no extents");
    nbd::append_block_status(out_, request, descriptors, rules_.style(),
                             {.context_id = index + 1, .last = std::has_single_bit(left)});
  }
  return {};
}

std::vector<nbd::StatusDescriptor> NbdConnection::allocation_of(const nbd::Request& request,
                                                                const std::vector<Extent>& extents) const {
  std::vector<nbd::StatusDescriptor> descriptors;
  uint64_t left = request.length;
  for (const Extent& extent : extents) {
    const uint64_t length = std::min(extent.range.length, left);
    if (length == 0) break;
    const uint32_t flags = (extent.hole ? nbd::kStateHole : 0U) | (extent.zero ? nbd::kStateZero : 0U);
    left -= length;
    if (!descriptors.empty() && descriptors.back().flags == flags) {
      descriptors.back().length += length;
    } else if (descriptors.size() == extents_max(request)) {
      break;
    } else {
      descriptors.push_back({length, flags});
    }
  }
  return descriptors;
}

}  // namespace vmferry
