// The mesh in words: nodes, copies, health, the answers of this page.

import { byId, el, fill, say } from "/page/dom.js";
import { ago, counted, does, layers, ms, nameOf, short, size } from "/page/words.js";

/** The line under the title. */
export function showServed(status) {
  const model = status.model;
  const served = model ? `${model.name} ${model.version}, ${model.variant}, ${counted(model.layers, "layer")}` : "No model is served.";
  say(byId("served"), status.prediction ? `${served}. Predicted: ${status.prediction}` : served);
}

export function showNodes(nodes, layerCount, now) {
  fill(byId("nodes"), nodes.map((node) => card(node, layerCount, now)));
}

function card(node, layerCount, now) {
  const { row } = node;
  const facts = node.gone
    ? [`${node.why}, ${ago((now - node.gone) / 1000)}`]
    : [
        does(row),
        !node.me && (row.connected ? (row.round_trip_ms === null ? "connected" : `round trip ${ms(row.round_trip_ms)}`) : `not connected, last heard of ${ago(row.age_s ?? 0)}`),
        row.sessions > 0 && counted(row.sessions, "session"),
        row.memory_bytes > 0 && `gives ${size(row.memory_bytes)}`,
        row.layer_decode_us > 0 && `${ms((row.layer_decode_us * Math.max(1, (row.last ?? 0) - (row.first ?? 0))) / 1000)} a token`,
      ].filter(Boolean);
  return el(
    "li",
    { class: `card ${node.gone ? "gone" : ""}`, "data-peer": row.peer, "data-state": node.gone ? "lost" : row.state },
    el("div", { class: "card-head" }, el("strong", {}, nameOf(row)), node.me && el("span", { class: "badge" }, "this node"), el("span", { class: "quiet", title: row.peer }, short(row.peer))),
    el("div", {}, facts.join(" · ")),
    layerCount > 0 && !node.gone && track(row, layerCount),
    row.trouble && el("div", { class: "warn" }, row.trouble),
  );
}

function track(row, layerCount) {
  const bar = el("div", { class: "track", "aria-hidden": "true" });
  for (const [span, kind] of [
    [row.target, "coming"],
    [row.first === null ? null : [row.first, row.last], "held"],
  ]) {
    if (!span) continue;
    const part = el("div", { class: kind });
    part.style.left = `${(100 * span[0]) / layerCount}%`;
    part.style.width = `${(100 * (span[1] - span[0])) / layerCount}%`;
    bar.append(part);
  }
  return bar;
}

/** Copies of every layer, thin ones marked. */
export function showCopies(status) {
  const place = byId("copies");
  const { copies, content, progress } = status;
  if (!copies) {
    fill(place, []);
    return;
  }
  const counts = Object.entries(copies.groups);
  const words =
    copies.nodes === 1
      ? "This node alone holds the model; a second node would keep a copy of every file."
      : copies.short
        ? `${copies.short} of ${copies.files} files have too few copies (the fewest ${copies.fewest}, wanted ${copies.wanted})${copies.planned ? "; copies are being made" : ""}.`
        : `${copies.fewest} or more copies of every file.`;
  fill(place, [
    el("h3", {}, "Copies"),
    el(
      "div",
      { class: "cells", role: "img", "aria-label": words },
      counts.map(([name, count]) => el("span", { class: count >= copies.wanted ? "full" : count ? "thin" : "none", title: `${name}: ${counted(count, "copy").replace("copys", "copies")}` })),
    ),
    el("p", {}, words),
    el("p", { class: "quiet" }, `Of the model, ${size(content.hot_bytes)} are in use here, ${size(content.warm_bytes)} more on this disk, ${size(content.cold_bytes)} elsewhere. Fetched ${size(content.fetched_bytes)}, given ${size(content.served_bytes)}.`),
    ...(progress
      ? [
          el("label", {}, `${progress.phase} ${layers(progress.span.first, progress.span.last)} `, el("progress", { max: Math.max(1, progress.bytes_total), value: progress.bytes_done })),
          el("span", { class: "quiet" }, ` ${size(progress.bytes_done)} of ${size(progress.bytes_total)}`),
        ]
      : []),
  ]);
}

/** What is wrong, each with what to do. */
export function showHealth(status) {
  const found = [
    ...status.health.map((one) => [one.severity, one.text]),
    ...status.peers.filter((peer) => peer.trouble).map((peer) => ["medium", `${nameOf(peer)} says: ${peer.trouble}`]),
    ...Object.entries(status.unreachable).map(([who, why]) => ["low", `${short(who)} can't be reached: ${why}`]),
  ];
  const lines = found.map(([severity, text]) => el("li", { class: severity }, el("strong", {}, `${severity}: `), text));
  fill(byId("health"), lines.length ? lines : [el("li", { class: "good" }, "Nothing is wrong.")]);
}

/** The answers of this page, the newest first: who computed them, and where the time of a token went. */
export function showAnswers(receipts, names) {
  byId("answers").replaceChildren(...receipts.map((receipt) => answer(receipt, names)));
}

function answer(receipt, names) {
  const longest = Math.max(...receipt.hops.map(total), receipt.return_ms, 0.001);
  const speed = receipt.decode_tok_s === null ? "" : `, ${receipt.decode_tok_s.toFixed(1)} tokens a second`;
  const rows = receipt.hops.map((hop) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, names.get(hop.peer) ?? short(hop.peer)),
      el("td", {}, layers(hop.first, hop.last)),
      el("td", {}, bar(hop, longest)),
      el("td", { class: "figure" }, `${ms(hop.network_ms)} way, ${ms(hop.queue_ms)} wait, ${ms(hop.compute_ms)} work`),
    ),
  );
  return el(
    "details",
    { class: "answer", open: true },
    el("summary", {}, `${counted(receipt.completion_tokens, "token")}, first after ${ms(receipt.ttft_ms)}${speed}`),
    rows.length
      ? el(
          "div",
          { class: "scroll", tabindex: 0 },
          el("table", {}, el("thead", {}, el("tr", {}, ["Node", "Layers", "Time of a token", "Median"].map((word) => el("th", { scope: "col" }, word)))), el("tbody", {}, rows)),
        )
      : el("p", { class: "quiet" }, receipt.route.map((stage) => `${names.get(stage.peer) ?? short(stage.peer)}: ${layers(stage.first, stage.last)}`).join(" → ")),
    el("p", { class: "quiet" }, `${receipt.model.name} ${receipt.model.version}, ${receipt.adapter ? `adapter …${receipt.adapter.slice(-8)}` : "no adapter"}, back here in ${ms(receipt.return_ms)}, receipt ${receipt.id}`),
  );
}

function total(hop) {
  return hop.network_ms + hop.queue_ms + hop.compute_ms;
}

function bar(hop, longest) {
  const whole = el("div", { class: "times", "aria-hidden": "true" });
  for (const kind of ["network", "queue", "compute"]) {
    const part = el("div", { class: kind });
    part.style.width = `${(100 * hop[`${kind}_ms`]) / longest}%`;
    whole.append(part);
  }
  return whole;
}
