// The dashboard of one relay: polls its API every two seconds, and draws the answers.
//
//   units      numbers and times as a person reads them
//   page       setting text, never markup; chips; sparklines
//   tables     rows that are updated in place
//   state      the last answers of the relay, and what is computed from them
//   drawing    from the state to the page
//   requests   polling, events, and a relay that does not answer
//
// Strangers write a part of what is shown. All of it goes through `set`, as text.

const PERIOD = 2000;             // ms between two polls
const SHARE = 12;                // a poll that takes long is rare: polls take at most one twelfth of the time
const SOONEST = 700;             // ms from one poll to the next that an event may cause
const ANSWER_TIMEOUT = 8000;     // ms until an answer counts as missing
const WINDOW = 120;              // s that a sparkline shows
const QUIET = 10;                // s without a byte after which a pairing is shown as quiet
const ENDINGS_KEPT = 200;
const KEY_END = 16;              // characters of a key that are always shown: keys of one job often differ only at their end
const DAY = 86400;

const $ = (id) => document.getElementById(id);

// --- units ----------------------------------------------------------------------------------------------------------

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** [number, unit] with two or three digits: ["1.2", "MiB"]. */
function size(bytes) {
  let step = 0;
  while (bytes >= 999.5 && step < UNITS.length - 1) {
    bytes /= 1024;
    step += 1;
  }
  return [step > 0 && bytes < 9.95 ? bytes.toFixed(1) : bytes.toFixed(0), UNITS[step]];
}

/** "42 s", "3 min", "2 h 5 min", "4 d 3 h", "10 y". */
function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 600) return s % 60 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${s / 60} min`;
  if (s < 3600) return `${Math.round(s / 60)} min`;
  if (s < DAY) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  if (s < 30 * DAY) return `${Math.floor(s / DAY)} d ${Math.floor((s % DAY) / 3600)} h`;
  return s < 730 * DAY ? `${Math.floor(s / DAY)} d` : `${Math.floor(s / 365.25 / DAY)} y`;
}

/** "3 min ago": times in the past have one unit. */
function ago(seconds) {
  if (seconds < 2) return "just now";
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < DAY) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / DAY)} d ago`;
}

const clock = (at) => new Date(at * 1000).toLocaleString("sv"); // 2026-11-24 03:12:04, in local time
const number = (n) => n.toLocaleString("en");
const plural = (n, one, many = `${one}s`) => `${number(n)} ${n === 1 ? one : many}`;

/** Who may be a party, in words. */
function parties(selectors, route) {
  if (!selectors) return "";
  if (!Array.isArray(selectors)) return `the service at ${selectors.dial}`;
  if (selectors.length) return selectors.join(", ");
  return `anyone in ${route.allow_from.join(", ")}`;
}

/** Escapes control characters and characters that change the text direction. */
function visible(text) {
  return String(text).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);
}

// --- page -----------------------------------------------------------------------------------------------------------

/** Make `text` the only content of `node`. All data enters the page here; it costs nothing if the text is unchanged. */
function set(node, text) {
  text = visible(text ?? "");
  if (node.firstChild ? node.firstChild.data !== text : text) node.textContent = text;
}

function element(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  for (const child of children) node.append(typeof child === "string" ? visible(child) : child);
  return node;
}

/** The same for names and addresses: a line may break after their separators, and copying still gives the whole text. */
function setName(node, text) {
  text = visible(text ?? "");
  if (node.textContent === text) return;
  const pieces = text.split(/(?<=[/@,=]|:(?=\D))|(?=\.\D)/);
  node.replaceChildren(...pieces.flatMap((piece) => [piece, document.createElement("wbr")]));
}

/** The key of a leg, whole; where there is no room, CSS hides the middle of it, and `title` still has all of it. */
function setKey(node, meet) {
  const key = visible(meet ?? "");
  if (node.title === key) return;
  node.title = key;
  const cut = Math.max(0, key.length - KEY_END);
  const [start, end] = [key.slice(0, cut), key.slice(cut)].map((text) => element("span", {}, text));
  node.replaceChildren(...(key ? ["key ", start, end] : []));
}

function chip(node, text, tone = "") {
  set(node, text);
  if (node.dataset.tone !== tone) node.dataset.tone = tone;
}

function time(node, at) {
  set(node, ago(state.now() - at));
  const title = clock(at);
  if (node.title !== title) {
    node.title = title;
    node.dateTime = new Date(at * 1000).toISOString();
  }
}

/** An amount in two spans, so that numbers and units are each aligned in a column. */
function amount(node, bytes, unit = "") {
  if (!node.firstElementChild) node.append(element("span", { class: "n" }), " ", element("span", { class: "u" }));
  const [n, u] = bytes === null ? ["–", ""] : size(bytes);
  set(node.firstElementChild, n);
  set(node.lastElementChild, u && u + unit);
  node.classList.toggle("zero", !bytes);
}

const rate = (node, perSecond) => amount(node, perSecond, "/s");

/** Draw `points`, each [time, there, back]: one direction above the middle, the other below, with the same scale. */
function sparkline(svg, points, now) {
  const { width, height } = svg.viewBox.baseVal;
  const middle = height / 2;
  let most = 1024; // less than one KiB/s is drawn small
  for (const [, there, back] of points) most = Math.max(most, there, back);
  const x = (at) => (width * (1 - Math.min(WINDOW, now - at) / WINDOW)).toFixed(1);
  for (const [index, sign] of [[1, -1], [2, 1]]) {
    const y = (point) => (middle + (sign * point[index] * (middle - 1)) / most).toFixed(1);
    let path = "";
    if (points.length > 1) {
      path = `M${x(points[0][0])} ${middle}`;
      for (const point of points) path += `L${x(point[0])} ${y(point)}`;
      path += `L${x(points.at(-1)[0])} ${middle}Z`;
    }
    const line = svg.children[index - 1];
    if (line.getAttribute("d") !== path) line.setAttribute("d", path);
  }
}

/** Have a screen reader read `text`. It does not read the same text twice in a row. */
const announce = (text) => set($("announcement"), text);

// --- tables ---------------------------------------------------------------------------------------------------------

const narrow = matchMedia("(max-width: 700px)");
const tables = new Map();

/**
 * One table of the page. `show` gives it all items. It filters and sorts them and keeps rows for the first ones. A row
 * belongs to the item with its key and is updated in place, but only while it is on the screen.
 */
class Table {
  constructor(id, { key, words, sorts = {}, sort = null, update, nothing }) {
    const section = $(id);
    Object.assign(this, { id, key, words, sorts, update, nothing, section });
    this.body = section.querySelector("tbody");
    this.table = section.querySelector("table");
    this.template = $(`${id}-row`).content.firstElementChild;
    this.more = section.querySelector(".more");
    this.rows = new Map();
    this.byElement = new WeakMap();
    this.items = [];
    this.extra = 0;
    this.sort = sort; // [name, 1 or -1]; null keeps the order of the items
    this.onScreen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const row = this.byElement.get(entry.target);
        row.isSeen = entry.isIntersecting;
        if (row.isSeen) this.update(row.parts, row.item, row.element);
      }
    }, { rootMargin: "200px" });
    this.more?.addEventListener("click", () => {
      this.extra += 100;
      this.draw();
    });
    for (const button of section.querySelectorAll("[data-sort]")) {
      button.addEventListener("click", () => {
        const name = button.dataset.sort;
        const first = "down" in button.dataset ? -1 : 1;
        this.sort = this.sort?.[0] === name ? [name, -this.sort[1]] : [name, first];
        this.draw();
      });
    }
    tables.set(id, this);
  }

  show(items) {
    this.items = items;
    this.draw();
  }

  draw() {
    const found = this.items.filter((item) => filter.admits(item, this));
    if (this.sort) {
      const [name, sign] = this.sort;
      const value = this.sorts[name];
      found.sort((a, b) => sign * compare(value(a), value(b)));
    }
    const room = (narrow.matches ? 12 : 50) + this.extra;
    this.place(this.more ? found.slice(0, room) : found);
    this.finish(found.length, room);
  }

  /** Show exactly the rows of `items`, in their order; a row that stays in its place is not touched. */
  place(items) {
    const focused = document.activeElement;
    const keys = new Set(items.map(this.key));
    for (const [key, row] of this.rows) {
      if (keys.has(key)) continue;
      this.onScreen.unobserve(row.element);
      row.element.remove();
      this.rows.delete(key);
    }
    let next = this.body.firstElementChild;
    for (const item of items) {
      const row = this.rows.get(this.key(item)) ?? this.add(item);
      row.item = item;
      if (row.element === next) next = next.nextElementSibling;
      else this.body.insertBefore(row.element, next);
      if (row.isSeen) this.update(row.parts, item, row.element);
    }
    // An element that is moved loses the focus.
    if (focused !== document.activeElement && this.body.contains(focused)) focused.focus({ preventScroll: true });
  }

  add(item) {
    const row = { element: this.template.cloneNode(true), parts: {}, item, isSeen: true };
    for (const part of row.element.querySelectorAll("[data-f]")) row.parts[part.dataset.f] = part;
    row.parts.spark = row.element.querySelector(".spark");
    this.rows.set(this.key(item), row);
    this.byElement.set(row.element, row);
    this.onScreen.observe(row.element);
    return row;
  }

  /** Update everything around the rows: the count, the text of an empty table, the button for more, the sort arrows. */
  finish(count, room) {
    const total = this.items.length;
    const heading = this.section.querySelector(".count");
    if (heading) set(heading, filter.isOn && total ? `${number(count)} of ${number(total)}` : number(total));
    const nothing = this.section.querySelector(".nothing");
    nothing.hidden = count > 0;
    if (!count) set(nothing, total ? "Nothing here matches the filter." : this.nothing());
    this.table.hidden = !count;
    this.table.setAttribute("aria-rowcount", count + 1);
    if (this.more) {
      this.more.hidden = count <= room;
      if (count > room) set(this.more, `Show ${Math.min(100, count - room)} more of ${number(count - room)}`);
    }
    for (const button of this.section.querySelectorAll("[data-sort]")) {
      const isSorted = this.sort?.[0] === button.dataset.sort;
      const direction = !isSorted ? "none" : this.sort[1] > 0 ? "ascending" : "descending";
      button.closest("th").setAttribute("aria-sort", direction);
    }
  }
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
}

/** The filter box: a row must contain all its words; `route:NAME` shows only that route. */
const filter = {
  words: [],
  route: null,
  get isOn() {
    return this.words.length > 0 || this.route !== null;
  },
  admits(item, table) {
    if (!this.isOn || table.id === "certificates") return true;
    if (this.route !== null && (table.id === "routes" ? item.name : item.route) !== this.route) return false;
    if (!this.words.length) return true;
    const text = table.words(item).join("\n").toLowerCase();
    return this.words.every((word) => text.includes(word));
  },
  set(text) {
    const words = text.trim().split(/\s+/).filter(Boolean);
    this.route = words.find((word) => word.startsWith("route:"))?.slice(6) ?? null;
    this.words = words.filter((word) => !word.startsWith("route:")).map((word) => word.toLowerCase());
    if ($("filter").value.trim() !== text.trim()) $("filter").value = text;
    // Keep the filter in the address, so that a reload, or a link sent to a colleague, shows the same.
    if (words.length) history.replaceState(null, "", `#${new URLSearchParams({ filter: words.join(" ") })}`);
    else if (location.hash.startsWith("#filter=")) history.replaceState(null, "", location.pathname);
    for (const table of tables.values()) table.draw();
    drawRoute();
  },
};

$("filter").addEventListener("input", (event) => filter.set(event.target.value));
$("search").addEventListener("submit", (event) => event.preventDefault());
$("route-close").addEventListener("click", () => {
  filter.set("");
  $("filter").focus();
});
document.addEventListener("click", (event) => {
  // Every name of a route is a button that shows its settings.
  const name = event.target.closest("tbody button.link")?.textContent;
  if (!name) return;
  filter.set(`route:${name}`);
  $("route").scrollIntoView({ block: "nearest" });
});
narrow.addEventListener("change", () => tables.forEach((table) => table.draw()));

// --- state ----------------------------------------------------------------------------------------------------------

const state = {
  status: null,        // the last /v1/status
  traffic: null,       // the last /v1/traffic
  routes: new Map(),   // /v1/routes by name: the settings, which only a reload changes
  routesAsOf: null,
  rates: new Map(),    // by route: {there, back, points}
  pairings: [],        // each with .there and .back (bytes/s), and .quiet (s, or null while bytes flow)
  endings: [],         // newest first
  total: { there: null, back: null, points: [] },
  lastEvent: 0,
  skew: 0,             // the relay's clock minus the clock here, in s
  now() {
    return Date.now() / 1000 + this.skew;
  },
  forget() {
    Object.assign(this, { traffic: null, routesAsOf: null, endings: [], pairings: [], lastEvent: 0 });
    this.rates.clear();
    this.total = { there: null, back: null, points: [] };
  },
};

const PARTIES = ["func1", "func2"];
// As which party a leg waits: with a key, a leg may wait that is either of the two until it is paired.
const SIDES = [...PARTIES, "either"];
const BYTES = ["bytes_func1_to_func2", "bytes_func2_to_func1"];

/** Bytes per second between two polls. A count that is lower than before was reset, and gives 0. */
function speeds(before, after, seconds) {
  return BYTES.map((name) => Math.max(0, after[name] - before[name]) / seconds);
}

function keep(points, point) {
  points.push(point);
  while (points.length && points[0][0] < point[0] - WINDOW - 5) points.shift();
}

function takeTraffic(traffic) {
  const before = state.traffic;
  state.traffic = traffic;
  if (!before || traffic.now <= before.now) return;
  const seconds = traffic.now - before.now;
  const known = new Map(before.routes.map((route) => [route.name, route]));
  const sum = [0, 0];
  for (const route of traffic.routes) {
    const earlier = known.get(route.name);
    if (!earlier) continue;
    const [there, back] = speeds(earlier, route, seconds);
    let entry = state.rates.get(route.name);
    if (!entry) state.rates.set(route.name, (entry = { points: [] }));
    Object.assign(entry, { there, back });
    keep(entry.points, [traffic.now, there, back]);
    sum[0] += there;
    sum[1] += back;
  }
  const names = new Set(traffic.routes.map((route) => route.name));
  for (const name of state.rates.keys()) if (!names.has(name)) state.rates.delete(name);
  [state.total.there, state.total.back] = sum;
  keep(state.total.points, [traffic.now, ...sum]);
}

function takePairings(pairings) {
  const known = new Map(state.pairings.map((pairing) => [pairing.id, pairing]));
  for (const pairing of pairings) {
    const earlier = known.get(pairing.id);
    pairing.at = pairing.since + pairing.age;
    pairing.there = pairing.back = pairing.quiet = null;
    pairing.changedAt = pairing.at;
    if (!earlier || pairing.at <= earlier.at) continue;
    [pairing.there, pairing.back] = speeds(earlier, pairing, pairing.at - earlier.at);
    if (pairing.there + pairing.back === 0) {
      pairing.changedAt = earlier.changedAt;
      pairing.quiet = pairing.at - pairing.changedAt;
    }
  }
  state.pairings = pairings;
}

/** Groups repeated refusals: one row for the same refusal of the same function. */
function refusals() {
  const groups = new Map();
  for (const one of state.status.refusals) {
    const who = one.identity ?? one.certificate;
    const host = one.address.replace(/:\d+$/, "");
    const key = [one.code, one.reason, one.route, who, host, one.meet].join("\0");
    const group = groups.get(key);
    if (group) Object.assign(group, { times: group.times + 1, first: one.at });
    else groups.set(key, { ...one, key, who, host, times: 1, first: one.at });
  }
  return [...groups.values()];
}

function waiting() {
  const found = [];
  for (const route of state.traffic.routes) {
    for (const party of SIDES) {
      for (const leg of route.waiting[party]) found.push({ ...leg, party, route: route.name });
    }
  }
  return found.sort((a, b) => a.since - b.since);
}

/** [tone, words] for an expiry date. Lists are renewed daily and certificates by a person, who needs an earlier warning. */
function expiry(certificate) {
  const left = certificate.not_after - state.now();
  const [soon, very] = certificate.what === "crl" ? [DAY / 2, DAY / 12] : [7 * DAY, DAY];
  if (left <= 0) return ["bad", `ran out ${ago(-left)}`];
  return [left < very ? "bad" : left < soon ? "warn" : "", `in ${duration(left)}`];
}

const CERTIFICATES = { certificate: "certificate", client_ca: "client CA", crl: "revocation list" };

// --- drawing --------------------------------------------------------------------------------------------------------

const lobby = (route) => SIDES.flatMap((party) => route.waiting[party]);
const longest = (route) => Math.min(...lobby(route).map((leg) => leg.since));
const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
const speed = (entry) => (entry ? (entry.there ?? 0) + (entry.back ?? 0) : 0);
const asParty = (party) => (party === "either" ? "either party" : party);
const otherParty = (party) => ({ func1: "func2", func2: "func1" })[party] ?? "either party";

/** Waiting is normal. It is highlighted after half of the time that a leg may wait. */
function waitTone(since, route) {
  const limit = state.routes.get(route)?.limits.wait_timeout;
  return limit && state.now() - since > limit / 2 ? "warn" : "";
}

new Table("routes", {
  key: (route) => route.name,
  words: (route) => {
    const config = state.routes.get(route.name);
    const found = [route.name, ...lobby(route).flatMap((leg) => [leg.identity, leg.address, leg.meet ?? ""])];
    if (config) found.push(...config.bound, ...PARTIES.map((party) => parties(config[party], config)));
    return found;
  },
  sorts: {
    name: (route) => route.name,
    rate: (route) => speed(state.rates.get(route.name)),
    pairings: (route) => route.pairings,
    waiting: (route) => (lobby(route).length ? state.now() - longest(route) : -1),
    refused: (route) => sum(route.refusals),
  },
  sort: ["name", 1],
  nothing: () => "",
  update(parts, route) {
    const config = state.routes.get(route.name);
    const entry = state.rates.get(route.name);
    set(parts.name, route.name);
    if (config) {
      setName(parts.bound, config.bound.join(", "));
      setName(parts.func1, parties(config.func1, config));
      setName(parts.func2, parties(config.func2, config));
    }
    rate(parts.there, entry?.there ?? null);
    rate(parts.back, entry?.back ?? null);
    sparkline(parts.spark, entry?.points ?? [], state.traffic.now);
    figure(parts.pairings, route.pairings);
    figure(parts.refused, sum(route.refusals));
    drawLobby(parts.waiting, route);
  },
});

function figure(node, n) {
  set(node, number(n));
  node.classList.toggle("zero", n === 0);
}

function drawLobby(node, route) {
  const sides = SIDES.filter((party) => route.waiting[party].length);
  node.classList.toggle("chip", sides.length > 0);
  node.classList.toggle("zero", !sides.length);
  if (!sides.length) return chip(node, "nobody");
  const since = longest(route);
  const who = sides.map((party) => {
    const count = route.waiting[party].length;
    return count > 1 ? `${count} ${party}` : party;
  });
  chip(node, `${who.join(", ")} · ${duration(state.now() - since)}`, waitTone(since, route.name));
}

new Table("pairings", {
  key: (pairing) => pairing.id,
  words: ({ route, id, meet, func1, func2 }) =>
    [route, id, meet ?? "", func1.identity, func1.address, func2.identity, func2.address],
  sorts: {
    route: (pairing) => pairing.route,
    rate: speed,
    total: (pairing) => pairing[BYTES[0]] + pairing[BYTES[1]],
    age: (pairing) => pairing.age,
  },
  sort: ["age", -1],
  nothing: () => "No pairing runs.",
  update(parts, pairing) {
    set(parts.route, pairing.route);
    setName(parts.id, pairing.id);
    setKey(parts.key, pairing.meet);
    for (const [index, party] of [[1, pairing.func1], [2, pairing.func2]]) {
      setName(parts[`func${index}`], party.identity);
      setName(parts[`place${index}`], party.address);
    }
    set(parts.modes, [...new Set([pairing.func1.mode, pairing.func2.mode])].join(", "));
    rate(parts.there, pairing.there);
    rate(parts.back, pairing.back);
    amount(parts["moved-there"], pairing[BYTES[0]]);
    amount(parts["moved-back"], pairing[BYTES[1]]);
    set(parts.age, duration(pairing.age));
    if (!pairing.is_handed_off) chip(parts.state, "hand-off", pairing.age > 3 ? "warn" : "");
    else if (pairing.quiet !== null && pairing.quiet >= QUIET) chip(parts.state, `quiet ${duration(pairing.quiet)}`);
    else chip(parts.state, "open", "good");
  },
});

new Table("waiting", {
  key: (leg) => [leg.route, leg.party, leg.address].join("\0"),
  words: (leg) => [leg.route, leg.party, leg.identity, leg.address, leg.meet ?? ""],
  nothing: () => "Nobody waits.",
  update(parts, leg) {
    const config = state.routes.get(leg.route);
    set(parts.route, leg.route);
    setName(parts.identity, leg.identity);
    chip(parts.since, duration(state.now() - leg.since), waitTone(leg.since, leg.route));
    const other = otherParty(leg.party);
    setName(parts.other, config?.[other] ? parties(config[other], config) : other);
    setName(parts.place, `as ${asParty(leg.party)} from ${leg.address} · ${leg.mode}`);
    setKey(parts.key, leg.meet);
  },
});

const words = (text) => new Set(text.split(" "));

// Codes and outcomes that are nobody's fault, and those that an operator should look at; the others say that a limit was reached.
const CALM = words("draining replaced route-removed closed hung-up drained max-lifetime");
const GRAVE = words(
  "not-authorised unknown-route revoked certificate-expired protocol-error internal-error not-tls truncated",
);
const tone = (word) => (CALM.has(word) ? "" : GRAVE.has(word) ? "bad" : "warn");

new Table("refusals", {
  key: (group) => group.key,
  words: (group) => [group.code, group.reason, group.address, group.route ?? "", group.who ?? "", group.meet ?? ""],
  nothing: () => `Nobody was refused since the relay started ${ago(state.now() - (state.status?.started_at ?? 0))}.`,
  update(parts, group) {
    chip(parts.code, group.code, tone(group.code));
    set(parts.times, group.times > 1 ? `${group.times} times, first ${ago(state.now() - group.first)}` : "");
    time(parts.at, group.at);
    set(parts.reason, group.reason);
    setName(parts.who, group.who ?? "no certificate");
    const place = [`from ${group.times > 1 ? group.host : group.address}`];
    if (group.route !== null) place.push(`to ${group.route}`);
    if (group.party !== null) place.push(`as ${asParty(group.party)}`);
    setName(parts.place, place.join(" "));
    setKey(parts.key, group.meet);
  },
});

new Table("endings", {
  key: (ending) => ending.pairing,
  words: (ending) =>
    [ending.outcome, ending.route, ending.func1, ending.func2, ending.detail ?? "", ending.pairing, ending.meet ?? ""],
  nothing: () => "No pairing has ended yet.",
  update(parts, ending) {
    chip(parts.outcome, ending.outcome, tone(ending.outcome));
    set(parts.route, ending.route);
    time(parts.at, ending.at);
    setName(parts.who, `${ending.func1} and ${ending.func2}${ending.detail ? `: ${ending.detail}` : ""}`);
    const by = ending.side === "both" ? "" : ` · by ${ending.side === "relay" ? "the relay" : ending.side}`;
    const [there, back] = BYTES.map((name) => size(ending[name]).join(" "));
    setName(parts.much, `after ${duration(ending.duration)}${by} · ${there} there, ${back} back`);
    setKey(parts.key, ending.meet);
  },
});

new Table("certificates", {
  key: (certificate) => certificate.what,
  words: () => [],
  nothing: () => "This relay has no [tls] section.",
  update(parts, certificate) {
    set(parts.what, CERTIFICATES[certificate.what] ?? certificate.what);
    const [tone, words] = expiry(certificate);
    chip(parts.left, words, tone);
    setName(parts.file, certificate.subject ? `${certificate.subject} · ${certificate.file}` : certificate.file);
    set(parts.date, clock(certificate.not_after));
  },
});

function draw() {
  const { status, traffic } = state;
  drawAlerts();
  drawHead();
  // Before the first answer the tables stay hidden: empty ones would say that there are no routes.
  for (const part of document.querySelectorAll("nav, main, footer")) part.hidden = false;
  tables.get("routes").show(traffic.routes);
  tables.get("pairings").show(state.pairings);
  tables.get("waiting").show(waiting());
  tables.get("refusals").show(refusals());
  tables.get("endings").show(state.endings);
  tables.get("certificates").show(status.certificates);
  const isEmpty = traffic.routes.length === 0;
  $("routes").querySelector(".scroll").hidden = isEmpty;
  const steps = $("routes").querySelector(".first-steps");
  steps.hidden = !isEmpty;
  set(steps.querySelector('[data-f="config"]'), status.config);
  drawTiles();
  drawRoute();
  facts($("relay-facts"), relayFacts());
}

function drawHead() {
  const { status } = state;
  const word = connection.isLost ? "connection lost" : status.state;
  chip($("state"), word, connection.isLost ? "bad" : status.state === "running" ? "good" : "warn");
  set($("name"), status.name);
  set($("uptime"), connection.isLost ? "" : `up ${duration(state.now() - status.started_at)}`);
  const alerts = $("alerts").childElementCount;
  const title = [word === "running" ? "" : `${word}:`, visible(status.name), alerts ? `(${alerts})` : "", "· frelay"];
  document.title = title.filter(Boolean).join(" ");
}

/** What an operator should look at now, worst first. */
function* alerts() {
  const { status } = state;
  const now = state.now();
  if (connection.isLost) {
    const text = `${lostBecause()} Trying again by itself.`;
    yield { key: "lost", tone: "bad", title: "No connection to the relay.", text };
  }
  if (!status) return;
  if (status.state === "draining") {
    const text = status.pairings ? `${plural(status.pairings, "pairing")} may still end.` : "No pairing is left.";
    yield { key: "draining", tone: "warn", title: "Draining: nobody new is let in.", text };
  }
  const reload = status.last_reload;
  if (!reload.ok) {
    const text = `The configuration before it stays in force. ${capital(ago(now - reload.at))}:`;
    const lines = reload.problems.map(problem);
    yield { key: "reload", tone: "bad", title: "The last reload was refused.", text, lines };
  }
  for (const certificate of status.certificates) {
    const [tone, words] = expiry(certificate);
    const what = CERTIFICATES[certificate.what] ?? certificate.what;
    const title = certificate.not_after > now ? `The ${what} runs out ${words}.` : `The ${what} ${words}.`;
    if (tone) yield { key: certificate.what, tone, title, text: certificate.file };
  }
  const { legs, leg_budget: budget } = status.descriptors;
  if (legs > 0.8 * budget) {
    const text = `${number(legs)} of at most ${number(budget)}; connections beyond that are refused.`;
    yield { key: "descriptors", tone: legs > 0.95 * budget ? "bad" : "warn", title: "Connections run out.", text };
  }
}

function lostBecause() {
  if (!state.status) return connection.reason;
  if (state.status.state === "draining") return "It was draining and has probably ended as requested.";
  const when = ago((Date.now() - connection.lastAnswer) / 1000);
  return `${connection.reason} Its last answer was ${when}; the figures below are from then.`;
}

/** relay.toml:12: admin.listen: what is wrong */
function problem({ file, line, key, message }) {
  const place = [file, line].filter(Boolean).join(":");
  return [place, key, message].filter(Boolean).join(": ");
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

function drawAlerts() {
  const box = $("alerts");
  const left = new Map([...box.children].map((child) => [child.dataset.key, child]));
  for (const { key, tone, title, text, lines = [] } of alerts()) {
    let node = left.get(key);
    left.delete(key);
    if (!node) {
      const line = element("p", {}, element("strong", {}), " ", element("span", {}));
      node = element("div", { class: "alert", "data-key": key }, line, element("ul", {}));
      box.append(node);
      announce(`${title} ${lines.join(" ")}`);
    }
    node.dataset.tone = tone;
    set(node.querySelector("strong"), title);
    set(node.querySelector("span"), text);
    list(node.querySelector("ul"), lines.length > 8 ? [...lines.slice(0, 8), `and ${lines.length - 8} more`] : lines);
  }
  for (const [key, node] of left) {
    node.remove();
    if (key === "lost") announce("Connected again.");
    if (key === "reload") announce("The configuration was reloaded.");
  }
  box.hidden = !box.childElementCount;
}

function list(node, lines) {
  while (node.childElementCount > lines.length) node.lastElementChild.remove();
  while (node.childElementCount < lines.length) node.append(element("li", {}));
  lines.forEach((line, index) => set(node.children[index], line));
  node.hidden = !lines.length;
}

const total = document.querySelector(".tiles .wide");

function drawTiles() {
  const { status } = state;
  const now = state.now();
  rate(total.querySelector('[data-f="there"]'), state.total.there);
  rate(total.querySelector('[data-f="back"]'), state.total.back);
  sparkline(total.querySelector("svg"), state.total.points, state.traffic.now);

  set($("tile-pairings"), number(status.pairings));
  const routes = new Set(state.pairings.map((pairing) => pairing.route)).size;
  const all = plural(status.routes, "route");
  set($("tile-pairings-note"), status.pairings ? `on ${number(routes)} of ${all}` : all);

  const [first] = waiting();
  set($("tile-waiting"), number(status.waiting));
  set($("tile-waiting-note"), first ? `longest ${duration(now - first.since)}` : "nobody");

  const recent = status.refusals.filter((refusal) => refusal.at > now - 900);
  const isMore = recent.length === status.refusals.length && recent.length >= 100; // the API has the last 100
  set($("tile-refused"), number(recent.length) + (isMore ? "+" : ""));
  set($("tile-refused-note"), status.refusals.length ? `last ${ago(now - status.refusals[0].at)}` : "none so far");

  const [next] = [...status.certificates].sort((a, b) => a.not_after - b.not_after);
  set($("tile-expiry"), next ? duration(Math.max(0, next.not_after - now)) : "–");
  set($("tile-expiry-note"), next ? CERTIFICATES[next.what] : "no certificates");
  $("tile-expiry").dataset.tone = next ? expiry(next)[0] : "";

  const { legs, leg_budget: budget } = status.descriptors;
  set($("tile-legs"), number(legs));
  set($("tile-legs-note"), `of at most ${number(budget)}`);
}

function facts(node, entries) {
  while (node.childElementCount > entries.length) node.lastElementChild.remove();
  while (node.childElementCount < entries.length) node.append(element("div", {}, element("dt", {}), element("dd", {})));
  entries.forEach(([term, text], index) => {
    set(node.children[index].firstElementChild, term);
    setName(node.children[index].lastElementChild, text);
  });
}

function relayFacts() {
  const { status } = state;
  const when = (at) => `${ago(state.now() - at)}, ${clock(at)}`;
  const { open, limit } = status.descriptors;
  return [
    ["Configuration", status.config],
    ["Last reload", `${status.last_reload.ok ? "taken over" : "refused"} ${when(status.last_reload.at)}`],
    ["Started", when(status.started_at)],
    ["Descriptors", `${number(open)} open of at most ${number(limit)}`],
    ["Process", String(status.pid)],
    ["Version", `frelay ${status.version}, ${status.openssl}`],
  ];
}

const INNER_TLS = { true: "required", false: "not required", always: "required, also in tunnels" };

/** The settings and the counts of the route that the page is filtered to. */
function drawRoute() {
  const config = filter.route === null ? null : state.routes.get(filter.route);
  $("route").hidden = !config;
  if (!config) return;
  set($("route-title"), `Route ${config.name}`);
  const traffic = state.traffic.routes.find((route) => route.name === config.name);
  const counts = (found) => Object.entries(found).map(([word, n]) => `${number(n)} ${word}`).join(", ") || "none";
  const { limits } = config;
  facts($("route-facts"), [
    ["Listens on", config.bound.join(", ")],
    ["func1", parties(config.func1, config)],
    ["func2", parties(config.func2, config)],
    ["Outer TLS", config.outer === "mtls" ? "mutual TLS" : "none"],
    ["Hand-off", config.handoff],
    ["Inner TLS", INNER_TLS[config.require_inner_tls]],
    ["Waits at most", `${duration(limits.wait_timeout)}, ${plural(limits.max_waiting_per_party, "leg")} per party`],
    [
      "With a key",
      `${plural(limits.max_waiting_per_meet, "leg")} per key and party, ${number(limits.max_waiting_by_meet)} in all`,
    ],
    ["Ends when idle for", `${duration(limits.idle_timeout)}, stalled for ${duration(limits.stall_timeout)}`],
    ["Pairings ended", traffic ? counts(traffic.outcomes) : ""],
    ["Refused", traffic ? counts(traffic.refusals) : ""],
    ["Moved", traffic ? BYTES.map((name) => size(traffic[name]).join(" ")).join(" there, ") + " back" : ""],
    ["File", config.file],
  ]);
}

// --- requests -------------------------------------------------------------------------------------------------------

const connection = {
  isLost: false,
  reason: "",
  lastAnswer: Date.now(),
  lastPoll: 0,
  failures: 0,
  timer: 0,
  isPolling: false,
  wait: PERIOD,
  events: null,
};

async function get(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(ANSWER_TIMEOUT), cache: "no-store" });
  if (!response.ok) throw new Error(`It answered ${response.status} to ${path}.`);
  return response.json();
}

async function poll() {
  clearTimeout(connection.timer);
  if (connection.isPolling || document.hidden) return; // a hidden page polls again as soon as it is shown
  connection.isPolling = true;
  connection.lastPoll = performance.now();
  try {
    const asked = ["/v1/status", "/v1/traffic", "/v1/pairings"];
    const [status, traffic, { pairings }] = await Promise.all(asked.map(get));
    connection.wait = Math.max(PERIOD, SHARE * (performance.now() - connection.lastPoll));
    if (state.status && state.status.started_at !== status.started_at) {
      state.forget();
      announce("The relay was started again.");
    }
    const isFirst = state.traffic === null;
    state.skew = status.now - Date.now() / 1000;
    state.status = status;
    takeTraffic(traffic);
    takePairings(pairings);
    if (state.routesAsOf !== traffic.last_reload_at) {
      state.routes = new Map((await get("/v1/routes")).routes.map((route) => [route.name, route]));
      state.routesAsOf = traffic.last_reload_at;
    }
    // A rate needs two polls, so the second one comes sooner.
    if (isFirst) connection.wait = Math.min(connection.wait, 1000);
    answered();
  } catch (error) {
    unanswered(error);
  } finally {
    connection.isPolling = false;
    connection.timer = setTimeout(poll, connection.wait);
  }
}

function answered() {
  Object.assign(connection, { isLost: false, failures: 0, lastAnswer: Date.now() });
  document.body.classList.remove("lost");
  draw();
  listen();
}

function unanswered(error) {
  connection.failures += 1;
  connection.wait = Math.min(1000 * connection.failures, 5000);
  // fetch throws a TypeError if there is no answer at all; its message differs between browsers.
  const isSilent = error instanceof TypeError || error.name === "TimeoutError";
  connection.reason = isSilent ? "It does not answer." : error.message;
  connection.isLost = true;
  document.body.classList.add("lost");
  stopListening();
  drawAlerts();
  if (state.status) drawHead();
  else chip($("state"), "connection lost", "bad");
}

/** Follow the events: only they tell which pairings have ended. The others cause an earlier poll. */
function listen() {
  if (connection.events) return;
  const events = new EventSource(`/v1/events?after=${state.lastEvent}`);
  connection.events = events;
  events.onerror = stopListening; // the next poll that is answered starts again
  for (const kind of ["waiting", "paired", "refused", "ended", "reloaded", "reload-refused", "draining"]) {
    events.addEventListener(kind, (message) => {
      const event = JSON.parse(message.data);
      state.lastEvent = Math.max(state.lastEvent, event.id);
      if (kind === "ended") {
        state.endings.unshift({ ...event.data, at: event.at });
        state.endings.length = Math.min(state.endings.length, ENDINGS_KEPT);
      }
      pollSooner();
    });
  }
}

function stopListening() {
  connection.events?.close();
  connection.events = null;
}

function pollSooner() {
  if (connection.isPolling || connection.wait > PERIOD) return;
  clearTimeout(connection.timer);
  connection.timer = setTimeout(poll, Math.max(0, connection.lastPoll + SOONEST - performance.now()));
}

document.addEventListener("visibilitychange", () => {
  // A browser has six connections to one server for all its tabs, so a hidden page must not keep any.
  if (document.hidden) stopListening();
  else poll();
});

filter.set(new URLSearchParams(location.hash.slice(1)).get("filter") ?? "");
poll();
