// Joins a route and connects its standard input and output with the other function's:
//
//   node party.mjs --relay 127.0.0.1:9001 --cert func1.pem --key func1.key --ca ca.pem --peer dns:func2.demo [--ticket]

import { readFileSync } from 'node:fs';
import { pipeline } from 'node:stream/promises';
import { parseArgs } from 'node:util';
import { connect, explain, printable, Refused } from './frelay.mjs';

const text = { type: 'string' };
const { values } = parseArgs({
  options: {
    relay: { ...text, default: '127.0.0.1:9001' },
    cert: text,
    key: text,
    ca: text,
    peer: text,
    route: text,
    party: text,
    meet: text,
    partner: { ...text, multiple: true },
    wait: { ...text, default: '60' },
    ticket: { type: 'boolean', default: false },
  },
});
const [, host, port] = /^\[?([^\]]*)\]?:(\d+)$/.exec(values.relay);

try {
  const wire = await connect({
    host,
    port: Number(port),
    cert: readFileSync(values.cert),
    key: readFileSync(values.key),
    ca: readFileSync(values.ca),
    peer: values.peer,
    route: values.route,
    party: values.party,
    meet: values.meet,
    partner: values.partner,
    mode: values.ticket ? 'ticket' : 'handoff',
    wait: Number(values.wait),
    onStatus: (status) => console.error(status),
  });
  // Two directions, and each ends alone.
  await Promise.all([pipeline(process.stdin, wire), pipeline(wire, process.stdout)]);
} catch (error) {
  console.error(`party: ${printable(explain(error).message.trim())}`);
  process.exitCode = error instanceof Refused ? 3 : 1;
}
process.exit();
