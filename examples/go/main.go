// Command frelay-party joins a route and connects its standard input and output with the other function's.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"frelay-party/frelay"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "frelay-party:", err)
		var refused *frelay.Refused
		if errors.As(err, &refused) {
			os.Exit(3)
		}
		os.Exit(1)
	}
}

func run() error {
	address := flag.String("relay", "127.0.0.1:9001", "the relay's `host:port`")
	cert := flag.String("cert", "", "this function's certificate, a PEM `file`")
	key := flag.String("key", "", "its key, a PEM `file`")
	ca := flag.String("ca", "", "who vouches for the relay and the other function, a PEM `file`")
	peer := flag.String("peer", "", "who the other function must be: `dns:NAME` or uri:URI")
	route := flag.String("route", "", "the route's `name`, where several share the address")
	party := flag.String("party", "", "`func1 or func2`, where the certificate fits both")
	meet := flag.String("meet", "", "a `key`: meet only a function that joins with it, too")
	var partner []string
	flag.Func("partner", "with -meet: a `name` that the relay must have verified; may be repeated", func(name string) error {
		partner = append(partner, name)
		return nil
	})
	ticket := flag.Bool("ticket", false, "leave the relay's TLS by ticket instead of by hand-off")
	wait := flag.Duration("wait", time.Minute, "for the other function")
	flag.Parse()

	certificate, err := tls.LoadX509KeyPair(*cert, *key)
	if err != nil {
		return err
	}
	pem, err := os.ReadFile(*ca)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("%s holds no certificate", *ca)
	}

	ctx, cancel := context.WithTimeout(context.Background(), *wait)
	defer cancel()
	wire, err := frelay.Connect(ctx, frelay.Config{
		Address:     *address,
		Certificate: certificate,
		RelayCA:     pool,
		Peer:        *peer,
		Route:       *route,
		Party:       *party,
		Meet:        *meet,
		Partner:     partner,
		UseTicket:   *ticket,
		OnStatus:    func(status string) { fmt.Fprintln(os.Stderr, status) },
	})
	if err != nil {
		return err
	}
	defer wire.Close()

	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(wire, os.Stdin)
		if err == nil {
			err = wire.CloseWrite() // ends our direction only
		}
		sent <- err
	}()
	if _, err := io.Copy(os.Stdout, wire); err != nil {
		return err
	}
	return <-sent
}
