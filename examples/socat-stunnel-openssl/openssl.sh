#!/bin/sh
# Joins a route with openssl s_client and connects standard input and output with the other function's:
#
#   RELAY=127.0.0.1:9001 CERT=func1.pem KEY=func1.key CA=ca.pem ./openssl.sh
#
# Use it to look and to test. It stops when the other function ends its direction, not when its own input ends.
set -eu
name=${RELAY_NAME:-${RELAY%:*}} # the name or IP address in the relay's certificate; an IP address is not sent as SNI
# The certificate has it without the brackets of [::1] and without a final dot, as in relay.example.
name=${name#[}; name=${name%]}; name=${name%.}

is_ip() { case $1 in *:*) ;; *[!0-9.]*) return 1 ;; esac; }
if is_ip "$name"; then set -- -noservername -verify_ip "$name"; else set -- -servername "$name" -verify_hostname "$name"; fi

exec openssl s_client -quiet -tls1_3 -connect "$RELAY" "$@" -verify_return_error -cert "$CERT" -key "$KEY" -CAfile "$CA"
