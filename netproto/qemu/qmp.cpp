// SPDX-License-Identifier: Apache-2.0
#include "netproto/qemu/qmp.h"

namespace vmferry::qmp {

namespace {

constexpr size_t kNameSizeMax = 128;
constexpr size_t kErrorTextSizeMax = 1024;

Error to_error(const Json& error) {
  std::string text = text_of(error, "desc").substr(0, kErrorTextSizeMax);
  // It goes to logs and terminals, of which some take the two bytes of U+009B for the start of a command.
  for (char& c : text) {
    const auto code = static_cast<unsigned char>(c);
    if (code < 0x20) c = ' ';
    if (code > 0x7e) c = '?';
  }
  if (text.empty()) text = "no description";
  const std::string kind = text_of(error, "class");
  return {kind == "CommandNotFound" || kind == "DeviceNotFound" ? ErrorKind::NotFound : ErrorKind::Internal,
          std::move(text)};
}

int version_part(const Json& version, const char* key) {
  return static_cast<int>(std::min<uint64_t>(number_of(version, key), 1'000'000));
}

}  // namespace

Status Codec::feed(ByteSpan bytes, std::vector<Message>& out) {
  if (failed_) return fail(ErrorKind::Corrupt, "QMP: the conversation has ended after an earlier error");
  std::vector<Json> values;
  const Status status = lines_.feed(bytes, values);
  for (Json& value : values) {
    auto message = decode(std::move(value));
    if (!message) {
      failed_ = true;
      return tl::unexpected(message.error());
    }
    out.push_back(std::move(*message));
  }
  failed_ = !status.has_value();
  return status;
}

std::string Codec::encode(std::string_view command, const Json& arguments, uint64_t& id) {
  id = id_next_++;
  Json line = {{"execute", command}, {"id", id}};
  if (arguments.is_object() && !arguments.empty()) line["arguments"] = arguments;
  return to_json_line(line);
}

Result<Message> Codec::decode(Json&& value) {
  if (!value.is_object()) return fail(ErrorKind::Corrupt, "QMP: a message is not an object");
  if (!greeted_) {
    if (!value.contains("QMP")) return fail(ErrorKind::Corrupt, "QMP: the first message is not a greeting");
    greeted_ = true;
    const Json& version = object_of(object_of(object_of(value, "QMP"), "version"), "qemu");
    return Greeting{version_part(version, "major"), version_part(version, "minor"), version_part(version, "micro")};
  }
  if (value.contains("event")) {
    Event event{text_of(value, "event"), object_of(value, "data")};
    if (event.name.empty() || event.name.size() > kNameSizeMax)
      return fail(ErrorKind::Corrupt, "QMP: an event without a proper name");
    return event;
  }
  const bool failed = value.contains("error");
  if (failed == value.contains("return")) return fail(ErrorKind::Corrupt, "QMP: a message is neither reply nor event");
  const uint64_t id = number_of(value, "id");
  if (id == 0 || id >= id_next_) {
    // QEMU leaves the id out when it could not parse what we sent.
    if (failed) return fail(ErrorKind::Corrupt, "QMP: {}", to_error(object_of(value, "error")).text);
    return fail(ErrorKind::Corrupt, "QMP: a reply to no command of ours");
  }
  if (failed) return Reply{id, tl::unexpected(to_error(object_of(value, "error")))};
  return Reply{id, std::move(value["return"])};
}

std::string text_of(const Json& object, const char* key) {
  if (!object.is_object()) return {};
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : std::string{};
}

uint64_t number_of(const Json& object, const char* key) {
  if (!object.is_object()) return 0;
  const auto it = object.find(key);
  return it != object.end() && it->is_number_unsigned() ? it->get<uint64_t>() : 0;
}

bool flag_of(const Json& object, const char* key) {
  if (!object.is_object()) return false;
  const auto it = object.find(key);
  return it != object.end() && it->is_boolean() && it->get<bool>();
}

const Json& object_of(const Json& object, const char* key) {
  static const Json empty = Json::object();
  if (!object.is_object()) return empty;
  const auto it = object.find(key);
  return it != object.end() && it->is_object() ? *it : empty;
}

const Json& array_of(const Json& object, const char* key) {
  static const Json empty = Json::array();
  if (!object.is_object()) return empty;
  const auto it = object.find(key);
  return it != object.end() && it->is_array() ? *it : empty;
}

}  // namespace vmferry::qmp
