// SPDX-License-Identifier: Apache-2.0
//
// The node record as JSON, with every field checked on the way in: a file that was tampered with or half understood
// must stop the start, not become a wrong role.
#pragma once

#include "engine/daemon/node_state.h"

namespace vmferry {

Json to_json(const Ownership& ownership);
Result<Ownership> ownership_from_json(const Json& value);

}  // namespace vmferry
