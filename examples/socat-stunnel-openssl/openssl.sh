#!/bin/sh
# Joins a route with openssl s_client and connects standard input and output with the other function's:
#
#   RELAY=127.0.0.1:9001 CERT=func1.pem KEY=func1.key CA=ca.pem ./openssl.sh
#
# For a look and a test. It takes the end of what comes in for the end of all, and goes on after that of its own input.
set -eu
name=${RELAY_NAME:-${RELAY%:*}} # the name in the relay's certificate

exec openssl s_client -quiet -tls1_3 -connect "$RELAY" -servername "$name" -verify_hostname "$name" -verify_return_error \
    -cert "$CERT" -key "$KEY" -CAfile "$CA"
