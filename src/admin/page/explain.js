// One decision in words and tables: the answer of POST /explain, or of GET /explain/{request-id}.

import { Table, bar, element, state } from "/page.tables.js";
import { ago, count, micros, share } from "/page.words.js";

const STAGES = ["parse", "tokenize", "hash", "lookup", "pick"];
const words = (name) => String(name ?? "").replaceAll("_", " ");
const isKnown = (value) => value !== null && value !== undefined && value !== "";

export function explanation(answer) {
  const candidates = answer.candidates ?? answer.standings ?? [];
  const parts = [lead(answer), facts(answer), stages(answer.timings_us ?? {})];
  if (candidates.length) parts.push(candidateTable(answer, candidates));
  if (answer.outcome_later) parts.push(element("h2", {}, "What became known later"), later(answer.outcome_later));
  return element("div", { class: "answer" }, ...parts);
}

function lead(answer) {
  const isShadow = answer.mode === "shadow" && answer.pick;
  const shadowed = isShadow ? [" (shadow: would go to ", element("strong", { class: "code" }, answer.pick), ")"] : [];
  const verdicts = {
    route: answer.pick ? ["Goes to ", element("strong", { class: "code" }, answer.pick)] : ["Is routed"],
    leave_to_envoy: ["Is left to Envoy's own policy", ...shadowed],
    refuse: ["Is refused"],
  };
  const verdict = verdicts[answer.verdict] ?? [words(answer.verdict)];
  // A body that cannot be read names no model, which is not what is wrong with it.
  const reason = answer.reason === "no_model" && answer.body_fault ? `the body cannot be read: ${answer.body_fault}` : words(answer.reason);
  const why = reason ? `: ${reason}` : answer.why ? `: ${answer.why}` : "";
  return element("p", { class: "lead" }, ...verdict, why);
}

function facts(answer) {
  const best = answer.matched_tokens ?? (answer.candidates ?? []).find(({ endpoint }) => endpoint === answer.pick)?.matched_tokens;
  const blocks = (answer.blocks ?? []).map(({ n_blocks, keyspace }) => `${n_blocks} (${keyspace})`);
  return list([
    ["Model", answer.requested && answer.requested !== answer.model ? `${answer.model} (asked for ${answer.requested})` : answer.model],
    ["Outcome", words(answer.outcome) + (answer.fallback ? `: ${words(answer.fallback)}` : "")],
    ["Policy", words(answer.policy)],
    ["Prompt tokens", answer.pick && isKnown(answer.prompt_tokens) ? count(answer.prompt_tokens) : null],
    ["Matched", isKnown(best) && answer.prompt_tokens ? `${count(best)} tokens, ${share(best / answer.prompt_tokens)}` : null],
    ["Blocks looked up", blocks.join(", ")],
    ["Runner-up", answer.runner_up],
    ["Rank", answer.rank],
    ["Decided at", answer.at],
  ]);
}

function later(known) {
  return list([
    ["Served by", known.served_by],
    ["Status", known.status],
    ["Attempts", known.attempts],
    ["Settled", words(known.settled)],
    ["Ended after", isKnown(known.ended_after_ms) ? ago(known.ended_after_ms) : "not yet"],
    ["First new block after", isKnown(known.first_block_after_ms) ? ago(known.first_block_after_ms) : null],
    ["Stored again although predicted", isKnown(known.blocks_stored_again) ? `${count(known.blocks_stored_again)} blocks` : null],
  ]);
}

function list(pairs) {
  const known = pairs.filter(([, value]) => isKnown(value));
  return element("dl", { class: "facts" }, ...known.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
}

/** The decision's time, by stage; what is between the stages is the rest. */
function stages(timings) {
  const total = timings.total ?? 0;
  if (!total) return element("div");
  const strip = element("div", { class: "stages", "aria-hidden": "true" }, ...STAGES.map((name) => {
    const part = element("i", { class: `stage-${name}` });
    part.style.width = `${(100 * (timings[name] ?? 0)) / total}%`;
    return part;
  }));
  const legend = element("ul", { class: "legend" }, ...STAGES.map((name) =>
    element("li", {}, element("span", { class: `swatch stage-${name}` }), name, element("b", {}, micros(timings[name])))));
  return element("div", {}, element("h2", {}, `Took ${micros(total)}`), strip, legend);
}

function candidateTable(answer, candidates) {
  const table = element("table");
  const scroll = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Candidates" }, table);
  const rows = new Table(table, {
    empty: "",
    key: ({ endpoint }) => endpoint,
    columns: [
      { key: "endpoint", title: "Endpoint", cell: ({ endpoint }) => element("span", { class: "code" }, endpoint) },
      { key: "matched_tokens", title: "Matched tokens", number: true, cell: (row) => bar(row.matched_tokens, answer.prompt_tokens, count(row.matched_tokens)) },
      { key: "promised_tokens", title: "Promised", number: true, cell: (row) => count(row.promised_tokens) },
      { key: "offloaded_tokens", title: "Offloaded", number: true, cell: (row) => count(row.offloaded_tokens) },
      { key: "in_flight", title: "In flight", number: true, cell: (row) => count(row.in_flight) },
      { key: "standing", title: "", cell: (row) => standing(answer, row) },
    ],
  });
  rows.show(candidates);
  return scroll;
}

function standing(answer, row) {
  if (row.endpoint === answer.pick) return state("pick", "good");
  if (row.not_because) return state(words(row.not_because), "bad");
  if (isKnown(row.avoided_ms)) return state(`avoided for ${ago(row.avoided_ms)}`, "bad");
  if (row.is_too_far_ahead) return state("too far ahead in load", "wait");
  return row.endpoint === answer.runner_up ? "runner-up" : "";
}
