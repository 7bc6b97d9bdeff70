#!/bin/sh
# Joins a route with openssl s_client and connects standard input and output with the other function's:
#
#   RELAY=127.0.0.1:9001 CERT=func1.pem KEY=func1.key CA=ca.pem ./openssl.sh
#
# For a look and a test. It takes the end of what comes in for the end of all, and goes on after that of its own input.
set -eu
name=${RELAY_NAME:-${RELAY%:*}} # what the relay's certificate must have: a name, or an IP address, which has no SNI
# There it stands without the brackets of [::1] and without the last dot of relay.example.
name=${name#[}; name=${name%]}; name=${name%.}

is_ip() { case $1 in *:*) ;; *[!0-9.]*) return 1 ;; esac; }
if is_ip "$name"; then set -- -noservername -verify_ip "$name"; else set -- -servername "$name" -verify_hostname "$name"; fi

exec openssl s_client -quiet -tls1_3 -connect "$RELAY" "$@" -verify_return_error -cert "$CERT" -key "$KEY" -CAfile "$CA"
