#!/bin/sh
# Makes the agent beside this file a service of this machine. Needs root, or sudo.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ "$(id -u)" != 0 ]; then
    if [ -t 0 ]; then exec sudo sh "$here/install.sh"; fi
    exec sudo -n sh "$here/install.sh"
fi
if ! command -v systemctl >/dev/null; then
    echo "hutch: this machine has no systemd; start the agent at boot by other means: see unit" >&2
    exit 1
fi
mkdir -p /usr/local/lib/hutch
# By rename: the one that is there may be running.
cp "$here/agent" /usr/local/lib/hutch/hutch-agent.new
chmod 0755 /usr/local/lib/hutch/hutch-agent.new
mv /usr/local/lib/hutch/hutch-agent.new /usr/local/lib/hutch/hutch-agent
cp "$here/unit" /etc/systemd/system/hutch-agent.service
chmod 0644 /etc/systemd/system/hutch-agent.service
systemctl daemon-reload
systemctl enable hutch-agent.service
echo "hutch: installed $(/usr/local/lib/hutch/hutch-agent --version); shut this machine down and take a snapshot of it"
