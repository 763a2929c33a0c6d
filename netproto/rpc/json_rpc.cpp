// SPDX-License-Identifier: Apache-2.0
#include "netproto/rpc/json_rpc.h"

namespace vmferry::rpc {

namespace {

bool is_id(const Json& id) {
  return id.is_null() || id.is_string() || id.is_number_integer();
}

int code_of(ErrorKind kind) {
  if (kind == ErrorKind::InvalidArgument) return kInvalidParams;
  return kServerErrorBase - static_cast<int>(kind);
}

}  // namespace

Result<Request> decode_request(const Json& value) {
  if (!value.is_object()) return fail(ErrorKind::InvalidArgument, "a request is a JSON object");
  const auto version = value.find("jsonrpc");
  if (version == value.end() || *version != "2.0") {
    return fail(ErrorKind::InvalidArgument, "member 'jsonrpc' has to be \"2.0\"");
  }
  const auto method = value.find("method");
  if (method == value.end() || !method->is_string()) {
    return fail(ErrorKind::InvalidArgument, "member 'method' has to be a string");
  }
  Request request;
  request.method = method->get<std::string>();
  if (const auto id = value.find("id"); id != value.end()) {
    if (!is_id(*id)) return fail(ErrorKind::InvalidArgument, "member 'id' has to be a string, an integer or null");
    request.id = *id;
  } else {
    request.notification = true;
  }
  if (const auto params = value.find("params"); params != value.end()) {
    request.params_refused = !params->is_object();
    if (!request.params_refused) request.params = *params;
  }
  return request;
}

Json encode_request(const Json& id, const std::string& method, const Json& params) {
  return {{"jsonrpc", "2.0"}, {"id", id}, {"method", method}, {"params", params}};
}

Json encode_result(const Json& id, const Json& result) {
  return {{"jsonrpc", "2.0"}, {"id", id}, {"result", result}};
}

Json encode_error(const Json& id, int code, const std::string& text) {
  return {{"jsonrpc", "2.0"}, {"id", id}, {"error", {{"code", code}, {"message", text}}}};
}

Json encode_error(const Json& id, const Error& error) {
  Json value = encode_error(id, code_of(error.kind), error.text);
  value["error"]["data"] = {{"kind", std::string(to_string(error.kind))}};
  return value;
}

Json encode_progress(const Json& id, const Json& value) {
  return {{"jsonrpc", "2.0"}, {"method", "progress"}, {"params", {{"id", id}, {"value", value}}}};
}

Result<Response> decode_response(const Json& value) {
  if (!value.is_object() || !value.contains("id")) return fail(ErrorKind::Corrupt, "not a JSON-RPC response");
  Response response;
  response.id = value["id"];
  if (const auto result = value.find("result"); result != value.end()) {
    response.result = *result;
    return response;
  }
  const auto error = value.find("error");
  if (error == value.end() || !error->is_object())
    return fail(ErrorKind::Corrupt, "a response without result or error");
  response.is_error = true;
  response.code = error->contains("code") && (*error)["code"].is_number_integer() ? (*error)["code"].get<int>() : 0;
  if (error->contains("message") && (*error)["message"].is_string()) {
    response.text = (*error)["message"].get<std::string>();
  }
  if (error->contains("data") && (*error)["data"].is_object()) {
    const Json& data = (*error)["data"];
    if (data.contains("kind") && data["kind"].is_string()) response.kind = data["kind"].get<std::string>();
  }
  return response;
}

}  // namespace vmferry::rpc
