// Joins a route of a frelay relay and returns a TLS connection to the other function. Copy this file; it needs Node.js
// 18 or newer and nothing else.
//
// A function dials the relay with its certificate, sends JOIN, and waits until the other function is there too. Then it
// leaves this outer TLS, because it wants TLS with the other function itself. There are two ways to leave
// (docs/protocol.md, sections 4 and 7):
//
// By hand-off. The relay writes PAIRED and its close_notify; we answer with our own, and then the TCP connection is
// raw. But Node's TLSSocket takes over the descriptor, reads ahead, and closes it at its end. So the outer TLS does not
// run on the socket itself but on a Duplex in front of it (OneRecordAtATime). That one gives it one TLS record, and then
// waits to see whether it was the end. The bytes behind the end stay in the socket, and the socket stays open.
//
// By ticket. PAIRED holds a ticket. We send it on a second, plain TCP connection, and then that one is raw. This costs
// a round trip, and works with every TLS library.

import crypto from 'node:crypto';
import { once } from 'node:events';
import net from 'node:net';
import { Duplex } from 'node:stream';
import tls from 'node:tls';

const JOIN = 0x01, PONG = 0x02, WAITING = 0x11, PING = 0x12, PAIRED = 0x13, REFUSED = 0x14, DRAINING = 0x15;
const ADVISORY = 0x80; // we skip unknown types from here on
const MAX_PAYLOAD = 4096;

/** Escapes each character of `text` that could forge a line, move the cursor or change the text direction. */
export function printable(text) {
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);
}

/** Returns a plain error if `error` is the other side's alert about our certificate, otherwise `error` itself. */
export function explain(error) {
  const [, alert] = /_ALERT_(\w*CERTIFICATE\w*|UNKNOWN_CA|ACCESS_DENIED)$/.exec(error.code ?? '') ?? [];
  if (alert === undefined) {
    return error;
  }
  const name = alert.toLowerCase().replaceAll('_', ' ');
  return new Error(`the other side refused this function's own certificate (${name})`, { cause: error });
}

/** The relay refused us. `retryAfter` is in seconds, or null if a retry cannot help until something is changed. */
export class Refused extends Error {
  constructor({ code, reason, retry_after: retryAfter = null }) {
    super(`refused: ${code}: ${reason}`);
    Object.assign(this, { name: 'Refused', code, reason, retryAfter });
  }
}

/**
 * Joins a route, waits for the other function, and resolves to a TLSSocket to it. It has checked that the other
 * function's certificate is from `peerCa` and has the name `peer`.
 *
 * host, port         the relay
 * cert, key          PEM: this function's certificate and key, for the relay and for the other function
 * ca, peerCa         PEM: the CAs that issue the relay's certificate, and the other function's (`ca` if left out)
 * peer               the other function's name: 'dns:NAME' or 'uri:URI', exactly
 * route, party       needed if several routes share the address, or if the certificate fits both parties
 * meet               a key: meet only a function that joins with the same one (no `party` is needed then)
 * partner            with `meet`: an array of names, of which the relay must have verified one
 * mode               'handoff' or 'ticket': how to leave the outer TLS
 * wait               seconds for everything together
 * servername         the name in the relay's certificate, if it is not `host`
 * onStatus           called with 'waiting' and 'paired with ...'
 *
 * Each direction ends alone: `end()` ends ours, and reading goes on until 'end'.
 */
export async function connect(options) {
  const { mode = 'handoff', wait = 60 } = options;
  if (!/^(dns|uri):[^*]+$/.test(options.peer)) {
    throw new Error(`peer: ${options.peer} is not dns:NAME or uri:URI: say who the other function must be`);
  }
  if (mode !== 'handoff' && mode !== 'ticket') {
    throw new Error(`mode: ${mode} is neither handoff nor ticket`);
  }
  const sockets = [];
  let timer;
  const timeIsUp = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`nobody came within ${wait} s`)), wait * 1000);
  });
  try {
    return await Promise.race([joinAndMeet({ ...options, mode }, sockets), timeIsUp]);
  } catch (error) {
    sockets.forEach((socket) => socket.destroy());
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

async function joinAndMeet(options, sockets) {
  const { mode, host, port } = options;
  const socket = track(sockets, net.connect({
    host,
    port,
    allowHalfOpen: true,
    noDelay: true,
    // Try every address of the name. By default Node 18 tries one, and Node 20 gives each only a quarter of a second.
    autoSelectFamily: true,
    autoSelectFamilyAttemptTimeout: 5000,
  }));
  await once(socket, 'connect');
  const under = mode === 'handoff' ? new OneRecordAtATime(socket) : socket;
  // The look-up needs the dot of an absolute name; certificates and SNI have none.
  const [servername, name] = [options.servername, host].map((one) => one?.replace(/\.$/, ''));
  const outer = tls.connect({
    socket: under,
    servername: servername ?? (net.isIP(name) ? undefined : name),
    host: name, // the relay's certificate must have this name or address
    ca: options.ca,
    allowPartialTrustChain: true, // an issuing authority is enough as `ca`, from Node 20.18 on
    cert: options.cert,
    key: options.key,
    minVersion: 'TLSv1.3',
    ALPNProtocols: ['frelay/1'],
  });
  track(sockets, outer);
  await once(outer, 'secureConnect');
  if (outer.alpnProtocol !== 'frelay/1') {
    throw new Error('this is no relay: it does not speak frelay/1');
  }
  const paired = await join(outer, options);
  const raw = mode === 'handoff' ? await handOff(outer, under) : await showTicket(outer, socket, paired.ticket, sockets);
  return meet(raw, paired.role, options, sockets);
}

/** Adds a listener: an error without one would end the process. Code that waits for the socket still gets the error. */
function track(sockets, socket) {
  sockets.push(socket);
  return socket.on('error', () => {});
}

// --- frames: type, 0, the length of the payload in two bytes, and the payload, one JSON object ---------------------

async function join(outer, { route, party, meet, partner, mode, onStatus = () => {} }) {
  send(outer, JOIN, { attempt: crypto.randomUUID(), route, party, meet, partner, modes: [mode] });
  for (;;) {
    const [type, payload] = await receive(outer);
    const isAnswer = type === WAITING || type === PAIRED;
    if (isAnswer && (payload.meet !== meet || (partner !== undefined && payload.partner !== true))) {
      // A relay that knows keys repeats them. This one would pair us with any function.
      throw new Error('the relay does not know keys and would pair us with any function: update the relay');
    }
    if (type === WAITING) {
      onStatus('waiting');
    } else if (type === PING) {
      send(outer, PONG, { n: payload.n });
    } else if (type === REFUSED) {
      throw new Refused(payload);
    } else if (type === PAIRED && payload.mode === mode && ['client', 'server'].includes(payload.role)) {
      onStatus(`paired with ${payload.peer}`);
      return payload;
    } else if (type !== DRAINING && type < ADVISORY) {
      throw new Error(`the relay sent a frame of type ${type} that does not fit here`);
    }
  }
}

function send(outer, type, payload) {
  const body = Buffer.from(JSON.stringify(payload));
  if (body.length > MAX_PAYLOAD) {
    throw new Error('route, meet and partner are too long for one frame');
  }
  outer.write(Buffer.concat([Buffer.from([type, 0, body.length >> 8, body.length & 0xff]), body]));
}

async function receive(outer) {
  const header = await take(outer, 4);
  const length = header.readUInt16BE(2);
  if (header[1] !== 0 || length > MAX_PAYLOAD) {
    throw new Error('not a frame of frelay/1');
  }
  const body = length ? await take(outer, length) : Buffer.from('{}');
  if (header[0] >= ADVISORY) {
    return [header[0], {}];
  }
  // All text of the relay arrives here. Escape it, so that it cannot control the terminal that shows it.
  const payload = JSON.parse(body, (_, value) => (typeof value === 'string' ? printable(value) : value));
  if (payload === null || typeof payload !== 'object' || Array.isArray(payload)) {
    throw new Error('not a frame of frelay/1');
  }
  return [header[0], payload];
}

/** Resolves to exactly `size` bytes of the outer TLS; rejects if it ends or fails before. */
async function take(outer, size) {
  for (;;) {
    const data = outer.read(size);
    if (data?.length === size) {
      return data;
    }
    if (data !== null || outer.readableEnded || outer.destroyed) {
      throw outer.errored ?? new Error('the relay ended the connection without an answer');
    }
    // In TLS 1.3 this is also where the relay's alert about our certificate arrives.
    await change(outer);
  }
}

/** Reads up to the relay's close_notify; data before it is an error. */
async function readToEnd(outer) {
  for (;;) {
    if (outer.read() !== null) {
      throw new Error('the hand-off failed: the relay sent data after PAIRED');
    }
    if (outer.readableEnded) {
      return;
    }
    if (outer.destroyed) {
      throw outer.errored ?? new Error('the hand-off failed: the connection to the relay broke');
    }
    await change(outer);
  }
}

/** Resolves at the next event of `stream` (readable, end or close); rejects with its error. */
function change(stream) {
  return new Promise((resolve, reject) => {
    const settle = (error) => {
      ['readable', 'end', 'close', 'error'].forEach((name) => stream.off(name, settle));
      error instanceof Error ? reject(error) : resolve();
    };
    ['readable', 'end', 'close', 'error'].forEach((name) => stream.on(name, settle));
  });
}

// --- leaving the outer TLS -----------------------------------------------------------------------------------------

/**
 * The stream on which the outer TLS runs in hand-off mode. Before it reads a record, it gives the TLS above the time to
 * find that the record before was the end. When this stream ends, the socket stays open.
 */
export class OneRecordAtATime extends Duplex {
  #socket;
  #isWanted = false;
  #isReleased = false;
  #header = null; // of a record whose rest has not arrived yet
  #look = () => this.#read();
  #fail = (error) => this.destroy(error instanceof Error ? error : new Error('the connection to the relay broke'));

  constructor(socket) {
    super({ allowHalfOpen: true }); // otherwise the TLS above answers the relay's close_notify before we are ready
    this.#socket = socket;
    socket.on('readable', this.#look).on('end', this.#fail).on('close', this.#fail).on('error', this.#fail);
  }

  _read() {
    this.#isWanted = true;
    // The TLS above emits 'end' by process.nextTick, which runs before setImmediate.
    setImmediate(this.#look);
  }

  #read() {
    if (!this.#isWanted || this.#isReleased || this.destroyed) {
      return;
    }
    // Keep the header here until the rest arrives. If we put it back, Node would at once emit 'readable' for it again,
    // before it looks at the network.
    this.#header ??= this.#socket.read(5);
    if (this.#header === null || this.#header.length < 5) {
      return; // read(5) returns fewer bytes only at the end
    }
    const length = this.#header.readUInt16BE(3);
    const body = length === 0 ? Buffer.alloc(0) : this.#socket.read(length);
    if (body?.length === length) {
      const record = Buffer.concat([this.#header, body]);
      this.#header = null;
      this.#isWanted = false;
      this.push(record);
    }
  }

  _write(data, encoding, done) {
    this.#socket.write(data, done);
  }

  _final(done) {
    done(); // no FIN: close_notify ends the outer TLS, not the connection
  }

  _destroy(error, done) {
    if (!this.#isReleased) {
      this.#socket.destroy();
    }
    done(error);
  }

  /** Returns the socket, with everything that is not read from it yet. */
  release() {
    this.#isReleased = true;
    this.#socket
      .off('readable', this.#look).off('end', this.#fail).off('close', this.#fail).off('error', this.#fail);
    if (this.#header !== null) {
      this.#socket.unshift(this.#header);
    }
    return this.#socket;
  }
}

/** Leaves the outer TLS and resolves to the socket under it. */
async function handOff(outer, under) {
  await readToEnd(outer);
  const raw = under.release();
  outer.end();
  await once(under, 'finish'); // our close_notify is in the socket
  return raw;
}

/** Opens the second connection and resolves to it when the relay has received the ticket. */
async function showTicket(outer, first, ticket, sockets) {
  // Dial the same address, not the name: the name could lead to another relay, which does not know this ticket.
  const { remoteAddress: host, remotePort: port } = first;
  const socket = track(sockets, net.connect({ host, port, allowHalfOpen: true, noDelay: true }));
  await once(socket, 'connect');
  socket.write(`FRELAY/1 ${ticket}\n`);
  // The relay ends the outer TLS when it has received the ticket. If the outer connection breaks instead, we go on: the
  // ticket is sent, and if the relay is gone, the second connection fails too.
  while (!outer.readableEnded && !outer.destroyed) {
    if (outer.read() !== null) {
      throw new Error('the hand-off failed: the relay sent data after PAIRED');
    }
    if (!outer.readableEnded) {
      await change(outer).catch(() => {});
    }
  }
  outer.end();
  return socket;
}

// --- the inner TLS -------------------------------------------------------------------------------------------------

async function meet(raw, role, { cert, key, ca, peerCa = ca, peer }, sockets) {
  const common = {
    // Only tls.connect supports allowPartialTrustChain, tls.createServer does not: func2 needs the root in `peerCa`.
    cert, key, ca: peerCa, allowPartialTrustChain: true, minVersion: 'TLSv1.3', rejectUnauthorized: true,
  };
  let wire;
  if (role === 'client') {
    // Functions have no host names: checkPeer checks the name.
    wire = track(sockets, tls.connect({ ...common, socket: raw, checkServerIdentity: () => undefined }));
    await once(wire, 'secureConnect');
    // The other side has not checked our certificate yet. If it refuses it, the first read fails: see explain().
  } else {
    // Not `new TLSSocket(raw, { isServer: true })`: that would not check the client's certificate.
    const server = tls.createServer({ ...common, requestCert: true });
    raw.allowHalfOpen = false; // until TLS is up; otherwise an end before that would cause no event
    server.emit('connection', raw);
    wire = await new Promise((resolve, reject) => {
      server.once('tlsClientError', (error) => reject(explain(error))).once('secureConnection', (socket) => {
        socket.allowHalfOpen = true;
        resolve(track(sockets, socket));
      });
    });
  }
  checkPeer(wire.getPeerX509Certificate(), peer);
  return wire;
}

/** Throws unless the certificate has the name `expected`, e.g. 'dns:func2.demo': the whole name, of that type. */
function checkPeer(certificate, expected) {
  const names = subjectNames(certificate?.subjectAltName ?? '');
  const dns = names.filter(([kind]) => kind === 'DNS').map(([, value]) => `dns:${value.toLowerCase()}`);
  const uris = names.filter(([kind]) => kind === 'URI').map(([, value]) => `uri:${value}`);
  const isExpected = expected.startsWith('uri:')
    ? uris.length === 1 && uris[0] === expected // with several it would not be clear which one counts
    : dns.includes(expected.toLowerCase());
  if (!isExpected) {
    const shown = printable([...dns, ...uris].slice(0, 8).join(', ')) || 'no name';
    throw new Error(`the other function shows ${shown}, where ${expected} was expected`);
  }
}

/** Reads the names from Node's text of a subjectAltName. Node quotes each value that would be ambiguous otherwise. */
function subjectNames(text) {
  const one = /([A-Za-z ]+):(?:("(?:[^"\\]|\\.)*")|([^",]*))(?:, |$)/y;
  const names = [];
  while (one.lastIndex < text.length) {
    const found = one.exec(text);
    if (found === null) {
      throw new Error('the names in the certificate of the other function cannot be read');
    }
    names.push([found[1], found[2] === undefined ? found[3] : JSON.parse(found[2])]);
  }
  return names;
}
