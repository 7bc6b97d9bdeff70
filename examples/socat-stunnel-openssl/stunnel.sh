#!/bin/sh
# Joins a route with stunnel and connects standard input and output with the other function's:
#
#   RELAY=127.0.0.1:9001 CERT=func1.pem KEY=func1.key CA=ca.pem ./stunnel.sh
#
# With ACCEPT=127.0.0.1:5432 it listens there instead, and each local connection joins the route.
set -eu
name=${RELAY_NAME:-${RELAY%:*}} # the name or IP address in the relay's certificate; an IP address is not sent as SNI
# The certificate has it without the brackets of [::1] and without a final dot, as in relay.example.
name=${name#[}; name=${name%]}; name=${name%.}

host=${RELAY%:*}
host=${host#[}; host=${host%]} # stunnel writes [::1]:9001 as ::1:9001

is_ip() { case $1 in *:*) ;; *[!0-9.]*) return 1 ;; esac; }
if is_ip "$name"; then check="checkIP = $name" sni=; else check="checkHost = $name" sni=$name; fi

# With a section stunnel listens; without one it uses standard input and output. TIMEOUTclose: how many seconds one
# direction may go on after the other has ended.
configuration() {
    cat <<CONFIG
client = yes
foreground = yes
debug = warning
syslog = no
pid =
$1
${ACCEPT:+[frelay]}
${ACCEPT:+accept = $ACCEPT}
connect = $host:${RELAY##*:}
cert = $CERT
key = $KEY
CAfile = $CA
sni = $sni
verifyChain = yes
$check
sslVersionMin = TLSv1.3
TIMEOUTclose = 3600
CONFIG
}

if [ -n "${ACCEPT:-}" ]; then
    exec stunnel -fd 3 3<<CONFIG
$(configuration "")
CONFIG
fi

# With one connection stunnel always exits with 0. So we look for an error in its log, where errors have level 3.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
exec 4<&0 # without it the background command would read /dev/null
stunnel -fd 3 <&4 4<&- 3<<CONFIG &
$(configuration "output = $log")
CONFIG
trap 'kill "$!"; exit 143' HUP INT TERM
wait "$!"
if grep -q ' LOG3' "$log"; then exit 1; fi
