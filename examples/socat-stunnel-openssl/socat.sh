#!/bin/sh
# Joins a route with socat and connects standard input and output with the other function's:
#
#   RELAY=127.0.0.1:9001 CERT=func1.pem KEY=func1.key CA=ca.pem ./socat.sh
#
# With FRONT=TCP-LISTEN:5432,bind=127.0.0.1,reuseaddr it waits for one local connection instead.
set -eu
name=${RELAY_NAME:-${RELAY%:*}} # the name or IP address in the relay's certificate; an IP address is not sent as SNI
# The certificate has it without the brackets of [::1] and without a final dot, as in relay.example.
name=${name#[}; name=${name%]}; name=${name%.}

is_ip() { case $1 in *:*) ;; *[!0-9.]*) return 1 ;; esac; }
if is_ip "$name"; then sni=no-sni=1; else sni=snihost=$name; fi

# -t: how many seconds one direction may go on after the other has ended; by default half a second.
exec socat -t 3600 "${FRONT:--}" \
    "OPENSSL:$RELAY,cert=$CERT,key=$KEY,cafile=$CA,$sni,commonname=$name,openssl-min-proto-version=TLS1.3"
