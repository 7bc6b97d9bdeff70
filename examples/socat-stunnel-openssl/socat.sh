#!/bin/sh
# Joins a route with socat and connects standard input and output with the other function's:
#
#   RELAY=127.0.0.1:9001 CERT=func1.pem KEY=func1.key CA=ca.pem ./socat.sh
#
# With FRONT=TCP-LISTEN:5432,bind=127.0.0.1,reuseaddr it waits for one local connection instead.
set -eu
name=${RELAY_NAME:-${RELAY%:*}} # the name in the relay's certificate

# -t: how many seconds one direction may go on after the other has ended; socat's own limit is half a second.
exec socat -t 3600 "${FRONT:--}" \
    "OPENSSL:$RELAY,cert=$CERT,key=$KEY,cafile=$CA,snihost=$name,commonname=$name,openssl-min-proto-version=TLS1.3"
