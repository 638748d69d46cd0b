// What this node learns with others, and what came of it.

import { byId, el, fill, svg } from "/page/dom.js";
import { counted, nameOf, short, size } from "/page/words.js";

const WIDTH = 480;
const HEIGHT = 140;

export function showLearning(status) {
  const { learning, samples } = status;
  const names = new Map([status.me, ...status.peers].map((row) => [row.peer, nameOf(row)]));
  const facts = [
    ["State", `${learning.state}${learning.paused ? ", paused" : ""}${learning.why ? `: ${learning.why}` : ""}`],
    learning.lesson && ["Round", `${learning.round} of ${learning.rounds}, ${counted(learning.steps, "step")} on ${counted(learning.samples, "sample")}`],
    learning.participants.length > 0 && ["With", learning.participants.map((peer) => names.get(peer) ?? short(peer)).join(", ")],
    learning.lesson && ["Exchanged", `${learning.published} sent (${size(learning.sent_bytes)}), ${learning.mixed} taken (${size(learning.fetched_bytes)})`],
    ["Samples here", `${samples.labelled} to learn from, ${samples.fresh} of them new; ${counted(samples.answers, "answer")} not judged`],
    samples.judged > 0 && ["Judged here", `${samples.judged_wrong} of the last ${counted(samples.judged, "answer")} were wrong`],
  ].filter(Boolean);
  const refusals = learning.refusals.length > 0 && el("ul", {}, learning.refusals.map((text) => el("li", { class: "low" }, text)));
  const list = el("dl", {}, facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
  fill(byId("learning"), [list, refusals, learning.losses.length > 1 && curve(learning.losses)].filter(Boolean));
}

/** Losses of the last steps, oldest first. */
function curve(losses) {
  const low = Math.min(...losses);
  const high = Math.max(...losses);
  const x = (index) => 40 + ((WIDTH - 50) * index) / (losses.length - 1);
  const y = (loss) => 10 + (HEIGHT - 30) * (high > low ? (high - loss) / (high - low) : 0.5);
  const words = `Loss over the last ${losses.length} steps: from ${losses[0].toFixed(3)} to ${losses.at(-1).toFixed(3)}`;
  return el(
    "figure",
    {},
    svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words, class: "curve" },
      svg("line", { x1: 40, y1: HEIGHT - 20, x2: WIDTH - 10, y2: HEIGHT - 20, class: "axis" }),
      svg("text", { x: 34, y: 16, class: "tick" }, high.toFixed(2)),
      svg("text", { x: 34, y: HEIGHT - 20, class: "tick" }, low.toFixed(2)),
      svg("polyline", { points: losses.map((loss, index) => `${x(index).toFixed(1)},${y(loss).toFixed(1)}`).join(" ") }),
    ),
    el("figcaption", {}, words),
  );
}

export function showReleases(status) {
  const made = status.releases.map((one) =>
    el(
      "li",
      { class: "card" },
      el("div", { class: "card-head" }, el("strong", {}, one.version || short(one.adapter)), el("span", { class: "badge" }, one.phase), one.in_use && el("span", { class: "badge good" }, "answers here")),
      one.why && el("div", {}, one.why),
      el("div", { class: "quiet" }, `${one.in_favour} of ${counted(one.votes, "vote")} for it${one.median === null ? "" : `, loss ${one.median > 0 ? "+" : ""}${one.median.toFixed(3)}`}; ${Math.round(one.share_percent)} % of the nodes; here ${one.right} right, ${one.wrong} wrong`),
    ),
  );
  fill(byId("releases"), made.length ? made : [el("li", { class: "quiet" }, "Nothing was learned and proposed yet.")]);
}
