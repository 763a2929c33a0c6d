// SPDX-License-Identifier: Apache-2.0
//
// The proof that somebody holds a pairing token, without the verifier holding it.
//
// The 256-bit secret of a token is the seed of an Ed25519 key. The inviter keeps only its public half (`TokenVerifier`,
// a one-way image of the secret, so reading the state directory gains nothing); the joiner signs a statement that names
// the TLS session and both keys. See docs/replication-protocol.md section 3.
// Threads: pure functions.
#pragma once

#include <array>

#include "engine/base/bytes.h"
#include "engine/base/result.h"

namespace vmferry {

using TokenSecret = std::array<uint8_t, 32>;
using TokenVerifier = std::array<uint8_t, 32>;
using TokenProof = std::array<uint8_t, 64>;

TokenSecret random_token_secret();  // from the kernel's random source
Result<TokenVerifier> token_verifier(const TokenSecret& secret);
Result<TokenProof> sign_with_token(const TokenSecret& secret, ByteSpan statement);
bool verify_token_proof(const TokenVerifier& verifier, ByteSpan statement, const TokenProof& proof);

}  // namespace vmferry
