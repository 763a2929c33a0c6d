// SPDX-License-Identifier: Apache-2.0
#include "engine/replicate/pairing.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "engine/base/json_integer.h"

namespace vmferry {

namespace {

InviteBook::Verdict refusal(JoinResult result, std::string text) {
  return {.result = result, .text = std::move(text), .grants = kNoRights, .changed = false};
}

template <size_t N>
bool read_hex(const nlohmann::json& json, std::array<uint8_t, N>& out) {
  const Bytes raw = from_hex(json.get<std::string>());
  if (raw.size() != N) return false;
  std::copy(raw.begin(), raw.end(), out.begin());
  return true;
}

}  // namespace

void InviteBook::forget_old(int64_t now_s) {
  std::erase_if(invites_, [&](const Invite& invite) { return invite.expires_s + kRememberS < now_s; });
}

Result<PairingToken> InviteBook::issue(const KeyHash& our_key, std::vector<std::string> addresses,
                                       const PeerRights& grants, int64_t now_s) {
  forget_old(now_s);
  if (invites_.size() >= kTokensMax) {
    // Spent ones make room first; open ones never do.
    const auto spent = std::find_if(invites_.begin(), invites_.end(), [&](const Invite& invite) {
      return invite.used || invite.wrong_tries >= kTriesMax || invite.expires_s < now_s;
    });
    if (spent == invites_.end()) {
      return fail(ErrorKind::LimitExceeded, "{} tokens are open: wait until some expire", kTokensMax);
    }
    invites_.erase(spent);
  }
  PairingToken token{.inviter_key = our_key, .secret = random_token_secret(), .addresses = std::move(addresses)};
  const TokenSecret id_source = random_token_secret();
  std::copy_n(id_source.begin(), token.id.size(), token.id.begin());
  const auto verifier = token_verifier(token.secret);
  if (!verifier) return tl::unexpected(verifier.error());
  invites_.push_back({.id = token.id, .verifier = *verifier, .grants = grants, .expires_s = now_s + kLifetimeS});
  return token;
}

InviteBook::Verdict InviteBook::judge(const JoinRequest& request, ByteSpan statement, int64_t now_s) {
  forget_old(now_s);
  const auto found =
      std::find_if(invites_.begin(), invites_.end(), [&](const Invite& invite) { return invite.id == request.token; });
  if (found == invites_.end()) {
    return refusal(JoinResult::Unknown,
                   "the token is not known here: it was made by another daemon or is long expired");
  }
  // Used, dead and expired come before the proof: none of them may be probed further.
  if (found->used) {
    return refusal(JoinResult::Used,
                   fmt::format("the token was used already{}; a token works once, make a new one with 'peer invite'",
                               found->used_by.empty() ? "" : ", by peer '" + found->used_by + "'"));
  }
  if (found->wrong_tries >= kTriesMax) {
    return refusal(JoinResult::Dead, fmt::format("the token is dead after {} wrong tries; make a new one with "
                                                 "'peer invite'",
                                                 kTriesMax));
  }
  if (now_s >= found->expires_s) {
    return refusal(JoinResult::Expired, fmt::format("the token expired {} s ago; make a new one with 'peer invite'",
                                                    now_s - found->expires_s));
  }
  if (!verify_token_proof(found->verifier, statement, request.proof)) {
    ++found->wrong_tries;
    Verdict verdict = refusal(JoinResult::WrongProof,
                              fmt::format("the token's secret is wrong; {} tries are left before the token is dead",
                                          kTriesMax - found->wrong_tries));
    verdict.changed = true;  // a restart of the daemon must not give the tries back
    return verdict;
  }
  found->used = true;
  return {.result = JoinResult::Ok, .text = {}, .grants = found->grants, .changed = true};
}

void InviteBook::note_user(const TokenId& id, const std::string& peer_name) {
  for (Invite& invite : invites_) {
    if (invite.id == id) invite.used_by = peer_name;
  }
}

nlohmann::json InviteBook::to_json() const {
  nlohmann::json out = nlohmann::json::array();
  for (const Invite& invite : invites_) {
    out.push_back({{"id", to_hex(invite.id)},
                   {"verifier", to_hex(invite.verifier)},
                   {"grants", to_bits(invite.grants)},
                   {"expires_s", invite.expires_s},
                   {"wrong_tries", invite.wrong_tries},
                   {"used", invite.used},
                   {"used_by", invite.used_by}});
  }
  return out;
}

Result<InviteBook> InviteBook::from_json(const nlohmann::json& json) {
  if (!json.is_array() || json.size() > kTokensMax) return fail(ErrorKind::Corrupt, "the list of tokens is malformed");
  InviteBook book;
  for (const nlohmann::json& entry : json) {
    try {
      Invite invite;
      const bool hex_ok = read_hex(entry.at("id"), invite.id) && read_hex(entry.at("verifier"), invite.verifier);
      if (!hex_ok) return fail(ErrorKind::Corrupt, "a stored token is malformed");
      invite.grants = rights_from_bits(integer_at<uint8_t>(entry, "grants"));
      invite.expires_s = integer_at<int64_t>(entry, "expires_s");
      invite.wrong_tries = integer_at<uint32_t>(entry, "wrong_tries");
      invite.used = entry.at("used").get<bool>();
      invite.used_by = entry.at("used_by").get<std::string>();
      book.invites_.push_back(std::move(invite));
    } catch (const nlohmann::json::exception& error) {
      return fail(ErrorKind::Corrupt, "stored token: {}", error.what());
    }
  }
  return book;
}

}  // namespace vmferry
