#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Installs the servers and clients that the end-to-end tests drive. Idempotent, and silent when nothing is missing.
#
# The tests start every server themselves, inside private namespaces. So nothing may be left running or enabled on the machine: while
# apt works, policy-rc.d forbids it to start any service, and units of packages that this run installed are disabled again.
set -euo pipefail

packages=(
  apache2 ca-certificates chromium connect-proxy conntrack curl dante-server dnsutils docker.io docker-compose iperf3 iproute2 iptables iputils-ping knot-dnsutils lftp microsocks ncat
  netcat-openbsd nftables nghttp2-proxy openssh-client openssh-server openssl privoxy procps proxychains4 podman python3 python3-socks runc shadowsocks-libev socat
  squid-openssl stunnel4 tcpdump tinyproxy unbound util-linux vsftpd
)
# dnsutils is a transitional package on newer releases: the programs count, not the name.
satisfied() {
  [[ $1 == dnsutils ]] && command -v dig >/dev/null && return 0
  [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null || true) == installed ]]
}

missing=()
for p in "${packages[@]}"; do
  satisfied "$p" || missing+=("$p")
done
((${#missing[@]})) || exit 0

if [[ $(id -u) != 0 ]]; then
  echo "e2e/setup.sh: must be root to install: ${missing[*]}" >&2
  exit 1
fi
echo "e2e/setup.sh: installing ${missing[*]}"

policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 0755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi

export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
run() {
  "$@" >"$log" 2>&1 || {
    cat "$log" >&2
    exit 1
  }
}
run apt-get update -q
run apt-get install -y -q --no-install-recommends "${missing[@]}"
rm -f "$log"

# Installed by us just now, so nobody relies on it: it must not start at the next boot either.
declare -A units=(
  [apache2]=apache2.service [privoxy]=privoxy.service [shadowsocks-libev]=shadowsocks-libev.service [stunnel4]=stunnel.target
  [dante-server]=danted.service [squid-openssl]=squid.service [tinyproxy]=tinyproxy.service [unbound]=unbound.service
  [openssh-server]=ssh.service [microsocks]=microsocks.service [iperf3]=iperf3.service [vsftpd]=vsftpd.service [nftables]=nftables.service
)
if [[ -d /run/systemd/system ]]; then
  for p in "${missing[@]}"; do
    u=${units[$p]:-}
    [[ -z $u ]] || systemctl --quiet disable --now "$u" 2>/dev/null || true
  done
fi
