// SPDX-License-Identifier: Apache-2.0
#include "engine/daemon/node_state_json.h"

#include "blockdev/vhost/vhost_limits.h"

#include <array>

#include "engine/base/id.h"

namespace vmferry {

namespace {

template <typename E>
struct Word {
  E value;
  const char* text;
};

constexpr std::array<Word<Role>, 2> kRoles{{{Role::Primary, "primary"}, {Role::Secondary, "secondary"}}};
constexpr std::array<Word<Owner>, 3> kOwners{
    {{Owner::Self, "self"}, {Owner::Peer, "peer"}, {Owner::Unknown, "unknown"}}};
constexpr std::array<Word<HandoverState>, 12> kStates{{{HandoverState::Own, "own"},
                                                       {HandoverState::Migrating, "migrating"},
                                                       {HandoverState::Fenced, "fenced"},
                                                       {HandoverState::GoSent, "go-sent"},
                                                       {HandoverState::AbortedResumeOwed, "aborted-resume-owed"},
                                                       {HandoverState::Secondary, "secondary"},
                                                       {HandoverState::Prepared, "prepared"},
                                                       {HandoverState::Primary, "primary"},
                                                       {HandoverState::Started, "started"},
                                                       {HandoverState::Running, "running"},
                                                       {HandoverState::Aborted, "aborted"},
                                                       {HandoverState::Superseded, "superseded"}}};
constexpr std::array<Word<AioSetting>, 3> kAio{
    {{AioSetting::Automatic, "automatic"}, {AioSetting::IoUring, "io_uring"}, {AioSetting::Libaio, "libaio"}}};
constexpr std::array<Word<NbdTlsSetting>, 4> kNbdTls{{{NbdTlsSetting::Automatic, "automatic"},
                                                      {NbdTlsSetting::Off, "off"},
                                                      {NbdTlsSetting::Allow, "allow"},
                                                      {NbdTlsSetting::Require, "require"}}};
constexpr std::array<Word<CacheSetting>, 2> kCache{
    {{CacheSetting::Writeback, "writeback"}, {CacheSetting::None, "none"}}};

template <typename E, size_t N>
std::string word_of(const std::array<Word<E>, N>& words, E value) {
  for (const auto& word : words) {
    if (word.value == value) return word.text;
  }
  return "";
}

// Reads members of one object. The first problem wins; values read after it are defaults that nobody uses.
class Fields {
 public:
  Fields(const Json& object, std::string what) : object_(object), what_(std::move(what)) {
    if (!object.is_object()) problem("is not an object");
  }

  std::string text(const char* key) {
    const Json* value = find(key);
    if (value != nullptr && value->is_string()) return value->get<std::string>();
    problem(fmt::format("'{}' is not a string", key));
    return {};
  }
  uint64_t number(const char* key) {
    const Json* value = find(key);
    if (value != nullptr && value->is_number_unsigned()) return value->get<uint64_t>();
    problem(fmt::format("'{}' is not a non-negative number", key));
    return 0;
  }
  bool has(const char* key) const { return find(key) != nullptr; }  // for members that came with a later version
  bool flag(const char* key) {
    const Json* value = find(key);
    if (value != nullptr && value->is_boolean()) return value->get<bool>();
    problem(fmt::format("'{}' is not true or false", key));
    return false;
  }
  Id128 id(const char* key) {
    const auto parsed = Id128::parse(text(key));
    if (!parsed) problem(fmt::format("'{}' is not an id", key));
    return parsed ? *parsed : Id128{};
  }
  std::string name(const char* key) {
    std::string value = text(key);
    if (!is_valid_name(value)) problem(fmt::format("'{}' is not a name", key));
    return value;
  }
  template <typename E, size_t N>
  E word(const char* key, const std::array<Word<E>, N>& words) {
    const std::string value = text(key);
    for (const auto& candidate : words) {
      if (value == candidate.text) return candidate.value;
    }
    problem(fmt::format("'{}' has the unknown value '{}'", key, value));
    return words[0].value;
  }
  const Json& child(const char* key) {
    static const Json kEmpty = Json::object();
    const Json* value = find(key);
    if (value == nullptr) problem(fmt::format("'{}' is missing", key));
    return value != nullptr ? *value : kEmpty;
  }
  void problem(const std::string& text) {
    if (problem_.empty()) problem_ = what_ + ": " + text;
  }
  void take(const Status& status) {
    if (!status) problem(status.error().text);
  }
  Status status() const {
    if (problem_.empty()) return {};
    return fail(ErrorKind::Corrupt, "{}", problem_);
  }

 private:
  const Json* find(const char* key) const {
    if (!object_.is_object()) return nullptr;
    const auto it = object_.find(key);
    return it == object_.end() ? nullptr : &*it;
  }

  const Json& object_;
  std::string what_;
  std::string problem_;
};

Json to_json(const VolumeConfig& volume) {
  return {{"name", volume.name},
          {"path", volume.path},
          {"size", volume.size.value_or(0)},
          {"nbd", !volume.nbd           ? ""
                  : volume.nbd->is_unix ? volume.nbd->to_string()
                                        : "tcp:" + volume.nbd->to_string()},
          {"nbd_tls", word_of(kNbdTls, volume.nbd_tls)},
          {"tls_allow", volume.tls_allow},
          {"read_only", volume.read_only},
          {"description", volume.description},
          {"vhost_user_blk", volume.vhost_user_blk},
          {"queues", volume.queues},
          {"socket_owner", volume.socket_access.owner},
          {"socket_mode", volume.socket_access.mode},
          {"qmp", volume.qmp},
          {"aio", word_of(kAio, volume.aio)},
          {"cache", word_of(kCache, volume.cache)}};
}

Result<VolumeConfig> volume_from_json(const Json& value) {
  Fields fields(value, "volume");
  VolumeConfig volume;
  volume.name = fields.name("name");
  volume.path = fields.text("path");
  if (const uint64_t size = fields.number("size"); size > 0) volume.size = size;
  if (const std::string nbd = fields.text("nbd"); !nbd.empty()) {
    auto endpoint = Endpoint::parse(nbd);
    if (endpoint)
      volume.nbd = std::move(*endpoint);
    else
      fields.problem(endpoint.error().text);
  }
  if (fields.has("nbd_tls")) volume.nbd_tls = fields.word("nbd_tls", kNbdTls);
  if (fields.has("tls_allow")) {
    const Json& names = fields.child("tls_allow");
    if (!names.is_array()) fields.problem("'tls_allow' is not a list");
    for (const Json& name : names) {
      if (name.is_string() && !name.get<std::string>().empty())
        volume.tls_allow.push_back(name.get<std::string>());
      else
        fields.problem("a name of 'tls_allow' is no text");  // left out, it would open the export to everybody
    }
  }
  if (fields.has("read_only")) volume.read_only = fields.flag("read_only");
  if (fields.has("description")) volume.description = fields.text("description");
  if (!is_valid_description(volume.description)) fields.problem("'description' is no short plain text");
  if (fields.has("vhost_user_blk")) volume.vhost_user_blk = fields.text("vhost_user_blk");
  if (fields.has("queues")) {
    const uint64_t queues = fields.number("queues");
    if (queues > kVhostQueuesMax) fields.problem(fmt::format("'queues' is {}", queues));
    volume.queues = static_cast<uint16_t>(queues);
  }
  if (fields.has("socket_owner")) volume.socket_access.owner = fields.text("socket_owner");
  if (fields.has("socket_mode")) {
    const uint64_t mode = fields.number("socket_mode");
    if (mode > 0777) fields.problem(fmt::format("'socket_mode' is {}", mode));
    volume.socket_access.mode = static_cast<mode_t>(mode & 0777U);
  }
  volume.qmp = fields.text("qmp");
  volume.aio = fields.word("aio", kAio);
  volume.cache = fields.word("cache", kCache);
  if (auto status = fields.status(); !status) return tl::unexpected(status.error());
  return volume;
}

Json to_json(const ProcessIdentity& identity) {
  return {
      {"pid", static_cast<uint64_t>(identity.pid)}, {"start_time", identity.start_time}, {"boot_id", identity.boot_id}};
}

Json to_json(const GroupRecord& group) {
  return {{"id", group.id.to_string()},
          {"members", group.members},
          {"peer", group.peer},
          {"left", group.left.to_string()},
          {"replication",
           {{"active", group.replication.active},
            {"paused", group.replication.paused},
            {"mode", group.replication.mode},
            {"rpo_ns", static_cast<uint64_t>(group.replication.rpo)},
            {"bandwidth", group.replication.bandwidth},
            {"overwrite_peer", group.replication.overwrite_peer}}},
          {"ownership", to_json(group.ownership)}};
}

Result<GroupRecord> group_from_json(const Json& value) {
  Fields fields(value, "group");
  GroupRecord group;
  group.id = fields.id("id");
  const Json& members = fields.child("members");
  if (!members.is_array() || members.empty()) fields.problem("'members' is not a list of names");
  for (const Json& member : members) {
    if (!member.is_string() || !is_valid_name(member.get<std::string>())) {
      fields.problem("a member is not a name");
      break;
    }
    group.members.push_back(member.get<std::string>());
  }
  group.peer = fields.text("peer");
  if (value.is_object() && value.contains("left")) group.left = fields.id("left");  // younger than the format
  Fields replication(fields.child("replication"), "replication");
  group.replication.active = replication.flag("active");
  group.replication.paused = replication.flag("paused");
  group.replication.mode = replication.text("mode");
  group.replication.rpo = static_cast<Nanoseconds>(replication.number("rpo_ns") & INT64_MAX);
  group.replication.bandwidth = replication.number("bandwidth");
  group.replication.overwrite_peer = replication.flag("overwrite_peer");
  fields.take(replication.status());
  auto ownership = ownership_from_json(fields.child("ownership"));
  if (ownership)
    group.ownership = std::move(*ownership);
  else
    fields.problem(ownership.error().text);
  if (auto status = fields.status(); !status) return tl::unexpected(status.error());
  return group;
}

Json to_json(const std::string& volume, const AttachmentRecord& attachment) {
  return {{"volume", volume},
          {"device", attachment.device},
          {"identifier", attachment.identifier},
          {"connections", attachment.connections},
          {"dead_timeout_s", attachment.dead_timeout_s},
          {"request_timeout_s", attachment.request_timeout_s}};
}

uint32_t small_number(Fields& fields, const char* key) {
  const uint64_t value = fields.number(key);
  if (value > INT32_MAX) fields.problem(fmt::format("'{}' is {}", key, value));
  return static_cast<uint32_t>(value & INT32_MAX);
}

Status take_attachment(const Json& value, NodeRecord& record) {
  Fields fields(value, "attachment");
  const std::string volume = fields.name("volume");
  AttachmentRecord attachment;
  attachment.device = fields.text("device");
  attachment.identifier = fields.text("identifier");
  attachment.connections = small_number(fields, "connections");
  attachment.dead_timeout_s = small_number(fields, "dead_timeout_s");
  attachment.request_timeout_s = small_number(fields, "request_timeout_s");
  if (attachment.device.empty()) fields.problem("'device' is empty");
  if (attachment.identifier.empty()) fields.problem("'identifier' is empty");
  if (attachment.connections < 1 || attachment.connections > kAttachConnectionsMax) {
    fields.problem(fmt::format("'connections' is {}", attachment.connections));
  }
  if (auto status = fields.status(); !status) return status;
  if (!record.attachments.emplace(volume, std::move(attachment)).second) {
    return fail(ErrorKind::Corrupt, "attachment: volume '{}' has two", volume);
  }
  return {};
}

Json to_json(const Id128& attempt, const HookRecord& hook) {
  return {{"attempt", attempt.to_string()},
          {"volumes", hook.volumes},
          {"peer", hook.peer},
          {"guest_running", hook.guest_running},
          {"starts", hook.starts}};
}

Result<std::pair<Id128, HookRecord>> hook_from_json(const Json& value) {
  Fields fields(value, "hook");
  HookRecord hook;
  const Id128 attempt = fields.id("attempt");
  const Json& volumes = fields.child("volumes");
  if (!volumes.is_array() || volumes.empty()) fields.problem("'volumes' is not a list of names");
  for (const Json& volume : volumes) {
    if (!volume.is_string() || !is_valid_name(volume.get<std::string>())) {
      fields.problem("a volume is not a name");
      break;
    }
    hook.volumes.push_back(volume.get<std::string>());
  }
  hook.peer = fields.text("peer");
  hook.guest_running = fields.flag("guest_running");
  hook.starts = fields.number("starts");
  if (auto status = fields.status(); !status) return tl::unexpected(status.error());
  return std::pair(attempt, std::move(hook));
}

}  // namespace

Json to_json(const Ownership& o) {
  return {{"role", word_of(kRoles, o.role)},
          {"owner", word_of(kOwners, o.owner)},
          {"state", word_of(kStates, o.state)},
          {"term", o.term},
          {"attempt", o.attempt.to_string()},
          {"split_brain", o.split_brain},
          {"forced", o.forced},
          {"guest_was_running", o.guest_was_running},
          {"wrote", o.wrote},
          {"detach", o.detach},
          {"quit_source", o.quit_source},
          {"qmp_path", o.qmp_path},
          {"capabilities", o.capabilities},
          {"qemu", to_json(o.qemu)},
          {"reason", o.reason}};
}

Result<Ownership> ownership_from_json(const Json& value) {
  Fields fields(value, "ownership");
  Ownership o;
  o.role = fields.word("role", kRoles);
  o.owner = fields.word("owner", kOwners);
  o.state = fields.word("state", kStates);
  o.term = fields.number("term");
  o.attempt = fields.id("attempt");
  o.split_brain = fields.flag("split_brain");
  o.forced = fields.flag("forced");
  o.guest_was_running = fields.flag("guest_was_running");
  o.wrote = fields.flag("wrote");
  o.detach = fields.flag("detach");
  o.quit_source = fields.flag("quit_source");
  o.qmp_path = fields.text("qmp_path");
  if (fields.has("capabilities")) o.capabilities = fields.text("capabilities");
  Fields qemu(fields.child("qemu"), "qemu");
  o.qemu.pid = static_cast<int64_t>(qemu.number("pid") & INT64_MAX);
  o.qemu.start_time = qemu.number("start_time");
  o.qemu.boot_id = qemu.text("boot_id");
  fields.take(qemu.status());
  o.reason = fields.text("reason");
  if (auto status = fields.status(); !status) return tl::unexpected(status.error());
  return o;
}

Json to_json(const NodeRecord& record) {
  Json volumes = Json::array();
  for (const auto& [name, volume] : record.volumes) volumes.push_back(to_json(volume));
  Json groups = Json::array();
  for (const auto& [id, group] : record.groups) groups.push_back(to_json(group));
  Json attachments = Json::array();
  for (const auto& [volume, attachment] : record.attachments) attachments.push_back(to_json(volume, attachment));
  Json hooks = Json::array();
  for (const auto& [attempt, hook] : record.hooks) hooks.push_back(to_json(attempt, hook));
  return {{"format", 1U},         {"node", record.node.to_string()}, {"volumes", volumes},
          {"groups", groups},     {"attachments", attachments},      {"hooks", hooks},
          {"peers", record.peers}};
}

Result<NodeRecord> node_record_from_json(const Json& value) {
  Fields fields(value, "node state");
  NodeRecord record;
  if (fields.number("format") != 1) fields.problem("'format' is not 1: written by a newer version");
  record.node = fields.id("node");
  const Json& volumes = fields.child("volumes");
  const Json& groups = fields.child("groups");
  if (!volumes.is_array() || !groups.is_array()) fields.problem("'volumes' or 'groups' is not a list");
  for (const Json& item : volumes) {
    auto volume = volume_from_json(item);
    if (volume)
      record.volumes.emplace(volume->name, std::move(*volume));
    else
      fields.problem(volume.error().text);
  }
  for (const Json& item : groups) {
    auto group = group_from_json(item);
    if (group)
      record.groups.emplace(group->id, std::move(*group));
    else
      fields.problem(group.error().text);
  }
  if (fields.has("attachments")) {  // younger than the format
    const Json& attachments = fields.child("attachments");
    if (!attachments.is_array()) fields.problem("'attachments' is not a list");
    for (const Json& item : attachments) fields.take(take_attachment(item, record));
  }
  if (fields.has("hooks")) {  // younger than the format
    const Json& hooks = fields.child("hooks");
    if (!hooks.is_array()) fields.problem("'hooks' is not a list");
    for (const Json& item : hooks) {
      auto hook = hook_from_json(item);
      if (hook)
        record.hooks.insert(std::move(*hook));
      else
        fields.problem(hook.error().text);
    }
  }
  record.peers = fields.child("peers");
  if (auto status = fields.status(); !status) return tl::unexpected(status.error());
  return record;
}

}  // namespace vmferry
