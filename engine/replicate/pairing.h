// SPDX-License-Identifier: Apache-2.0
//
// The tokens that this daemon has given out, and whether a JoinRequest is good. Design section 10: single use,
// 15 minutes, dead after 5 wrong tries; only the verifier of the secret is kept.
//
// Flow: PeerService::invite() and its handling of JoinRequest. Threads: the executor's thread.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "netproto/repl/pairing.h"

namespace vmferry {

class InviteBook {
 public:
  static constexpr int64_t kLifetimeS = 15 * 60;
  static constexpr uint32_t kTriesMax = 5;
  // Spent tokens are remembered for a day, so that whoever comes with one is told what happened to it.
  static constexpr int64_t kRememberS = 24 * 3600;
  static constexpr size_t kTokensMax = 64;

  struct Verdict {
    JoinResult result = JoinResult::Unknown;
    std::string text{};    // one sentence, when not Ok
    PeerRights grants{};   // when Ok
    bool changed = false;  // the book has to be made durable
  };

  // Times are seconds since 1970. LimitExceeded: kTokensMax open tokens.
  Result<PairingToken> issue(const KeyHash& our_key, std::vector<std::string> addresses, const PeerRights& grants,
                             int64_t now_s);

  // Judges a request and counts a wrong try. `statement` is join_statement() of this session. Ok uses the token up:
  // nobody else gets in with it, whatever becomes of this joiner.
  Verdict judge(const JoinRequest& request, ByteSpan statement, int64_t now_s);

  // For the text that later users of the token are told.
  void note_user(const TokenId& id, const std::string& peer_name);

  nlohmann::json to_json() const;
  static Result<InviteBook> from_json(const nlohmann::json& json);

 private:
  struct Invite {
    TokenId id{};
    TokenVerifier verifier{};
    PeerRights grants{};
    int64_t expires_s = 0;
    uint32_t wrong_tries = 0;
    bool used = false;
    std::string used_by{};
  };
  void forget_old(int64_t now_s);
  std::vector<Invite> invites_;
};

}  // namespace vmferry
