#!/bin/sh
# Joins a route with stunnel and connects standard input and output with the other function's:
#
#   RELAY=127.0.0.1:9001 CERT=func1.pem KEY=func1.key CA=ca.pem ./stunnel.sh
#
# With ACCEPT=127.0.0.1:5432 it is a service instead: each local connection there joins the route.
set -eu
name=${RELAY_NAME:-${RELAY%:*}} # the name in the relay's certificate

# With a section it listens, without one it uses standard input and output. TIMEOUTclose: how many seconds one direction
# may go on after the other has ended. The exit code says nothing: stunnel leaves with 0 also where the relay is not trusted.
exec stunnel -fd 3 3<<CONFIG
client = yes
foreground = yes
debug = warning
syslog = no
pid =
${ACCEPT:+[frelay]}
${ACCEPT:+accept = $ACCEPT}
connect = $RELAY
cert = $CERT
key = $KEY
CAfile = $CA
sni = $name
verifyChain = yes
checkHost = $name
sslVersionMin = TLSv1.3
TIMEOUTclose = 3600
CONFIG
