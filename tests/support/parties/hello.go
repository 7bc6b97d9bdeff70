// The oldest kind of client, as it is in the wild (docs/protocol.md, hello hand-off): mTLS to the relay without ALPN, one
// line, one read, and from there on it takes the TCP connection for the other function's.
//
//	hello RELAY CERT KEY CA client|server
//
// As the client of the inner TLS it sends 256 KiB and wants the same back; as its server it sends back what comes.
package main

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"os"
)

func main() {
	log.SetFlags(0)
	relay, role := os.Args[1], os.Args[5]
	certificate, err := tls.LoadX509KeyPair(os.Args[2], os.Args[3])
	check("certificate", err)
	pem, err := os.ReadFile(os.Args[4])
	check("CA", err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)

	conn, err := net.Dial("tcp", relay)
	check("dial", err)
	outer := tls.Client(conn, &tls.Config{
		Certificates: []tls.Certificate{certificate},
		RootCAs:      pool,
		ServerName:   "localhost",
	})
	check("outer handshake", outer.Handshake())
	_, err = outer.Write([]byte("Hello\n"))
	check("hello", err)
	answer := make([]byte, 256)
	n, err := outer.Read(answer)
	check("echo", err)
	if string(answer[:n]) != "Hello\n" {
		log.Fatalf("echo: %q", answer[:n])
	}

	// Here it forgets the outer TLS, with whatever crypto/tls may have read ahead.
	if role == "client" {
		inner := tls.Client(conn, &tls.Config{
			Certificates: []tls.Certificate{certificate},
			RootCAs:      pool,
			ServerName:   "func2.demo",
		})
		check("inner handshake", inner.Handshake())
		data := make([]byte, 256*1024)
		rand.Read(data)
		go inner.Write(data)
		echo := make([]byte, len(data))
		_, err = io.ReadFull(inner, echo)
		check("inner read", err)
		if !bytes.Equal(data, echo) {
			log.Fatal("the other function's echo is not what was sent")
		}
		check("inner close", inner.Close())
		fmt.Println("all came back")
		return
	}
	inner := tls.Server(conn, &tls.Config{
		Certificates: []tls.Certificate{certificate},
		ClientCAs:    pool,
		ClientAuth:   tls.RequireAndVerifyClientCert,
	})
	check("inner handshake", inner.Handshake())
	count, err := io.Copy(inner, inner)
	check("inner copy", err)
	fmt.Println("echoed", count)
}

func check(what string, err error) {
	if err != nil {
		log.Fatalf("%s: %v", what, err)
	}
}
