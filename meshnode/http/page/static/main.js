// Wires the page: the node's status into what shows it, the conversation, the keyboard.

import { useKey } from "/page/api.js";
import { Chat } from "/page/chat.js";
import { showAdapters, showModels } from "/page/choosers.js";
import { byId, say } from "/page/dom.js";
import { Known } from "/page/known.js";
import { showLearning, showReleases } from "/page/learning.js";
import { follow } from "/page/live.js";
import { MeshMap } from "/page/map.js";
import { showAnswers, showCopies, showHealth, showNodes, showServed } from "/page/mesh.js";
import { counted, nameOf } from "/page/words.js";

const RECEIPTS = 8; // that are shown

const known = new Known();
const map = new MeshMap(byId("map"));
const receipts = [];
let status = null;
let model = null;
let asking = false;

const chat = new Chat({
  receipt(receipt) {
    receipts.unshift(receipt);
    receipts.splice(RECEIPTS);
    show();
    answers();
  },
  asking(now) {
    asking = now;
    show();
  },
});

function readiness(text, tone) {
  const place = byId("readiness");
  say(place, text);
  place.dataset.tone = tone;
}

/** What changes with time alone, too. */
function show() {
  if (!status) return;
  const now = Date.now();
  const nodes = known.update(status, now);
  const layers = status.model?.layers ?? 0;
  showNodes(nodes, layers, now);
  map.update(nodes, layers, receipts[0]?.route ?? [], asking);
  const sessions = nodes.filter((node) => !node.gone).reduce((sum, node) => Math.max(sum, node.row.sessions), 0);
  say(byId("sessions"), `${counted(status.sessions, "answer")} being asked from this node, ${counted(sessions, "session")} in the busiest stage.`);
}

function answers() {
  showAnswers(receipts, new Map([...known.nodes].map(([peer, node]) => [peer, nameOf(node.row)])));
}

function changed(next) {
  status = next;
  say(byId("network"), status.network);
  readiness(status.ready ? `Ready: ${status.readiness}` : `Not ready: ${status.readiness}`, status.ready ? "good" : "warn");
  show();
  showServed(status);
  showCopies(status);
  showHealth(status);
  showLearning(status);
  showReleases(status);
  showAdapters(status);
  if (status.model?.manifest !== model) {
    model = status.model?.manifest;
    if (model) showModels().catch(() => {}); // "auto" can always be asked
  }
}

/** Ask the person for a key; settled when there is one. */
function key(error) {
  readiness(error.message, "bad");
  byId("key-why").textContent = error.message;
  const dialog = byId("key-dialog");
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener(
      "close",
      () => {
        useKey(byId("key").value.trim());
        done();
      },
      { once: true },
    );
  });
}

function view() {
  const wanted = ["chat", "mesh", "learning"].find((name) => location.hash === `#${name}`) ?? "chat";
  document.body.dataset.view = wanted;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === wanted) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

addEventListener("hashchange", view);
addEventListener("keydown", (event) => {
  const writing = event.target.closest?.("input, textarea, select, dialog");
  if (event.key === "Escape" && !byId("key-dialog").open && !event.target.closest?.("article")) chat.stop();
  if (event.key === "/" && !writing) {
    event.preventDefault();
    location.hash = "#chat";
    byId("question").focus();
  }
});
setInterval(show, 1000);
view();
follow({
  status: changed,
  lost: (sentence) => readiness(`${sentence} Trying again…`, "bad"),
  refused: key,
});
