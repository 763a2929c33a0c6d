// SPDX-License-Identifier: Apache-2.0
//
// Counts allocations of one thread, by an operator new of our own. Not in a sanitized tree: the sanitizers bring
// theirs.
#pragma once

#include <cstdint>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define VMFERRY_OWN_NEW 0
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define VMFERRY_OWN_NEW 0
#endif
#ifndef VMFERRY_OWN_NEW
#define VMFERRY_OWN_NEW 1
#endif

namespace vmferry::counting_new {

void count_this_thread();
void start();
uint64_t stop();  // how many since start()

}  // namespace vmferry::counting_new
