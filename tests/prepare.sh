# SPDX-License-Identifier: Apache-2.0
# Sourced by tests/run, tools/demo and perf/run: installs what is missing with apt, configures and builds.
# Expects `root` (top of the checkout). Works as root or with sudo.

vf_build_packages="g++ cmake ninja-build pkg-config ccache liburing-dev libaio-dev libssl-dev libzstd-dev libxxhash-dev \
 libgtest-dev libgmock-dev libcli11-dev libtomlplusplus-dev nlohmann-json3-dev libspdlog-dev libfmt-dev libsystemd-dev \
 libexpected-dev libnl-genl-3-dev"
vf_guest_packages="python3 qemu-system-x86 qemu-utils busybox-static cpio zstd e2fsprogs iproute2 iputils-ping kmod"
vf_test_packages="$vf_guest_packages fio libnbd-bin python3-libnbd nbdkit iperf3 procps spin openssl clang-format-14 systemd binutils util-linux"
vf_perf_packages="fio nbdkit nbd-server"
vf_sanitize_packages="clang-14 libclang-rt-14-dev llvm-14"

vf_say() { printf '== %s\n' "$*"; }

vf_die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# As root, or through sudo when there is one.
vf_as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; return; fi
  command -v sudo >/dev/null || vf_die "needs root for: $* (run as root, or install sudo)"
  sudo "$@"
}

# Installs those of the named packages that are missing; touches the network only then.
vf_install() {
  command -v apt-get >/dev/null || vf_die "needs apt-get (Debian 12) to install: $*"
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return 0
  vf_say "installing ${missing[*]}"
  vf_as_root apt-get -qq update || vf_die "apt-get update failed; is a package mirror reachable?"
  vf_as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" \
    >/dev/null || vf_die "apt-get could not install: ${missing[*]}"
}

# vf_build FOLDER [cmake options and -- targets...]
vf_build() {
  local folder=$1 options=() targets=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
  [ "${1:-}" = -- ] && { shift; targets=("$@"); }
  vf_say "building ${folder#"$root"/}"
  local log
  log=$(mktemp)
  if ! cmake -S "$root" -B "$folder" -G Ninja "${options[@]}" >"$log" 2>&1; then
    cat "$log"; rm -f "$log"; vf_die "cmake failed in $folder"
  fi
  if ! ninja -C "$folder" "${targets[@]}" >"$log" 2>&1; then
    grep -vE '^\[[0-9]+/[0-9]+\] (Building|Linking)' "$log" | tail -60; rm -f "$log"; vf_die "the build failed in $folder"
  fi
  tail -1 "$log"; rm -f "$log"
}
