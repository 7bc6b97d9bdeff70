// Package frelay joins a route of a frelay relay and returns a TLS connection to the other function. Copy this file; it
// needs the standard library only.
//
// A function dials the relay with its certificate, sends JOIN, and waits until the other function is there too. Then it
// leaves this outer TLS, because it wants TLS with the other function itself. There are two ways to leave
// (docs/protocol.md, sections 4 and 7):
//
// By hand-off. The relay writes PAIRED and its close_notify. We read up to that end and answer with our own
// close_notify; then the TCP connection is raw. crypto/tls reads ahead, so it could swallow bytes of the other function
// right behind the end. But the relay sends none before it has read our close_notify, and then we read no more TLS.
//
// By ticket. PAIRED holds a ticket. We send it on a second, plain TCP connection, and then that one is raw. This costs
// a round trip, and works with every TLS library.
package frelay

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Config names the route to join, this function's certificate, and the other function's name.
type Config struct {
	Address     string          // the relay's host:port
	ServerName  string          // the name in the relay's certificate; "": the host of Address
	Certificate tls.Certificate // this function's, for the relay and for the other function
	RelayCA     *x509.CertPool  // the CAs that issue the relay's certificate
	PeerCA      *x509.CertPool  // the CAs that issue the other function's; nil: RelayCA
	Peer        string          // the other function's name: "dns:NAME" or "uri:URI", exactly
	Route       string          // needed if several routes share the address
	Party       string          // "func1" or "func2", needed if the certificate fits both and there is no Meet
	Meet        string          // a key: meet only a function that joins with the same one; "": any without a key
	Partner     []string        // with Meet: names, of which the relay must have verified one; nil: any
	UseTicket   bool            // leave the outer TLS by ticket, not by hand-off
	OnStatus    func(status string)
}

// Refused means that the relay refused us. With a negative RetryAfter a retry cannot help until something is changed.
type Refused struct {
	Code, Reason string
	RetryAfter   time.Duration
}

// ErrRelayTooOld means that the relay does not know Meet and Partner.
var ErrRelayTooOld = errors.New("the relay does not know keys and would pair us with any function: update the relay")

func (e *Refused) Error() string { return fmt.Sprintf("refused: %s: %s", e.Code, e.Reason) }

// The types of the frames.
const (
	frameJoin     = 0x01
	framePong     = 0x02
	frameWaiting  = 0x11
	framePing     = 0x12
	framePaired   = 0x13
	frameRefused  = 0x14
	frameDraining = 0x15
	frameAdvisory = 0x80 // we skip unknown types from here on
)

const maxPayload = 4096

// In seconds.
const longestRetryAfter = 86400

// For the end of the outer TLS, and for the inner handshake. The relay's own limit is 5 to 10 seconds.
const handOffTimeout = 15 * time.Second

// Connect joins the route, waits for the other function and returns TLS with it. It has checked that the other
// function's certificate is from PeerCA and has the name Config.Peer. ctx limits the time of everything. Close the
// result; CloseWrite ends only our direction.
func Connect(ctx context.Context, config Config) (*tls.Conn, error) {
	if _, _, err := splitPeer(config.Peer); err != nil {
		return nil, err
	}
	serverName := config.ServerName
	if serverName == "" {
		host, _, err := net.SplitHostPort(config.Address)
		if err != nil {
			return nil, err
		}
		serverName = host
	}
	// The look-up needs the dot of an absolute name; certificates and SNI have none.
	serverName = strings.TrimSuffix(serverName, ".")
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", config.Address)
	if err != nil {
		return nil, fmt.Errorf("no connection to the relay: %w", err)
	}
	outer := tls.Client(conn, &tls.Config{
		MinVersion:   tls.VersionTLS13,
		ServerName:   serverName,
		RootCAs:      config.RelayCA,
		Certificates: []tls.Certificate{config.Certificate},
		NextProtos:   []string{"frelay/1"},
	})
	var raw net.Conn
	var paired *message
	err = closedWhenDone(ctx, conn, func() (err error) {
		if err = outer.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("no TLS with the relay: %w", err)
		}
		if outer.ConnectionState().NegotiatedProtocol != "frelay/1" {
			return errors.New("this is no relay: it does not speak frelay/1")
		}
		if paired, err = join(outer, config); err != nil {
			return err
		}
		conn.SetDeadline(time.Now().Add(handOffTimeout))
		if config.UseTicket {
			raw, err = showTicket(ctx, outer, paired.Ticket)
		} else {
			raw, err = handOff(outer, conn)
		}
		return err
	})
	if raw != conn {
		conn.Close()
	}
	if err != nil {
		if raw != nil {
			raw.Close()
		}
		return nil, err
	}
	return meet(ctx, raw, paired.Role, config)
}

// closedWhenDone runs work. If ctx ends first, it closes conn, so that any call of work on conn returns.
func closedWhenDone(ctx context.Context, conn net.Conn, work func() error) error {
	finished, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-ctx.Done():
			conn.Close()
		case <-finished:
		}
	}()
	err := work()
	close(finished)
	<-watched
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// message is the payload of any frame; each type of frame uses some of the fields.
type message struct {
	Attempt    string          `json:"attempt,omitempty"`
	Route      string          `json:"route,omitempty"`
	Party      string          `json:"party,omitempty"`
	Meet       string          `json:"meet,omitempty"`
	Partner    json.RawMessage `json:"partner,omitempty"` // a list in JOIN, true in the relay's answers
	Modes      []string        `json:"modes,omitempty"`
	N          json.RawMessage `json:"n,omitempty"`
	Peer       string          `json:"peer,omitempty"`
	Role       string          `json:"role,omitempty"`
	Mode       string          `json:"mode,omitempty"`
	Ticket     string          `json:"ticket,omitempty"`
	Code       string          `json:"code,omitempty"`
	Reason     string          `json:"reason,omitempty"`
	RetryAfter *float64        `json:"retry_after,omitempty"`
}

// join sends JOIN and returns the relay's PAIRED.
func join(outer *tls.Conn, config Config) (*message, error) {
	mode := "handoff"
	if config.UseTicket {
		mode = "ticket"
	}
	attempt, err := newUUID()
	if err != nil {
		return nil, err
	}
	hello := message{Attempt: attempt, Route: config.Route, Party: config.Party, Meet: config.Meet, Modes: []string{mode}}
	if config.Partner != nil {
		if hello.Partner, err = json.Marshal(config.Partner); err != nil {
			return nil, err
		}
	}
	if err := writeFrame(outer, frameJoin, &hello); err != nil {
		return nil, err
	}
	for {
		kind, received, err := readFrame(outer)
		if err != nil {
			// In TLS 1.3 this is also where the relay's alert about our certificate arrives.
			return nil, fmt.Errorf("the relay went away: %w", err)
		}
		if (kind == frameWaiting || kind == framePaired) && !config.isEchoedBy(received) {
			// It would pair us with any function. Closing the connection gives our place up.
			return nil, ErrRelayTooOld
		}
		switch {
		case kind == frameWaiting:
			config.status("waiting")
		case kind == framePing:
			if err := writeFrame(outer, framePong, &message{N: received.N}); err != nil {
				return nil, err
			}
		case kind == frameRefused:
			refused := &Refused{Code: received.Code, Reason: received.Reason, RetryAfter: -1}
			if received.RetryAfter != nil {
				// The relay may send any number, but a Duration cannot be longer than 292 years.
				seconds := math.Max(0, math.Min(*received.RetryAfter, longestRetryAfter))
				refused.RetryAfter = time.Duration(seconds * float64(time.Second))
			}
			return nil, refused
		case kind == framePaired && received.Mode == mode && (received.Role == "client" || received.Role == "server"):
			config.status("paired with " + received.Peer)
			return received, nil
		case kind == frameDraining || kind >= frameAdvisory:
		default:
			return nil, fmt.Errorf("the relay sent a frame of type %#x that does not fit here", kind)
		}
	}
}

// isEchoedBy says whether the relay repeats what JOIN asked for. A relay that does not know keys leaves them out.
func (config Config) isEchoedBy(answer *message) bool {
	return answer.Meet == config.Meet && (config.Partner == nil || string(answer.Partner) == "true")
}

func (config Config) status(text string) {
	if config.OnStatus != nil {
		config.OnStatus(text)
	}
}

// handOff leaves the outer TLS and returns the TCP connection under it.
func handOff(outer *tls.Conn, conn net.Conn) (net.Conn, error) {
	if err := readToEnd(outer); err != nil {
		return nil, err
	}
	if err := outer.CloseWrite(); err != nil {
		return nil, fmt.Errorf("the hand-off failed: %w", err)
	}
	// CloseWrite leaves an expired write deadline on the connection, which would make every later write fail.
	if err := conn.SetWriteDeadline(time.Time{}); err != nil {
		return nil, err
	}
	return conn, nil
}

// showTicket opens the second connection and returns it when the relay has received the ticket.
func showTicket(ctx context.Context, outer *tls.Conn, ticket string) (net.Conn, error) {
	var dialer net.Dialer
	// Dial the same address, not the name: the name could lead to another relay, which does not know this ticket.
	conn, err := dialer.DialContext(ctx, "tcp", outer.RemoteAddr().String())
	if err != nil {
		return nil, fmt.Errorf("no second connection to the relay: %w", err)
	}
	if _, err := io.WriteString(conn, "FRELAY/1 "+ticket+"\n"); err != nil {
		return conn, fmt.Errorf("the ticket could not be shown: %w", err)
	}
	// The relay ends the outer TLS when it has received the ticket. If the outer connection breaks instead, we go on:
	// the ticket is sent, and if the relay is gone, the new connection fails too.
	if err := readToEnd(outer); err == errData {
		return conn, err
	}
	return conn, nil
}

var errData = errors.New("the hand-off failed: the relay sent data after PAIRED")

func readToEnd(outer *tls.Conn) error {
	var one [1]byte
	n, err := outer.Read(one[:])
	if n > 0 {
		return errData
	}
	if err != io.EOF {
		return fmt.Errorf("the hand-off failed: %w", err)
	}
	return nil
}

// meet runs the inner TLS with the other function and checks its name.
func meet(ctx context.Context, raw net.Conn, role string, config Config) (*tls.Conn, error) {
	pool := config.PeerCA
	if pool == nil {
		pool = config.RelayCA
	}
	inner := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{config.Certificate},
		// By default a TLS client checks a host name, and functions have none. VerifyConnection does all the checks.
		InsecureSkipVerify: true,
		ClientAuth:         tls.RequireAndVerifyClientCert,
		ClientCAs:          pool,
		// No session is resumed. And a client that only writes would not read the tickets, so its close would be an RST.
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			usage := x509.ExtKeyUsageServerAuth
			if role == "server" {
				usage = x509.ExtKeyUsageClientAuth
			}
			return verifyPeer(state, pool, usage, config.Peer)
		},
	}
	wire := tls.Client(raw, inner)
	if role == "server" {
		wire = tls.Server(raw, inner)
	}
	raw.SetDeadline(time.Now().Add(handOffTimeout))
	if err := wire.HandshakeContext(ctx); err != nil {
		raw.Close()
		if text := err.Error(); strings.HasPrefix(text, "remote error: tls:") && strings.Contains(text, "certificate") {
			// A TLS client gets this error only when it first reads: its handshake ends before the server checks it.
			return nil, fmt.Errorf("the other function refused this function's own certificate: %w", err)
		}
		if role == "server" && strings.Contains(err.Error(), "bad record MAC") {
			// A TLS 1.3 client that refuses a certificate has no keys yet to encrypt its alert, and crypto/tls takes an
			// unencrypted alert for a forged record.
			return nil, fmt.Errorf("the other function may have refused this function's certificate: %w", err)
		}
		return nil, fmt.Errorf("no TLS with the other function: %w", err)
	}
	raw.SetDeadline(time.Time{})
	return wire, nil
}

// verifyPeer checks the chain of the other function's certificate, and that it has the expected name.
func verifyPeer(state tls.ConnectionState, pool *x509.CertPool, usage x509.ExtKeyUsage, expected string) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("the other function shows no certificate")
	}
	leaf := state.PeerCertificates[0]
	options := x509.VerifyOptions{
		Roots:         pool,
		Intermediates: x509.NewCertPool(),
		KeyUsages:     []x509.ExtKeyUsage{usage},
	}
	for _, certificate := range state.PeerCertificates[1:] {
		options.Intermediates.AddCert(certificate)
	}
	if _, err := leaf.Verify(options); err != nil {
		return err
	}
	kind, want, err := splitPeer(expected)
	if err != nil {
		return err
	}
	// Compare the whole name and its type. Not VerifyHostname, which would accept a wildcard in the certificate. With
	// several URIs it would not be clear which one counts.
	if kind == "uri" && len(leaf.URIs) == 1 && leaf.URIs[0].String() == want {
		return nil
	}
	if kind == "dns" {
		for _, name := range leaf.DNSNames {
			if strings.EqualFold(name, want) {
				return nil
			}
		}
	}
	shown := printable(fmt.Sprint(leaf.DNSNames, leaf.URIs))
	if len(shown) > 1000 {
		shown = shown[:1000] + "..."
	}
	return fmt.Errorf("the other function shows %s, where %s was expected", shown, expected)
}

func splitPeer(expected string) (kind, want string, err error) {
	kind, want, _ = strings.Cut(expected, ":")
	if (kind != "dns" && kind != "uri") || want == "" || strings.Contains(want, "*") {
		return "", "", fmt.Errorf("%q is not dns:NAME or uri:URI: say who the other function must be", expected)
	}
	return kind, want, nil
}

// A frame is its type, a zero, the length of the payload in two bytes, and the payload, one JSON object.

func writeFrame(writer io.Writer, kind byte, payload *message) error {
	body, err := json.Marshal(payload)
	if err != nil {
		return err
	}
	if len(body) > maxPayload {
		return errors.New("Route, Meet and Partner are too long for one frame")
	}
	frame := []byte{kind, 0, byte(len(body) >> 8), byte(len(body))}
	_, err = writer.Write(append(frame, body...))
	return err
}

func readFrame(reader io.Reader) (byte, *message, error) {
	var header [4]byte
	if _, err := io.ReadFull(reader, header[:]); err != nil {
		return 0, nil, err
	}
	length := binary.BigEndian.Uint16(header[2:])
	if header[1] != 0 || length > maxPayload {
		return 0, nil, errors.New("not a frame of frelay/1")
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(reader, body); err != nil {
		return 0, nil, err
	}
	payload := new(message)
	if len(body) > 0 && header[0] < frameAdvisory {
		if err := json.Unmarshal(body, payload); err != nil {
			return 0, nil, err
		}
	}
	// All text of the relay arrives here. Escape it, so that it cannot control the terminal that shows it.
	payload.Code, payload.Reason, payload.Peer = printable(payload.Code), printable(payload.Reason), printable(payload.Peer)
	return header[0], payload, nil
}

// printable escapes each character that could forge a line, move the cursor or change the text direction.
func printable(text string) string {
	var escaped strings.Builder
	for _, char := range text {
		if unicode.IsPrint(char) {
			escaped.WriteRune(char)
		} else {
			escaped.WriteString(strings.Trim(strconv.QuoteRuneToASCII(char), "'"))
		}
	}
	return escaped.String()
}

func newUUID() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}
