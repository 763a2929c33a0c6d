// SPDX-License-Identifier: Apache-2.0
//
// The methods of the control socket, by subject: each reads its parameters, calls the daemon, shapes the answer.
// Threads: the reactor's.
#pragma once

namespace vmferry {

class Daemon;
class RpcServer;

void add_volume_methods(RpcServer& server, Daemon& daemon);
void add_peer_methods(RpcServer& server, Daemon& daemon);
void add_replicate_methods(RpcServer& server, Daemon& daemon);
void add_migrate_methods(RpcServer& server, Daemon& daemon);
void add_attach_methods(RpcServer& server, Daemon& daemon);
void add_role_methods(RpcServer& server, Daemon& daemon);

}  // namespace vmferry
