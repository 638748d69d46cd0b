// The map: this node in the middle, the others around it, nearer when their round trip is shorter. The ring of a node
// shows which layers it holds; arrows show the way of the last answer.

import { svg } from "/page/dom.js";
import { does, layers, ms, nameOf } from "/page/words.js";

const HEIGHT = 300;
const RING = 23;
const TURN = 2 * Math.PI * RING;

export class MeshMap {
  constructor(place) {
    this.place = place;
    this.nodes = [];
    this.layers = 0;
    this.route = [];
    this.flowing = false;
    new ResizeObserver(() => this.draw()).observe(place);
  }

  /** `nodes`: see known.js; `layers`: of the model; `route`: [{peer}], stages of the last answer. */
  update(nodes, layers, route, flowing) {
    const drawn = JSON.stringify([nodes, layers, route, flowing], (key, value) => (key === "age_s" ? 0 : value));
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    Object.assign(this, { nodes, layers, route, flowing });
    this.draw();
  }

  draw() {
    const width = this.place.clientWidth;
    if (!width || !this.nodes.length) return;
    const at = positions(this.nodes, width);
    const others = this.nodes.filter((node) => !node.me);
    const flowing = this.flowing || this.nodes.some((node) => !node.gone && node.row.sessions > 0);
    this.place.replaceChildren(
      svg(
        "svg",
        { width, height: HEIGHT, role: "img", "aria-label": summary(this.nodes), class: flowing ? "flowing" : null },
        svg("defs", {}, svg("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { d: "M0 0 8 4 0 8Z", class: "tip" }))),
        others.map((node) => spoke(node, at)),
        hops(this.route, this.nodes).map(([from, to]) => hop(at.get(from), at.get(to))),
        others.map((node) => roundTrip(node, at)),
        this.nodes.map((node) => disc(node, at.get(node.row.peer), this.layers, node.me && others.length < 3)),
      ),
    );
  }
}

function positions(nodes, width) {
  const others = nodes.filter((node) => !node.me);
  const few = others.length < 3; // a triangle, and not a line, so that there is room for arrows
  const centre = { x: width / 2, y: few ? 82 : HEIGHT / 2 - 8 };
  const reach = { x: Math.max(60, Math.min(width / 2 - 62, 300)), y: few ? HEIGHT - 152 : HEIGHT / 2 - 62 };
  const at = new Map(nodes.filter((node) => node.me).map((node) => [node.row.peer, centre]));
  others.forEach((node, index) => {
    const turn = (index + 0.5) / others.length;
    const angle = few ? Math.PI * (1 - turn) : 2 * Math.PI * turn - Math.PI / 2;
    const share = distance(node.row.round_trip_ms);
    at.set(node.row.peer, { x: centre.x + reach.x * share * Math.cos(angle), y: centre.y + reach.y * share * Math.sin(angle) });
  });
  return at;
}

/** 0.1 ms is near, 100 ms is far: 0.7 to 1, so that nothing overlaps. */
function distance(round_trip_ms) {
  if (round_trip_ms === null) return 1;
  return 0.7 + 0.3 * Math.min(1, Math.max(0, (Math.log10(Math.max(round_trip_ms, 0.01)) + 1) / 3));
}

function spoke(node, at) {
  const me = [...at.values()][0];
  const to = at.get(node.row.peer);
  const kind = node.gone ? "spoke gone" : node.row.connected ? "spoke" : "spoke far";
  return svg("line", { x1: me.x, y1: me.y, x2: to.x, y2: to.y, class: kind });
}

function roundTrip(node, at) {
  if (node.gone || node.row.round_trip_ms === null) return null;
  const me = [...at.values()][0];
  const to = at.get(node.row.peer);
  return svg("text", { x: (me.x + to.x) / 2, y: (me.y + to.y) / 2 + 4, class: "rtt" }, ms(node.row.round_trip_ms));
}

/** Pairs of nodes that the last answer has passed, from the node that asked and back to it. */
function hops(route, nodes) {
  if (!route.length) return [];
  const here = new Set(nodes.filter((node) => !node.gone).map((node) => node.row.peer));
  const me = nodes.find((node) => node.me)?.row.peer;
  const way = [me, ...route.map((stage) => stage.peer), me];
  return way
    .slice(1)
    .map((peer, index) => [way[index], peer])
    .filter(([from, to]) => from !== to && here.has(from) && here.has(to));
}

function hop(from, to) {
  const length = Math.hypot(to.x - from.x, to.y - from.y) || 1;
  const x = (to.x - from.x) / length;
  const y = (to.y - from.y) / length;
  const gap = RING + 9;
  const bend = 16; // so that there and back are two lines
  const middle = `${(from.x + to.x) / 2 - y * bend} ${(from.y + to.y) / 2 + x * bend}`;
  return svg("path", {
    d: `M${from.x + x * gap} ${from.y + y * gap}Q${middle} ${to.x - x * gap} ${to.y - y * gap}`,
    class: "hop",
    "marker-end": "url(#tip)",
  });
}

function disc(node, { x, y }, layerCount, above) {
  const { row } = node;
  const holds = row.first !== null && layerCount > 0;
  const from = holds ? row.first / layerCount : 0;
  const share = holds ? (row.last - row.first) / layerCount : 0;
  return svg(
    "g",
    { class: `node ${node.gone ? "gone" : row.state}${node.me ? " me" : ""}`, transform: `translate(${x} ${y})` },
    svg("circle", { r: RING + 7, class: "back" }),
    svg("circle", { r: RING, class: "ring" }),
    share > 0 &&
      svg("circle", { r: RING, class: "held", "stroke-dasharray": `${share * TURN} ${TURN}`, transform: `rotate(${360 * from - 90})` }),
    svg("text", { y: 4, class: "mark" }, node.gone ? "✕" : row.trouble ? "!" : row.sessions || ""),
    svg("text", { y: above ? -RING - 26 : RING + 22, class: "name" }, nameOf(row).slice(0, 18)),
    svg("text", { y: above ? -RING - 11 : RING + 37, class: "span" }, node.gone ? node.why.split(":")[0] : holds ? layers(row.first, row.last) : ""),
  );
}

function summary(nodes) {
  const words = nodes.map((node) => `${nameOf(node.row)} ${node.gone ? "is lost" : does(node.row)}`);
  return `Map of the mesh: ${words.join("; ")}`;
}
