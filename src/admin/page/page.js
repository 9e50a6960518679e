// Polls /overview once a second and shows it. What the router says becomes text nodes, never markup.

import { Chart } from "/page.charts.js";
import { explanation } from "/page.explain.js";
import { Table, bar, element, state } from "/page.tables.js";
import { ago, bytes, count, duration, perSecond, share } from "/page.words.js";

const POLL_MS = 1000;
/** A page that nobody sees still fills its plots. */
const HIDDEN_POLL_MS = 5000;
const PATIENCE_MS = 5000;
/** A dry run tokenizes, which may take as long as the router is told to wait; its port answers nobody after this. */
const DRY_RUN_PATIENCE_MS = 60000;
const HISTORY_MS = 10 * 60 * 1000;
const MINUTE_MS = 60 * 1000;
/** "Now" is a mean over this, so that a slow load does not flicker between 0 and 1. */
const NOW_MS = 5000;
const OUTCOMES = ["prefix_match", "learned_match", "no_match", "fallback"];
const TOKEN_KEY = "warmroute-token";
const STATES = { live: "good", catching_up: "wait", connecting: "wait", incomplete: "wait", stale: "wait" };

const byId = (id) => document.getElementById(id);
const write = (id, text) => { const node = byId(id); if (node.textContent !== text) node.textContent = text; };

let isPaused = false;
/** The newest answer, whole. */
let latest = null;
/** What has been counted at each answer, oldest first; no more of an answer than what grows, since there are many. */
let history = [];

// Talking to the router.

class Unauthorized extends Error {}

/** Without a name of the tab's storage in reach (some browsers forbid it), the token is kept here. */
let token = "";
try { token = sessionStorage.getItem(TOKEN_KEY) ?? ""; } catch { /* kept in memory */ }

async function ask(path, { patience = PATIENCE_MS, ...options } = {}) {
  const headers = new Headers(options.headers);
  if (token) headers.set("authorization", `Bearer ${token}`);
  const response = await fetch(path, { ...options, headers, cache: "no-store", signal: AbortSignal.timeout(patience) });
  if (response.status === 401) throw new Unauthorized();
  if (!response.ok) throw new Error(`${response.status}: ${(await response.text()).trim().slice(0, 400)}`);
  return response.json();
}

function askForToken() {
  const dialog = byId("auth");
  if (dialog.open) return;
  byId("auth-wrong").hidden = !token;
  byId("auth-token").value = "";
  dialog.showModal();
}

byId("auth-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("auth-token").value.trim();
  try { sessionStorage.setItem(TOKEN_KEY, token); } catch { /* kept in memory */ }
  byId("auth").close();
});

let timer = 0;
async function poll() {
  clearTimeout(timer);
  try {
    if (!isPaused) {
      const overview = await ask("/overview");
      // What was under way when it was paused would replace the rows that somebody looks at.
      if (!isPaused) take(overview);
    }
    byId("notice").hidden = true;
  } catch (error) {
    if (error instanceof Unauthorized) askForToken();
    else unreachable(error);
  }
  const isWaiting = byId("auth").open;
  // Two polls may have been under way; one goes on.
  clearTimeout(timer);
  if (!isWaiting) timer = setTimeout(poll, document.hidden ? HIDDEN_POLL_MS : POLL_MS);
}

function unreachable(error) {
  const seen = history.at(-1);
  const since = seen ? `; the values below are ${ago(Date.now() - seen.at)} old` : "";
  write("notice", `The router does not answer (${error.message})${since}. Trying again.`);
  byId("notice").hidden = false;
  byId("status").replaceChildren(element("span", { class: "pill bad" }, "unreachable"));
}

// What two answers say together.

function take(overview) {
  const at = Date.now();
  const last = history.at(-1);
  // Counters that fall belong to another process.
  if (last && overview.totals.decisions < last.totals.decisions) history = [];
  latest = overview;
  history.push({ at, totals: overview.totals, endpoints: new Map(overview.endpoints.map(counted)) });
  history = history.filter((sample) => sample.at > at - HISTORY_MS - NOW_MS);
  show();
}

const endpointKey = (row) => `${row.model} ${row.endpoint}`;
const counted = (row) => {
  const { decisions, matched_tokens, prompt_tokens } = row;
  return [endpointKey(row), { decisions, matched_tokens, prompt_tokens }];
};

/** The sample that is `ms` older than the `idx`-th one, or the oldest there is. */
function before(idx, ms) {
  const limit = history[idx].at - ms;
  let from = idx;
  while (from > 0 && history[from].at > limit) from -= 1;
  return history[from];
}

/** Growth of what `read` finds between two samples; what was not there before began at 0. */
const growth = (from, to, read) => Math.max(0, (read(to) ?? 0) - (read(from) ?? 0));
const rate = (from, to, read) => (to.at > from.at ? growth(from, to, read) / ((to.at - from.at) / 1000) : null);
const ratio = (part, whole) => (whole > 0 ? part / whole : null);
const hit = (from, to, read = (sample) => sample.totals) =>
  ratio(growth(from, to, (s) => read(s)?.matched_tokens), growth(from, to, (s) => read(s)?.prompt_tokens));
const sum = (rows, read) => rows.reduce((total, row) => total + (read(row) ?? 0), 0);
const degradedReasons = ({ totals }) => ({
  ...totals.fallbacks,
  "left to Envoy": totals.left_to_envoy,
  "refused": totals.refused,
});
const endpointOf = (row) => (sample) => sample.endpoints.get(endpointKey(row));

// Showing it.

function show() {
  const newest = history.length - 1;
  const now = history[newest];
  const recent = before(newest, NOW_MS);
  const minute = before(newest, MINUTE_MS);
  showHeader(latest);
  showTiles(now, recent, minute);
  const samples = history.map((sample, idx) => plotted(before(idx, NOW_MS), sample));
  decisionsPlot.draw(samples);
  hitPlot.draw(samples);
  endpoints.show(latest.endpoints.map((row) => ({ ...row, ...rates(row, now, recent, minute) })));
  write("endpoints-count", String(latest.endpoints.length));
  sources.show(latest.sources);
  const live = latest.sources.filter((row) => row.state === "live").length;
  write("sources-count", latest.sources.length ? `${live} of ${latest.sources.length} live` : "");
  decisions.show(latest.recent);
}

function plotted(from, to) {
  const outcomes = OUTCOMES.map((name) => [name, rate(from, to, (sample) => sample.totals.by_outcome[name])]);
  return { at: to.at, ...Object.fromEntries(outcomes), hit: hit(from, to) };
}

function rates(row, now, recent, minute) {
  const find = endpointOf(row);
  return {
    rate: rate(recent, now, (sample) => find(sample)?.decisions),
    hit: hit(minute, now, find),
    states: row.sources.map((source) => source.state),
  };
}

function showHeader(overview) {
  write("version", `${overview.version} · up ${duration(overview.uptime_s)}`);
  const pills = overview.ready
    ? [element("span", { class: "pill good" }, "ready")]
    : overview.not_ready.map((reason) => element("span", { class: "pill wait" }, reason));
  if (overview.rollout !== "active") {
    const says = { shadow: "shadow: decides, Envoy picks", off: "off: Envoy picks" }[overview.rollout] ?? overview.rollout;
    pills.unshift(element("span", { class: "pill wait" }, says));
  }
  if (isPaused) pills.unshift(element("span", { class: "pill wait" }, "paused"));
  byId("status").replaceChildren(...pills);
}

function showTiles(now, recent, minute) {
  const { totals, index, endpoints: rows } = latest;
  write("tile-rate", perSecond(rate(recent, now, (sample) => sample.totals.decisions)));
  write("tile-rate-more", `${count(totals.decisions)} since start`);
  write("tile-hit", share(hit(minute, now)));
  write("tile-hit-more", `of prompt tokens, last minute · ${share(ratio(totals.matched_tokens, totals.prompt_tokens))} since start`);
  showDegraded(now, recent, minute);
  write("tile-flight", count(sum(rows, (row) => row.in_flight)));
  const avoided = rows.filter((row) => row.avoided_ms !== null && row.avoided_ms !== undefined).length;
  write("tile-flight-more", `on ${rows.length} endpoints${avoided ? `, ${avoided} avoided` : ""}`);
  write("tile-index", bytes(index.bytes));
  byId("tile-meter").value = ratio(index.bytes, index.limit_bytes) ?? 0;
  write("tile-index-more", `${share(ratio(index.bytes, index.limit_bytes))} of ${bytes(index.limit_bytes)} · ${count(sum(index.keyspaces, (k) => k.n_blocks))} blocks`);
}

function showDegraded(now, recent, minute) {
  const total = (sample) => sum(Object.values(degradedReasons(sample)), (n) => n);
  write("tile-degraded", perSecond(rate(recent, now, total)));
  const grown = Object.keys(degradedReasons(now))
    .map((name) => [name, growth(minute, now, (sample) => degradedReasons(sample)[name])])
    .filter(([, n]) => n > 0)
    .sort((a, b) => b[1] - a[1]);
  const reasons = grown.slice(0, 3).map(([name, n]) => `${count(n)} ${name.replaceAll("_", " ")}`);
  write("tile-degraded-more", reasons.length ? `${reasons.join(", ")} in the last minute` : "nothing in the last minute");
}

// Plots and tables.

const decisionsPlot = new Chart(byId("plot-decisions"), {
  kind: "stacked",
  series: OUTCOMES.map((name) => ({ key: name, label: name.replace("_", " ") })),
  format: perSecond,
  history: HISTORY_MS,
});
const hitPlot = new Chart(byId("plot-hit"), {
  kind: "line",
  series: [{ key: "hit", label: "matched of prompt tokens", class: "prefix_match" }],
  format: share,
  top: 1,
  history: HISTORY_MS,
});

const stateCell = (name) => state(name.replaceAll("_", " "), STATES[name] ?? "bad");
/** The worst states first, so that one bad rank among many is seen. */
function statesCell(states) {
  if (!states.length) return element("span", { class: "quiet" }, "no events");
  const names = [...new Set(states)].sort((a, b) => (a === "live") - (b === "live"));
  const nodes = names.map((name) => {
    const n = states.filter((other) => other === name).length;
    return state((states.length > 1 ? `${n} ` : "") + name.replaceAll("_", " "), STATES[name] ?? "bad");
  });
  return element("span", {}, ...nodes.flatMap((node, idx) => (idx ? [" ", node] : [node])));
}

const endpoints = new Table(byId("endpoints"), {
  empty: "No endpoint is listed yet.",
  sort: "endpoint",
  key: endpointKey,
  columns: [
    { key: "endpoint", title: "Endpoint", cell: (row) => element("span", { class: "code" }, row.endpoint) },
    { key: "model", title: "Model" },
    { key: "states", title: "Events", by: (row) => row.states.join(), cell: (row) => statesCell(row.states) },
    { key: "n_blocks", title: "Cached blocks", number: true, cell: (row, most) => bar(row.n_blocks, most, count(row.n_blocks)) },
    { key: "in_flight", title: "In flight", number: true, cell: (row, most) => bar(row.in_flight, most, count(row.in_flight), "flight") },
    { key: "rate", title: "Decisions/s", number: true, cell: (row) => perSecond(row.rate) },
    { key: "decisions", title: "Decisions", number: true, cell: (row) => count(row.decisions) },
    { key: "hit", title: "Hit ratio, 1 min", number: true, cell: (row) => share(row.hit) },
    { key: "avoided_ms", title: "Avoided", cell: (row) => (row.avoided_ms == null ? "" : state(`for ${duration(row.avoided_ms / 1000)}`, "bad")) },
  ],
});

const sources = new Table(byId("sources"), {
  empty: "No endpoint publishes events: picks are by load, or by what was picked before.",
  sort: "endpoint",
  key: (row) => `${row.model} ${row.endpoint} ${row.rank}`,
  columns: [
    { key: "endpoint", title: "Endpoint", cell: (row) => element("span", { class: "code" }, row.endpoint) },
    { key: "rank", title: "Rank", number: true },
    { key: "model", title: "Model" },
    { key: "state", title: "State", cell: (row) => stateCell(row.state) },
    { key: "blocks", title: "Blocks", number: true, by: (row) => row.n_blocks, cell: (row) => count(row.n_blocks) },
    { key: "last_seq", title: "Last batch", number: true, cell: (row) => count(row.last_seq) },
    { key: "last_event_ms", title: "Last event", number: true, cell: (row) => (row.last_event_ms == null ? "–" : ago(row.last_event_ms)) },
    { key: "proved", title: "Proved hashes", by: (row) => (row.proved ?? []).join(), cell: (row) => (row.proved ?? []).join(", ") || "–" },
    { key: "generations", title: "Generations", number: true },
    { key: "gaps", title: "Gaps", number: true },
    { key: "replays", title: "Replays", number: true },
  ],
});

const decisions = new Table(byId("decisions"), {
  empty: "No request has come yet.",
  key: (row, idx) => row.request_id ?? `#${idx}`,
  columns: [
    { key: "request_id", title: "Request", cell: requestCell },
    { key: "age_ms", title: "Age", number: true, cell: (row) => ago(row.age_ms) },
    { key: "model", title: "Model" },
    { key: "outcome", title: "Outcome", cell: outcomeCell },
    { key: "prompt_tokens", title: "Prompt", number: true, cell: (row) => count(row.prompt_tokens) },
    { key: "matched_tokens", title: "Matched", number: true, cell: (row) => bar(row.matched_tokens, row.prompt_tokens, share(ratio(row.matched_tokens, row.prompt_tokens))) },
    { key: "pick", title: "Pick", cell: (row) => element("span", { class: "code" }, row.pick ?? "–") },
    { key: "settled", title: "Served", cell: (row) => servedCell(row.outcome_later ?? {}) },
  ],
});

function requestCell(row) {
  if (!row.request_id) return element("span", { class: "quiet" }, "without an id");
  const button = element("button", { type: "button", class: "link code", title: row.request_id }, row.request_id.slice(0, 13));
  button.addEventListener("click", () => showDecision(row.request_id));
  return button;
}

function outcomeCell(row) {
  const name = row.outcome ?? row.verdict ?? "none";
  const known = OUTCOMES.includes(name) ? name : "other";
  const reason = row.fallback ?? row.reason;
  const text = name.replaceAll("_", " ") + (reason ? `: ${reason.replaceAll("_", " ")}` : "");
  const shadow = row.mode === "shadow" ? [" ", element("span", { class: "quiet" }, "shadow")] : [];
  return element("span", { class: "state-row" }, element("span", { class: `swatch inline ${known}` }), ` ${text}`, ...shadow);
}

function servedCell(later) {
  if (later.settled == null) return element("span", { class: "quiet" }, later.ended_after_ms == null ? "under way" : "–");
  return state(later.settled.replaceAll("_", " "), later.settled === "as_picked" ? "good" : "wait");
}

// Explanations.

async function showDecision(id) {
  write("detail-title", `Decision of ${id}`);
  byId("detail-answer").replaceChildren(element("p", { class: "quiet" }, "asking…"));
  if (!byId("detail").open) byId("detail").showModal();
  await explain(byId("detail-answer"), `/explain/${encodeURIComponent(id)}`);
}

async function explain(place, path, options) {
  try {
    place.replaceChildren(explanation(await ask(path, options)));
  } catch (error) {
    if (error instanceof Unauthorized) askForToken();
    place.replaceChildren(element("p", { class: "wrong" }, error.message || "a token is needed"));
  }
}

byId("detail-close").addEventListener("click", () => byId("detail").close());

byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const send = byId("ask-send");
  send.disabled = true;
  const path = `/explain?path=${encodeURIComponent(byId("ask-path").value)}`;
  await explain(byId("ask-answer"), path, {
    method: "POST",
    patience: DRY_RUN_PATIENCE_MS,
    body: byId("ask-body").value,
    headers: { "content-type": "application/json" },
  });
  send.disabled = false;
});

function pause() {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  write("pause", isPaused ? "Go on" : "Pause");
  if (latest) showHeader(latest);
}

byId("pause").addEventListener("click", pause);
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest?.("input, textarea, select, dialog");
  if (event.key === "p" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) pause();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
byId("auth").addEventListener("close", () => poll());

poll();
