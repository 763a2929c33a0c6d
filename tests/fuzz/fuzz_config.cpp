// SPDX-License-Identifier: Apache-2.0
//
// What an operator, a local client or a damaged state file can hand to the daemon: TOML and options, the node record,
// the list of peers, JSON-RPC lines, and the small durable records.
//
// The first byte chooses the decoder. A configuration without problems must hold what the daemon relies on; a record
// that is accepted must survive being written again, or a restart would change a role or forget a peer.

#include "engine/base/id.h"
#include "engine/control/config.h"
#include "engine/daemon/node_state.h"
#include "engine/replicate/peer_directory.h"
#include "engine/replicate/replica_state.h"
#include "engine/track/metadata_layout.h"
#include "netproto/rpc/json_rpc.h"
#include "tests/fuzz/require.h"

namespace vmferry {
namespace {

void check_problems(const std::vector<ConfigProblem>& problems) {
  for (const ConfigProblem& problem : problems) require(!problem.text.empty());
}

void check_volume(const VolumeConfig& volume) {
  require(is_valid_name(volume.name) && !volume.path.empty());
  require(volume.path.find('\0') == std::string::npos);
  require(!volume.size || (*volume.size > 0 && *volume.size % 512 == 0));
  require(is_valid_description(volume.description));
}

void toml(std::string_view text) {
  DaemonConfig config;
  std::vector<ConfigProblem> problems;
  apply_toml(text, "fuzz.toml", config, problems);
  check_problems(problems);
  if (!problems.empty()) return;
  for (const VolumeConfig& volume : config.volumes) check_volume(volume);
  require(config.nbd_limits.connections >= 1 && config.nbd_limits.connections <= 65535);
  require(config.nbd_limits.handshake_timeout >= kSecond && config.nbd_limits.handshake_timeout <= 600 * kSecond);
}

void volume_option(std::string_view text) {
  std::vector<ConfigProblem> problems;
  const VolumeConfig volume = parse_volume_option(text, "--volume", problems);
  check_problems(problems);
  if (problems.empty()) check_volume(volume);
}

// One argument per line. --config is left out: it would read files of this machine.
void options(std::string_view text) {
  std::vector<std::string> arguments;
  while (!text.empty()) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    if (!line.starts_with("--config")) arguments.emplace_back(line);
  }
  const ConfigOutcome outcome = load_config(arguments);
  check_problems(outcome.problems);
  if (!outcome.problems.empty() || !outcome.help.empty()) return;
  require(!outcome.config.state_dir.empty() && !outcome.config.control_path.empty());
  for (const VolumeConfig& volume : outcome.config.volumes) {
    check_volume(volume);
    // Only the whole configuration shows whether an export is encrypted.
    require(!volume.nbd || volume.nbd->is_loopback() ||
            nbd_tls_of(outcome.config.nbd_tls, volume) == NbdTlsSetting::Require);
  }
}

void node_record(std::string_view text) {
  const auto json = parse_json(text);
  if (!json) return;
  const auto record = node_record_from_json(*json);
  if (!record) return;
  const Json written = to_json(*record);
  const auto again = node_record_from_json(written);
  require(again && to_json(*again) == written);
}

void peers(std::string_view text) {
  const auto json = parse_json(text);
  if (!json) return;
  const auto directory = PeerDirectory::from_json(*json);
  if (!directory) return;
  require(directory->peers().size() <= PeerDirectory::kPeersMax);
  const Json written = directory->to_json();
  const auto again = PeerDirectory::from_json(written);
  require(again && again->to_json() == written);
}

// What one message of the control socket becomes, as the daemon (requests) and the client (responses) read it.
void rpc_message(const Json& value) {
  require(to_json_line(value).back() == '\n');
  if (const auto request = rpc::decode_request(value)) {
    const auto again = rpc::decode_request(rpc::encode_request(request->id, request->method, request->params));
    require(again && again->method == request->method && again->params == request->params);
    to_json_line(rpc::encode_error(request->id, rpc::kMethodNotFound, request->method));
  }
  if (const auto response = rpc::decode_response(value)) require(response->is_error || response->text.empty());
}

// Fed whole and byte by byte: where the socket cuts must not matter.
void rpc_stream(ByteSpan stream) {
  const JsonLimits limits{.line_size_max = 2048, .depth_max = 8};
  JsonLineReader whole(limits);
  JsonLineReader bytes(limits);
  std::vector<Json> from_whole;
  std::vector<Json> from_bytes;
  const bool whole_ok = whole.feed(stream, from_whole).has_value();
  bool bytes_ok = true;
  for (size_t i = 0; i < stream.size(); ++i) {
    const bool fed = bytes.feed(stream.subspan(i, 1), from_bytes).has_value();
    require(bytes_ok || !fed);  // an error is final
    bytes_ok = fed;
  }
  require(whole_ok == bytes_ok && from_whole == from_bytes);
  for (const Json& value : from_whole) rpc_message(value);
}

void disk_records(ByteSpan bytes) {
  if (const auto record = decode_replica_record(bytes)) {
    const Bytes again = encode(*record);
    require(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()));
  }
  if (const auto superblock = track::decode_superblock(bytes)) {
    const auto again = track::decode_superblock(track::encode(*superblock));
    require(again && *again == *superblock);
  }
}

}  // namespace
}  // namespace vmferry

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vmferry;
  if (size == 0) return 0;
  const ByteSpan input(data + 1, size - 1);
  switch (data[0]) {
    case 't':
      toml(as_text(input));
      break;
    case 'v':
      volume_option(as_text(input));
      break;
    case 'o':
      options(as_text(input));
      break;
    case 'n':
      node_record(as_text(input));
      break;
    case 'p':
      peers(as_text(input));
      break;
    case 'r':
      rpc_stream(input);
      break;
    case 'd':
      disk_records(input);
      break;
    default:
      break;
  }
  return 0;
}
