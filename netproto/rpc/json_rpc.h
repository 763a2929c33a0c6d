// SPDX-License-Identifier: Apache-2.0
//
// JSON-RPC 2.0 messages (jsonrpc.org/specification) between vmferry and vmferryd: one JSON object per line.
//
// A long-running call sends notifications of method "progress" (params.id names the call) before its response.
#pragma once

#include <string>

#include "netproto/rpc/json_lines.h"

namespace vmferry::rpc {

// Codes of the specification, section 5.1, and ours from -32000 downwards.
constexpr int kParseError = -32700;
constexpr int kInvalidRequest = -32600;
constexpr int kMethodNotFound = -32601;
constexpr int kInvalidParams = -32602;
constexpr int kInternalError = -32603;
constexpr int kServerErrorBase = -32000;

struct Request {
  Json id;  // string, number or null; absent for a notification
  bool notification = false;
  std::string method;
  Json params = Json::object();
  bool params_refused = false;  // they are no object: kInvalidParams is the answer
};

// Checks shape and types; batches are refused, since we have no use for them.
Result<Request> decode_request(const Json& value);

Json encode_request(const Json& id, const std::string& method, const Json& params);
Json encode_result(const Json& id, const Json& result);
Json encode_error(const Json& id, const Error& error);
Json encode_error(const Json& id, int code, const std::string& text);
Json encode_progress(const Json& id, const Json& value);

struct Response {
  Json id;
  Json result;
  bool is_error = false;
  int code = 0;
  std::string kind;  // ErrorKind as text, when the daemon sent one
  std::string text;
};
Result<Response> decode_response(const Json& value);

}  // namespace vmferry::rpc
