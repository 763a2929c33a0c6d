// SPDX-License-Identifier: Apache-2.0
//
// First in, first out of IoRequests, linked through the requests themselves.
#pragma once

#include "engine/runtime/io_backend.h"

namespace vmferry {

class IoQueue {
 public:
  bool empty() const { return head_ == nullptr; }
  IoRequest& front() { return *head_; }
  void push(IoRequest& request) {
    request.next = nullptr;
    (head_ == nullptr ? head_ : tail_->next) = &request;
    tail_ = &request;
  }
  IoRequest& pop() {
    IoRequest& request = *head_;
    head_ = request.next;
    request.next = nullptr;
    return request;
  }
  // Back to the head: for a request that could not be submitted after all.
  void push_front(IoRequest& request) {
    request.next = head_;
    if (head_ == nullptr) tail_ = &request;
    head_ = &request;
  }

 private:
  IoRequest* head_ = nullptr;
  IoRequest* tail_ = nullptr;
};

}  // namespace vmferry
